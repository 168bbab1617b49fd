"""A run that was cut anywhere and continued equals the run that was not: every loss and every bit of the adapter."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.tiny_runs import document, lines, write_recipe

LIGHT = {
    "evaluation": {"every": 100},
    "samples": {"prompts": [], "held_out": 0},
    "checkpoint": {"every": 2, "keep": 1},
    "optim": {"learning_rate": 1e-2, "epochs": 2, "max_steps": 8},
    "data": {"max_length": 64},
}


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in lines(run / "metrics.jsonl") if "loss" in row}


def outcome(run: Path) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions."""
    results = document(run / "run.json")["results"]
    return (
        losses(run),
        (run / "adapter" / "adapter_model.safetensors").read_bytes(),
        results["base"],
        results["tuned"],
        results["tokens_seen"],
        results["tokens_trained"],
    )


@pytest.fixture(scope="module")
def straight(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose run was never interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(["sft", str(write_recipe(folder, tiny("gemma3_text"), **LIGHT))]) == 0
    return folder


def again(straight: Path, folder: Path, *words: str) -> list[str]:
    """The same recipe into another output folder."""
    return ["sft", str(straight / "recipe.yaml"), f"output={folder / 'run'}", *words]


def in_child(arguments: list[str], watch: Callable[[str, str], None]) -> int:
    """Run gemma-tune in a child process that reports each file operation to `watch(event, paths)` before it happens."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith("os."):
            watch(event, " ".join(str(item) for item in details[:2]))

    code = 70
    try:
        sys.addaudithook(hook)
        code = main(arguments)
    finally:
        os._exit(code)


def killed(arguments: list[str], event: str, pattern: str) -> int:
    """Run gemma-tune in a child that kills itself -9 just before it does `event` on paths like `pattern`."""

    def watch(name: str, paths: str) -> None:
        if name == event and re.search(pattern, paths):
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child(arguments, watch)


POINTS = [
    ("os.mkdir", r"staging-4"),
    ("open", r"staging-4/adapter_config.json"),
    ("open", r"staging-4/trainer_state.json"),
    ("open", rf"staging-4/{checkpoint.MANIFEST}"),
    ("os.rename", r"staging-4 "),
    ("os.rename", r"checkpoint-2 .*trash"),
    ("os.rmdir", r"trash-checkpoint-2"),
    ("os.rename", r"staging-adapter "),
]


@pytest.mark.parametrize(("event", "pattern"), POINTS, ids=lambda value: str(value))
def test_kill_9_at_any_point_of_a_save(straight: Path, tmp_path: Path, event: str, pattern: str) -> None:
    assert killed(again(straight, tmp_path), event, pattern) == -signal.SIGKILL
    left = checkpoint.newest(tmp_path / "run")
    assert left.found is not None and not left.skipped, "a crash may cost a save, never a checkpoint"
    assert main(again(straight, tmp_path, "--resume", "auto")) == 0
    assert outcome(tmp_path / "run") == outcome(straight / "run")
    assert not [path.name for path in (tmp_path / "run").glob(".[st][tr]a*")], "leftovers are swept"


def test_kill_9_before_the_first_checkpoint_starts_over(straight: Path, tmp_path: Path) -> None:
    assert killed(again(straight, tmp_path), "os.rename", "staging-2 ") == -signal.SIGKILL
    assert main(again(straight, tmp_path)) == 2, "without --resume the folder is refused"
    assert main(again(straight, tmp_path, "--resume", "auto")) == 0
    assert outcome(tmp_path / "run") == outcome(straight / "run")


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_kill_9_before_each_file_operation_of_a_run(straight: Path, tmp_path: Path) -> None:
    def count(event: str, paths: str) -> None:
        if str(tmp_path / "run") in paths:
            seen[0] += 1
            if seen[0] == deadly:
                os.kill(os.getpid(), signal.SIGKILL)

    seen, deadly = [0], 0
    while True:
        seen, deadly = [0], deadly + 1
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        code = in_child(again(straight, tmp_path), count)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if (tmp_path / "run").is_dir():
            assert not checkpoint.newest(tmp_path / "run").skipped, deadly
        assert main(again(straight, tmp_path, "--resume", "auto")) == 0, deadly
        assert outcome(tmp_path / "run") == outcome(straight / "run"), deadly
    assert deadly > 100


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of optimizer step `step`."""
    from gemma_tune.train.sft_trainer import SftTrainer

    own = SftTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(SftTrainer, "training_step", training_step)


@pytest.mark.parametrize("step", [1, 5])
def test_sigterm_saves_exits_75_and_resumes_to_the_same_bits(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert main(again(straight, tmp_path)) == 75
    record = document(tmp_path / "run" / "run.json")
    assert record["status"] == "stopped" and record["segments"][-1]["to_step"] == step
    assert checkpoint.newest(tmp_path / "run").found.step == step  # type: ignore[union-attr]
    assert main(again(straight, tmp_path, "--resume", "must")) == 0
    assert outcome(tmp_path / "run") == outcome(straight / "run")
    record = document(tmp_path / "run" / "run.json")
    assert record["status"] == "finished"
    assert [part["from_step"] for part in record["segments"]] == [0, step]


CELLS: dict[str, dict[str, Any]] = {
    "unpacked": {"data": {"packing": False}},
    "streaming": {"data": {"streaming": True, "shuffle_buffer": 16}},
    "full": {"adapter": None, "optim": {"learning_rate": 1e-3}},
    "nf4 with checkpointing": {
        "model": {"quantization": "nf4", "precision": "bf16"},
        "memory": {"gradient_checkpointing": True},
    },
    "every step": {"checkpoint": {"every": 1}, "evaluation": {"every": 1}},
}


@pytest.mark.parametrize("name", CELLS)
def test_other_kinds_of_runs_resume_to_the_same_bits(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes: dict[str, Any] = {key: dict(value) for key, value in LIGHT.items()}
    for section, values in CELLS[name].items():
        changes[section] = None if values is None else {**changes.get(section, {}), **values}
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), **changes))
    assert main(["sft", recipe, f"output={tmp_path / 'straight'}"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", recipe]) == 75
    assert main(["sft", recipe, "--resume", "must"]) == 0
    runs = [tmp_path / "straight", tmp_path / "run"]
    assert losses(runs[0]) == losses(runs[1])
    kind = "model/model" if name == "full" else "adapter/adapter_model"
    assert (runs[0] / f"{kind}.safetensors").read_bytes() == (runs[1] / f"{kind}.safetensors").read_bytes()


PASSES = {"rows": {"max_length": 64}, "stream": {"max_length": 64, "streaming": True, "shuffle_buffer": 16}}


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("kind", PASSES)
def test_a_run_of_several_passes_resumes_to_the_same_bits(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, step: int
) -> None:
    """52 rows make three batches of 16 and a rest: step 4 is at the end of a pass, step 6 within the second."""
    changes = {**LIGHT, "data": PASSES[kind], "batch": {"size": 16, "micro": 2}}
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), **changes))
    assert main(["sft", recipe, f"output={tmp_path / 'straight'}"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert main(["sft", recipe]) == 75
    assert main(["sft", recipe, "--resume", "must"]) == 0
    found = losses(tmp_path / "straight")
    assert losses(tmp_path / "run") == found
    assert all(later < 1.2 * earlier for earlier, later in pairwise(found.values())), "no batch counts twice"


def test_figures_that_are_taken_after_a_resume_are_computed_in_the_types_of_the_training(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """All weights in fp32 under bf16 autocast, killed between the last checkpoint and the result."""
    changes = {
        **LIGHT,
        "adapter": None,
        "model": {"precision": "bf16"},
        "optim": {"learning_rate": 1e-3, "max_steps": 4},
    }
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), **changes))
    assert main(["sft", recipe, f"output={tmp_path / 'straight'}"]) == 0
    assert killed(["sft", recipe], "os.rename", r"staging-model ") == -signal.SIGKILL
    assert main(["sft", recipe, "--resume", "must"]) == 0
    tuned = [document(tmp_path / run / "run.json")["results"]["tuned"] for run in ("straight", "run")]
    assert tuned[0] == tuned[1]


