"""Whole runs of `gemma-tune sft` on tiny Gemmas: what stands in the run folder, and that something was learned."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.tiny_runs import document, lines, write_recipe

LEARNING = {"optim": {"learning_rate": 2e-2, "epochs": 30, "max_steps": 60}, "checkpoint": {"every": 30}}
QUICK = {"optim": {"max_steps": 2}, "samples": {"held_out": 1, "max_new_tokens": 4, "prompts": []}}


@pytest.fixture(scope="module")
def done(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that had time to learn."""
    folder = tmp_path_factory.mktemp("done")
    recipe = write_recipe(
        folder,
        tiny("gemma3_text"),
        **LEARNING,
        evaluation={"every": 20},
        samples={"every": 30, "max_new_tokens": 24, "held_out": 6},
    )
    assert main(["sft", str(recipe)]) == 0
    return folder / "run"


def test_the_run_folder_holds_what_the_documentation_says(done: Path) -> None:
    names = {path.name for path in done.iterdir()}
    assert names == {
        ".lock",
        "adapter",
        "checkpoint-30",
        "checkpoint-60",
        "metrics.jsonl",
        "plan.json",
        "recipe.yaml",
        "report.html",
        "run.json",
        "samples.jsonl",
    }
    assert (done / "recipe.yaml").read_text(encoding="utf-8") == (done.parent / "recipe.yaml").read_text(
        encoding="utf-8"
    )


def test_the_report_shows_the_run(done: Path) -> None:
    """The rows that it marks are those of the data: what a tiny Gemma's tokenizer makes of the answers carries loss."""
    page = (done / "report.html").read_text(encoding="utf-8")
    rows = document(done / "run.json")["data"]["preview"]
    assert len(rows) == 3 and all(row["parts"][0]["text"].startswith("<bos><start_of_turn>user") for row in rows)
    assert "finished after 60 steps" in page and page.count("<mark>") > 3
    last = lines(done / "metrics.jsonl")[-1]
    assert last["peak_rss"] > 100 * 2**20, "bytes"
    for title in ("Loss", "Token accuracy", "Learning rate", "Gradient norm", "Speed", "Memory"):
        assert f"<h3>{title}</h3>" in page


def test_run_json_says_what_ran_on_what(done: Path) -> None:
    record = document(done / "run.json")
    assert record["status"] == "finished" and record["stage"] == "sft" and record["seed"] == 0
    assert record["family"] == "gemma3_text" and record["model"]["revision"].startswith("content-")
    assert len(record["template"]["sha256"]) == 64 and record["template"]["revision"]
    assert len(record["data"]["fingerprint"]) == 64 and record["data"]["report"]
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes", "python", "gemma-tune"} <= set(record["versions"])
    assert record["command"] and record["machine"]["name"] and record["started"] <= record["finished"]


def test_results_hold_the_figures_of_base_and_tuned_model(done: Path) -> None:
    results = document(done / "run.json")["results"]
    base, tuned = results["base"], results["tuned"]
    assert tuned["loss"] < 0.5 * base["loss"]
    assert results["relative_fall"] == pytest.approx(1 - tuned["loss"] / base["loss"])
    assert tuned["perplexity"] == pytest.approx(math.exp(tuned["loss"]))
    assert tuned["token_accuracy"] > base["token_accuracy"]
    assert (tuned["rows"], tuned["answers"]) == (8, 6)
    assert tuned["ended"] > base["ended"], "it learned to end its turn"
    assert results["steps"] == 60 and results["tokens_seen"] > results["tokens_trained"] > 0
    assert results["peak_memory"]["rss"] > 0 and results["tokens_per_second"] > 0
    assert results["answers"][0]["prompt"] == "What is the capital of France?"
    assert all(row["base"] and row["tuned"] for row in results["answers"])


def test_metrics_have_one_line_a_step_and_the_evaluations(done: Path) -> None:
    rows = lines(done / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 61))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 20, 40, 60]
    seen = [row["tokens_seen"] for row in rows]
    assert seen == sorted(seen) and seen[-1] == document(done / "run.json")["results"]["tokens_seen"]
    assert {"loss", "grad_norm", "learning_rate", "token_accuracy", "epoch"} <= set(rows[1])


