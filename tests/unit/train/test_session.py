"""The run folder: who may use it, what is written, what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import AccessError, TrainingError, UserError
from gemma_tune.plan.types import Choice, Plan
from gemma_tune.train import checkpoint, provenance
from gemma_tune.train.session import RunFolder, dump, keep_lines_until

PLAN = Plan("sft", "gemma3_text", {"name": "cpu"}, {"name": Choice("x", "recipe")}, {}, {}, {}, {}, {})
IDENTITY = {"trainer.learning_rate": 0.1}
NOTHING = checkpoint.Search(None)


def opened(path: Path, resume: Any = "never", found: checkpoint.Search = NOTHING) -> RunFolder:
    folder = RunFolder(path, resume=resume)
    folder.check()
    folder.open(recipe_text="stage: sft\n", plan=PLAN, record={"identity": IDENTITY}, resumed=found)
    return folder


def put_checkpoint(path: Path, step: int) -> Path:
    return checkpoint.save(path, step, lambda to: (to / "w").write_bytes(b"w"), identity=IDENTITY, progress={})


def test_checking_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b", resume="never").check()
    assert list(tmp_path.iterdir()) == []


def test_opening_writes_recipe_plan_and_record(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    assert (folder.path / "recipe.yaml").read_text() == "stage: sft\n"
    assert json.loads((folder.path / "plan.json").read_text())["model"]["name"] == {"value": "x", "reason": "recipe"}
    record = json.loads((folder.path / "run.json").read_text())
    assert record["status"] == "running" and record["identity"] == IDENTITY
    folder.close("finished", step=3)
    record = json.loads((folder.path / "run.json").read_text())
    assert record["status"] == "finished" and record["segments"][0]["to_step"] == 3


def test_an_empty_folder_is_fine_and_a_used_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    opened(tmp_path / "run").close("failed", step=0)
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(tmp_path / "run", resume="never").check()
    RunFolder(tmp_path / "run", resume="auto").check()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "run", resume="auto").check()


def test_what_a_crash_before_run_json_leaves_is_no_run(tmp_path: Path) -> None:
    for name in (".lock", ".run.json.new"):
        (tmp_path / name).write_text("{")
    RunFolder(tmp_path, resume="never").check()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(AccessError, match="cannot be written"):
        RunFolder(tmp_path / "run", resume="never").check()


def test_a_second_user_is_told_who_holds_it(tmp_path: Path) -> None:
    first = opened(tmp_path / "run")
    with pytest.raises(AccessError, match=f"process {os.getpid()} on .* is working in this folder"):
        RunFolder(tmp_path / "run", resume="auto").check()
    second = RunFolder(tmp_path / "run", resume="auto")
    with pytest.raises(AccessError, match="is working"):
        second.open(recipe_text="", plan=PLAN, record={}, resumed=NOTHING)
    first.close("finished", step=0)
    RunFolder(tmp_path / "run", resume="auto").check()


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "run", resume="never", writes=False)
    other.check()
    other.open(recipe_text="", plan=PLAN, record={"a": 1}, resumed=NOTHING)
    other.append("metrics.jsonl", [{"step": 1}])
    other.write_record(b=2)
    other.close("finished", step=1)
    assert list(tmp_path.iterdir()) == []
    assert other.record["results"] == {}


def test_resuming_needs_the_same_identity(tmp_path: Path) -> None:
    opened(tmp_path / "run").close("stopped", step=2)
    put_checkpoint(tmp_path / "run", 2)
    folder = RunFolder(tmp_path / "run", resume="auto")
    assert folder.find_checkpoint(IDENTITY).found.step == 2  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"trainer.learning_rate: 0.1 -> 0.2"):
        folder.find_checkpoint({"trainer.learning_rate": 0.2})
    assert RunFolder(tmp_path / "run", resume="never").find_checkpoint({}).found is None


def test_without_a_checkpoint_the_record_still_tells_another_run(tmp_path: Path) -> None:
    opened(tmp_path / "run").close("failed", step=0)
    folder = RunFolder(tmp_path / "run", resume="auto")
    assert folder.find_checkpoint(IDENTITY).found is None
    with pytest.raises(UserError, match="made of something else"):
        folder.find_checkpoint({"trainer.learning_rate": 0.2})


def test_only_damaged_checkpoints_are_an_error_of_the_training(tmp_path: Path) -> None:
    opened(tmp_path / "run").close("stopped", step=2)
    (put_checkpoint(tmp_path / "run", 2) / "w").write_bytes(b"v")
    with pytest.raises(TrainingError, match="checkpoint-2: w was altered"):
        RunFolder(tmp_path / "run", resume="auto").find_checkpoint(IDENTITY)


def test_must_without_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        RunFolder(tmp_path / "run", resume="must").check()


def test_a_resumed_run_keeps_its_past_and_drops_what_it_will_write_again(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append("metrics.jsonl", [{"step": step} for step in range(6)])
    folder.record["results"] = {"base": {"loss": 1.0}}
    folder.close("stopped", step=5, wandb={"id": "abc"})
    put_checkpoint(tmp_path / "run", 3)
    resumed = RunFolder(tmp_path / "run", resume="auto")
    resumed.open(recipe_text="", plan=PLAN, record={"identity": IDENTITY}, resumed=resumed.find_checkpoint(IDENTITY))
    assert [json.loads(line)["step"] for line in (resumed.path / "metrics.jsonl").open()] == [0, 1, 2, 3]
    assert resumed.record["results"] == {"base": {"loss": 1.0}}
    assert [part["from_step"] for part in resumed.record["segments"]] == [0, 3]
    assert resumed.record["wandb"] == {"id": "abc"}
    resumed.close("finished", step=8)


def test_a_checkpoint_before_the_first_step_keeps_the_figures_of_the_base(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append("metrics.jsonl", [{"step": 0}, {"step": 1}])
    folder.close("stopped", step=0)
    put_checkpoint(tmp_path / "run", 0)
    resumed = RunFolder(tmp_path / "run", resume="auto")
    resumed.open(recipe_text="", plan=PLAN, record={"identity": IDENTITY}, resumed=resumed.find_checkpoint(IDENTITY))
    assert [json.loads(line)["step"] for line in (resumed.path / "metrics.jsonl").open()] == [0]
    assert [part["from_step"] for part in resumed.record["segments"]] == [0, 0]
    resumed.close("finished", step=8)


def test_a_run_that_starts_over_starts_with_empty_files(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.append("metrics.jsonl", [{"step": 0}, {"step": 1}])
    folder.close("failed", step=1)
    opened(tmp_path / "run", "auto").close("failed", step=0)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_cut_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    keep_lines_until(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_json_has_no_nan(tmp_path: Path) -> None:
    assert json.loads(dump({"a": float("nan"), "b": [float("inf"), 1.5]})) == {"a": None, "b": [None, 1.5]}


def test_secrets_of_the_environment_and_token_shapes_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token")
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MAX_TOKENS_PASSWORD", "12345678")
    text = "an-unusual-token 0123456789abcdef hf_abcdefghijklmnopqrst https://me:pw123@host/x 12345678"
    assert provenance.redact(text) == "*** *** hf_*** https://***@host/x 12345678"


def test_the_fingerprint_of_a_model_folder_sees_config_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"a" * 3_000_000)
    first = provenance.fingerprint(tmp_path)
    assert first == provenance.fingerprint(tmp_path)
    weights.write_bytes(b"a" * 2_999_999 + b"b")
    second = provenance.fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"x": 1}')
    assert len({first, second, provenance.fingerprint(tmp_path)}) == 3


def test_the_same_tensors_under_another_scale_are_another_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"a" * 100)
    config = tmp_path / "adapter_config.json"
    config.write_text('{"lora_alpha": 16}')
    first = provenance.fingerprint(tmp_path)
    config.write_text('{"lora_alpha": 32}')
    assert provenance.fingerprint(tmp_path) != first


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_the_peak_is_not_that_of_who_started_the_program() -> None:
    small = (
        "import json, resource; from gemma_tune.train.provenance import peak_memory; "
        "print(json.dumps([peak_memory()['rss'], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))"
    )
    large = f"import subprocess as s, sys; held = b'x' * {2**29}; s.run([sys.executable, '-c', {small!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", large], check=True, capture_output=True, text=True)
    ours, theirs = json.loads(done.stdout)
    assert ours < 2**28 < 2**29 < theirs