def test_a_damaged_checkpoint_is_passed_over_and_named(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert main(again(straight, tmp_path, "checkpoint.keep=2")) == 75
    victim = tmp_path / "run" / "checkpoint-5" / "optimizer.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(again(straight, tmp_path, "checkpoint.keep=2", "--resume", "auto")) == 0
    printed = capsys.readouterr().out
    assert "passed over checkpoint-5: optimizer.pt was altered" in printed
    assert "resuming after step 4" in printed
    assert outcome(tmp_path / "run") == outcome(straight / "run")
    assert (tmp_path / "run" / "damaged-checkpoint-5").is_dir()


def test_where_every_checkpoint_is_damaged_nothing_is_started_over(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert main(again(straight, tmp_path)) == 75
    (tmp_path / "run" / "checkpoint-2" / "scheduler.pt").unlink()
    assert main(again(straight, tmp_path, "--resume", "auto")) == 4
    assert "checkpoint-2: scheduler.pt is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("optim.learning_rate=1e-3", "trainer.learning_rate: 0.01 -> 0.001"),
        ("optim.schedule=linear", 'trainer.lr_scheduler_type: "cosine" -> "linear"'),
        ("optim.max_steps=9", "trainer.max_steps: 8 -> 9"),
        ("seed=1", "trainer.seed: 0 -> 1"),
        ("batch.size=8", "batch.size: 4 -> 8"),
        ("adapter.r=2", "lora.r: 4 -> 2"),
        ("data.max_length=128", "data.fingerprint: "),
    ],
)
def test_a_changed_recipe_is_refused_with_the_difference(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, line: str
) -> None:
    before = sorted(path.name for path in (straight / "run").iterdir())
    assert main(["sft", str(straight / "recipe.yaml"), change, "--resume", "auto"]) == 2
    assert line in capsys.readouterr().err
    assert sorted(path.name for path in (straight / "run").iterdir()) == before


def test_changed_rows_are_refused(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = straight / "rows.jsonl"
    good = rows.read_text(encoding="utf-8")
    try:
        rows.write_text(good.replace("number 7?", "number 777?"), encoding="utf-8")
        assert main(["sft", str(straight / "recipe.yaml"), "--resume", "auto"]) == 2
    finally:
        rows.write_text(good, encoding="utf-8")
    assert "data.fingerprint" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(straight: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamp = (straight / "run" / "run.json").read_bytes()
    assert main(["sft", str(straight / "recipe.yaml"), "--resume", "auto"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert (straight / "run" / "run.json").read_bytes() == stamp
