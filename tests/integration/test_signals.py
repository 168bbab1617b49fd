"""Signals: one flag, one checkpoint, exit 75; a second Ctrl-C leaves at once; before the training nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.tiny_runs import document, lines, write_recipe


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tiny("gemma3_text"), checkpoint={"every": 100})


def before(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, deed: Callable[..., None]) -> None:
    """Do `deed` each time before `owner.name` runs."""
    own = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        deed(*args)
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def send(*numbers: int) -> Callable[..., None]:
    """Send these signals to this process, at the first call only."""
    left = list(numbers)

    def deed(*_: Any) -> None:
        while left:
            os.kill(os.getpid(), left.pop(0))

    return deed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_saves_and_exits_75(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    from gemma_tune.train.sft_trainer import SftTrainer

    own = signal.getsignal(number)
    before(monkeypatch, SftTrainer, "training_step", send(number))
    assert main(["sft", str(recipe)]) == 75
    error = capsys.readouterr().err
    assert number.name in error and "--resume auto" in error
    run = recipe.parent / "run"
    assert checkpoint.newest(run).found.step == 1  # type: ignore[union-attr]
    assert document(run / "run.json")["status"] == "stopped"
    assert "stopped by a signal after 1 of 8 steps" in (run / "report.html").read_text(encoding="utf-8")
    assert not (run / "adapter").exists()
    assert signal.getsignal(number) is own, "the handlers of the host come back"


def test_a_signal_during_an_evaluation_cuts_it_short_and_saves(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.train import evaluate
    from gemma_tune.train.sft_trainer import SftTrainer

    at_four = send(signal.SIGTERM)
    current: list[Any] = []
    before(monkeypatch, SftTrainer, "evaluate", lambda trainer, *_: current.append(trainer))
    before(monkeypatch, evaluate, "_score", lambda *_: at_four() if current[-1].state.global_step == 4 else None)
    assert main(["sft", str(recipe)]) == 75
    run = recipe.parent / "run"
    assert checkpoint.newest(run).found.step == 4  # type: ignore[union-attr]
    assert [row["step"] for row in lines(run / "metrics.jsonl") if "eval_loss" in row] == [0]
    monkeypatch.undo()
    assert main(["sft", str(recipe), "--resume", "auto"]) == 0


def test_a_signal_during_the_first_samples_leaves_at_once(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma_tune.train import run as runs
    from gemma_tune.train.sft_trainer import SftTrainer

    trained: list[int] = []
    before(monkeypatch, runs, "answers", send(signal.SIGTERM))
    before(monkeypatch, SftTrainer, "training_step", lambda *_: trained.append(1))
    assert main(["sft", str(recipe)]) == 75
    assert trained == []
    assert "--resume auto" in capsys.readouterr().err, "without it the folder would be refused"
    assert document(recipe.parent / "run" / "run.json")["status"] == "stopped"
    monkeypatch.undo()
    assert main(["sft", str(recipe), "--resume", "auto"]) == 0


def test_a_signal_before_the_model_is_ready_leaves_no_folder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.train import run as runs

    before(monkeypatch, runs, "load_base", send(signal.SIGTERM))
    assert main(["sft", str(recipe)]) == 75
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("where", ["training_step", "_save_checkpoint", "count"])
def test_a_signal_in_the_last_step_does_not_pass_the_bases_figures_off_as_the_results(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from gemma_tune.train.sft_trainer import SftTrainer

    last, run = send(signal.SIGTERM), recipe.parent / "run"
    before(
        monkeypatch, SftTrainer, where, lambda trainer, *_: last() if trainer.state.global_step >= LATE[where] else None
    )
    assert main(["sft", str(recipe), "evaluation.every=100"]) == 75
    record = document(run / "run.json")
    assert record["status"] == "stopped" and "tuned" not in record["results"]
    assert checkpoint.newest(run).found.step == 8  # type: ignore[union-attr]
    monkeypatch.undo()
    assert main(["sft", str(recipe), "evaluation.every=100", "--resume", "auto"]) == 0
    results = document(run / "run.json")["results"]
    assert results["tuned"]["loss"] < results["base"]["loss"] and results["tuned"]["answers"] > 0


LATE = {"training_step": 7, "_save_checkpoint": 8, "count": 8}
"""Method -> optimizer steps that are done when the last step reaches it."""


def test_a_second_ctrl_c_leaves_with_130(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.train.sft_trainer import SftTrainer

    before(monkeypatch, SftTrainer, "training_step", send(signal.SIGINT, signal.SIGINT))
    assert main(["sft", str(recipe)]) == 130
    run = recipe.parent / "run"
    assert document(run / "run.json")["status"] == "aborted"
    assert checkpoint.checkpoints(run) == []


def test_a_real_process_stops_on_sigterm(recipe: Path) -> None:
    run = recipe.parent / "run"
    command = [sys.executable, "-m", "gemma_tune", "sft", str(recipe), "optim.max_steps=2000", "evaluation.every=2000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").is_file() and '"loss"' in (run / "metrics.jsonl").read_text(encoding="utf-8"):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, printed
    assert "Traceback" not in printed
    found = checkpoint.newest(run).found
    assert found is not None and found.step >= 1
