"""Two processes take over the run of one; and PPO. Everything else of the kind is in test_parallel.py."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.test_ppo_tiny import ppo_recipe
from tests.integration.test_resume import losses, stop_at
from tests.integration.tiny_runs import document, lines, write_recipe


def on_two_processes(*arguments: str) -> str:
    """What gemma-tune prints on two processes; it must end well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.Popen(
        [*command, "-m", "gemma_tune", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        printed, error = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
    assert process.returncode == 0, error
    return printed


def test_two_gloo_processes_take_over_a_run_and_end_where_one_does(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), adapter={"dropout": 0.0}, checkpoint={"every": 4}))
    assert main(["sft", recipe, f"output={tmp_path / 'one'}", "batch.micro=1"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert main(["sft", recipe, "batch.micro=1"]) == 75
    printed = on_two_processes("sft", recipe, "batch.micro=1", "--resume", "must")
    assert printed.count("resuming after step 2") == 1
    one, two = tmp_path / "one", tmp_path / "run"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    figures = [document(run / "run.json")["results"] for run in (one, two)]
    assert figures[1]["tuned"]["loss"] == pytest.approx(figures[0]["tuned"]["loss"], rel=1e-4)
    for key in ("tokens_seen", "tokens_trained", "steps"):
        assert figures[0][key] == figures[1][key]
    found = checkpoint.newest(two)
    assert found.found is not None and found.found.step == 8 and not found.skipped
    names = {path.name for path in found.found.folder.iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= names


def test_two_processes_make_a_step_of_ppo_as_one_does(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Each process draws with noise of its own; with top_k 1 there is none, and both runs see the same responses."""
    settings = {"minibatches": 1, "top_k": 1, "kl_target": 0.5, "critic": "adapter"}
    recipe = str(ppo_recipe(tmp_path, tiny("gemma3_text"), ppo=settings, data={"holdout": 7}))
    assert main(["ppo", recipe, f"output={tmp_path / 'one'}"]) == 0
    on_two_processes("ppo", recipe)
    one, two = tmp_path / "one", tmp_path / "run"
    steps = [[row for row in lines(run / "metrics.jsonl") if "objective/scores" in row] for run in (one, two)]
    assert len(steps[0]) == len(steps[1]) == 4
    timed = ("time/", "rollout/tokens", "update/tokens", "train_seconds", "tokens_per_second", "peak_")
    for first, second in zip(*steps, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if not key.startswith(timed):
                assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), key
    figures = [document(run / "run.json")["results"] for run in (one, two)]
    for key in ("score", "kl", "kl_k3", "entropy", "response_length", "prompts"):
        assert figures[1]["tuned"][key] == pytest.approx(figures[0]["tuned"][key], rel=1e-3, abs=1e-5), key
    assert figures[0]["tokens_seen"] == figures[1]["tokens_seen"]