def test_samples_at_the_start_between_and_at_the_end(done: Path) -> None:
    rows = lines(done / "samples.jsonl")
    assert [row["step"] for row in rows] == [0] * 7 + [30] * 7 + [60] * 7
    assert {row["held_out"] for row in rows} == {True, False}
    assert all(row["tokens"] <= 24 for row in rows)


def test_checkpoints_hold_no_tokenizer_no_pickled_arguments_and_no_card(done: Path) -> None:
    names = {path.name for path in (done / "checkpoint-60").iterdir()}
    assert names == {
        checkpoint.MANIFEST,
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }


def test_the_adapter_opens_with_peft_alone_and_stops_at_the_turn_end(done: Path, tiny: Callable[..., Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    base = AutoModelForCausalLM.from_pretrained(tiny("gemma3_text"))
    model = PeftModel.from_pretrained(base, str(done / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(done / "adapter")
    settings = GenerationConfig.from_pretrained(done / "adapter")
    assert settings.eos_token_id == [1, 106]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the colour of the fox number 3?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(made[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "The" in text and " is " in text


def test_chat_answers_like_the_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = document(done / "run.json")["results"]["answers"][1]
    assert main(["chat", str(done), "--prompt", row["prompt"], "--max-new-tokens", "24"]) == 0
    assert capsys.readouterr().out.strip() == row["tuned"]["text"].strip()


def test_a_conversation_on_the_terminal(done: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    typed = iter(["What is the colour of the fox number 3?", "", "/new", "What is the colour of the fox number 3?"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, "/quit"))
    assert main(["chat", str(done), "--max-new-tokens", "24"]) == 0
    answers = [line for line in capsys.readouterr().out.splitlines() if "The" in line]
    assert len(answers) == 2 and answers[0] == answers[1], "/new starts over: the same question, the same answer"


VARIANTS: dict[str, dict[str, Any]] = {
    "unpacked": {"data": {"packing": False}},
    "nf4": {"model": {"quantization": "nf4", "precision": "bf16"}},
    "bf16": {"model": {"precision": "bf16"}},
    "checkpointing": {"memory": {"gradient_checkpointing": True}},
    "full": {"adapter": None},
    "documents": {"data": {"sources": [{"name": "texts.jsonl"}]}, "samples": {"prompts": ["The street is"]}},
    "nothing held out": {"data": {"holdout": 0}, "samples": {"held_out": 0, "prompts": []}, "evaluation": None},
    "streaming": {"data": {"streaming": True, "shuffle_buffer": 8}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_and_save(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"The street number {n} is wide and the houses of it are old."} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    changes: dict[str, Any] = {"optim": {"learning_rate": 1e-2, "max_steps": 6}, "checkpoint": {"every": 6}}
    recipe = write_recipe(tmp_path, tiny("gemma3_text"), **{**changes, **VARIANTS[name]})
    assert main(["sft", str(recipe)]) == 0
    results = document(tmp_path / "run" / "run.json")["results"]
    assert results["weights"]["folder"] == ("model" if name == "full" else "adapter")
    if name == "nothing held out":
        assert "loss" not in results["base"]
    else:
        assert results["tuned"]["loss"] < results["base"]["loss"]
    assert main(["chat", str(tmp_path / "run"), "--prompt", "Hello", "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize(
    "name", ["gemma1", "gemma2", "gemma3", "gemma3n_text", "gemma4", "gemma4_moe", "gemma4_unified"]
)
def test_every_generation_trains(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    assert main(["sft", str(write_recipe(tmp_path, tiny(name), **QUICK))]) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_evaluating_and_sampling_do_not_change_the_training(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), optim={"max_steps": 4, "learning_rate": 1e-2}))
    often = ["evaluation.every=1", "samples.every=1", "output=often", "checkpoint.every=1"]
    seldom = ["evaluation.every=9", "samples.held_out=0", "samples.prompts=[]", "output=seldom"]
    weights = []
    for change in (often, seldom):
        output = tmp_path / change[-1 if change is seldom else 2].partition("=")[2]
        words = [word for word in change if not word.startswith("output=")]
        assert main(["sft", recipe, *words, f"output={output}"]) == 0
        weights.append((output / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_a_folder_that_holds_another_run_is_refused_untouched(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in done.iterdir()}
    assert main(["sft", str(done.parent / "recipe.yaml")]) == 2
    error = capsys.readouterr().err
    assert "already holds a run" in error and "--resume auto" in error
    assert {path.name: path.stat().st_mtime_ns for path in done.iterdir()} == before


def test_foreign_files_are_refused(tiny: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    recipe = write_recipe(tmp_path, tiny("gemma3_text"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert main(["sft", str(recipe), "--resume", "auto"]) == 2
    assert "thesis.txt" in capsys.readouterr().err


def test_resume_must_needs_a_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert main(["sft", str(write_recipe(tmp_path, tiny("gemma3_text"))), "--resume", "must"]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("key", "value"), [("learning_rte", "1e-4"), ("hub_strategy", "nonsense")])
def test_unchecked_keywords_that_the_trainer_refuses_are_the_users_input(
    tiny: Callable[..., Path], tmp_path: Path, capsys: Any, key: str, value: str
) -> None:
    recipe = write_recipe(tmp_path, tiny("gemma3_text"))
    assert main(["sft", str(recipe), f"advanced.trainer={{{key}: {value}}}"]) == 2
    error = capsys.readouterr().err
    assert f"advanced.trainer.{key}" in error and "fix:" in error
    assert not (tmp_path / "run").exists()


def test_what_the_trainer_refuses_when_it_is_made_is_the_users_input(
    tiny: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    recipe = write_recipe(tmp_path, tiny("gemma3_text"))
    assert main(["sft", str(recipe), "advanced.trainer={loss_type: nonsense}"]) == 2
    error = capsys.readouterr().err
    assert "advanced.trainer.loss_type" in error and "nonsense" in error


def test_data_that_cannot_be_read_leave_nothing_behind(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny("gemma3_text"))
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    assert main(["sft", str(recipe)]) == 2
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_stops_before_the_update(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from gemma_tune.train.sft_trainer import SftTrainer

    own = SftTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = own(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 5 else loss

    monkeypatch.setattr(SftTrainer, "compute_loss", poisoned)
    assert main(["sft", str(write_recipe(tmp_path, tiny("gemma3_text")))]) == 4
    error = capsys.readouterr().err
    assert "step 6 is not finite" in error and "learning_rate" in error
    run = tmp_path / "run"
    assert checkpoint.newest(run).found.step == 4  # type: ignore[union-attr]
    assert document(run / "run.json")["status"] == "failed"
    report = document(run / "non_finite.json")
    assert report["step"] == 6 and report["input_ids"]
    monkeypatch.undo()
    assert main(["sft", str(tmp_path / "recipe.yaml"), "--resume", "auto"]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "DefaultCPUAllocator: can't allocate memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_out_of_memory_names_the_batch_and_the_fix(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str
) -> None:
    from gemma_tune.train.sft_trainer import SftTrainer

    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError(text)

    monkeypatch.setattr(SftTrainer, "training_step", full)
    assert main(["sft", str(write_recipe(tmp_path, tiny("gemma3_text")))]) == 4
    error = capsys.readouterr().err
    assert "batch.micro 2" in error and "max_length 128" in error and "gradient_checkpointing: true" in error


def test_a_full_disk_during_a_save_names_the_checkpoint(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import torch

    from gemma_tune.train.session import RunFolder

    own, calls, wrote = torch.save, [], RunFolder.write_record

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("basic_ios::clear: iostream error")
        return own(*args, **kwargs)

    def full_too(self: Any, **changes: Any) -> None:
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        wrote(self, **changes)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(RunFolder, "write_record", full_too)
    assert main(["sft", str(write_recipe(tmp_path, tiny("gemma3_text")))]) == 4
    error = capsys.readouterr().err
    assert "the disk is full" in error and "checkpoint-4" in error
    monkeypatch.undo()
    assert main(["sft", str(tmp_path / "recipe.yaml"), "--resume", "auto"]) == 0


def test_two_processes_do_not_share_a_folder(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny("gemma3_text"))
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, json, os, sys\n"
            "lock = open(sys.argv[1], 'a+'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "lock.write(json.dumps({'pid': os.getpid(), 'host': 'here', 'since': 'now'})); lock.flush()\n"
            "print('held', flush=True); sys.stdin.read()",
            str(tmp_path / "run" / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gemma_tune", "sft", str(recipe)],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "COLUMNS": "200"},
        )
    finally:
        holder.communicate("")
    assert done.returncode == 3
    assert f"process {holder.pid} on here since now is working in this folder" in done.stderr
