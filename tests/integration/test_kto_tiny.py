"""`gemma-tune kto` on tiny Gemmas of every generation: train, save, open, resume, and what reaches TRL's loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.test_preferences_tiny import start_of, write_pairs
from tests.integration.test_two_processes import on_two_processes
from tests.integration.tiny_runs import COLOURS, THINGS, document, lines, write_recipe
from tests.tiny import TINY_NAMES

Tiny = Callable[..., Path]
LORA = {"r": 4, "alpha": 8}


def write_judged(path: Path, count: int = 48) -> Path:
    """Answers of which those that name the thing are good: learnable, of like length, as many good as bad."""
    rows = []
    for number in range(count):
        thing, other = THINGS[number % len(THINGS)], THINGS[(number + 3) % len(THINGS)]
        colour, good = COLOURS[number % len(COLOURS)], number % 2 == 0
        answer = f"The {thing} is {colour}, as all know." if good else f"The {other} is {colour}, who would care?"
        prompt = f"What is the colour of the {thing} number {number}?"
        rows.append({"prompt": prompt, "completion": answer, "label": good})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kto_recipe(folder: Path, base: Path, source: Path | None = None, **changes: Any) -> Path:
    """A recipe of eight steps over judged answers. Sections in `changes` are merged in."""
    source = source or write_judged(folder / "judged.jsonl")
    own: dict[str, Any] = {
        "stage": "kto",
        "data": {"sources": [{"name": str(source)}], "max_length": 128, "holdout": 8},
        "batch": {"size": 8, "micro": 4},
    }
    path = write_recipe(folder, base, **{**own, **changes})
    recipe = json.loads(path.read_text()) | {"adapter": changes.get("adapter", LORA)}
    if recipe["adapter"] is None:
        del recipe["adapter"]
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", TINY_NAMES)
def test_kto_of_every_generation(tiny: Tiny, tmp_path: Path, name: str) -> None:
    assert main(["kto", str(kto_recipe(tmp_path, tiny(name)))]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    base, tuned = results["base"], results["tuned"]
    assert (base["loss"], base["kl"], base["good_reward"]) == pytest.approx((0.5, 0, 0), abs=1e-6), "its own reference"
    assert tuned["loss"] < base["loss"] and tuned["accuracy"] > 0.5 and tuned["rows"] == 8
    assert tuned["good_reward"] > tuned["bad_reward"]
    assert results["answers"] and all(row["tuned"] for row in results["answers"])

    from gemma_tune.models.saved import load_run

    model, _, _ = load_run(run)
    assert list(model.peft_config) == ["default"]


def test_metrics_of_a_kto_run(tiny: Tiny, tmp_path: Path) -> None:
    assert main(["kto", str(kto_recipe(tmp_path, tiny("gemma3_text")))]) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 8 and {"kl", "rewards/chosen", "rewards/rejected", "logps/chosen"} <= set(steps[0])
    assert any(row["kl"] > 0 for row in steps), "KL rows reach the loss"
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert {"eval_accuracy", "eval_good_reward", "eval_bad_reward", "eval_kl"} <= set(evaluated[0])
    assert steps[-1]["tokens_seen"] > steps[-1]["tokens_trained"] > 0


def test_a_resumed_run_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    recipe = kto_recipe(tmp_path, tiny("gemma3_text"))
    assert main(["kto", str(recipe)]) == 0
    run, cut = tmp_path / "run", tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoint-8")
    record = document(cut / "run.json")
    (cut / "run.json").write_text(json.dumps(record | {"status": "aborted"}))
    assert checkpoint.newest(cut).found.step == 6  # type: ignore[union-attr]
    assert main(["kto", str(recipe), f"output={cut}", "--resume", "must"]) == 0
    for file in (run / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (cut / "adapter" / file.name).read_bytes(), file.name
    assert document(cut / "run.json")["results"]["tuned"] == document(run / "run.json")["results"]["tuned"]


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_kto_of_pairs_from_an_sft_run(tiny: Tiny, tmp_path: Path, mode: str) -> None:
    """The reference is the adapter that the training begins with: all rewards are 0 at the start."""
    start = start_of(tiny, tmp_path / "sft")
    changes: dict[str, Any] = {
        "model": {"adapter": str(start), "adapter_mode": mode},
        "adapter": None if mode == "continue" else {"r": 2, "alpha": 4},
    }
    recipe = kto_recipe(tmp_path, tiny("gemma3_text"), write_pairs(tmp_path / "pairs.jsonl"), **changes)
    assert main(["kto", str(recipe)]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    assert (results["base"]["loss"], results["base"]["kl"]) == pytest.approx((0.5, 0), abs=1e-6)
    assert results["tuned"]["good_reward"] > results["tuned"]["bad_reward"]
    assert document(run / "adapter" / "adapter_config.json")["r"] == {"continue": 4, "stack": 6}[mode]
    report = document(run / "run.json")["data"]["report"]
    assert report["judged"]["good"] + report["judged"]["bad"] == report["rows"] == 96 - report["held_out"]


def test_an_answer_that_is_alone_in_its_pass_has_the_kl_point_zero(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """43 rows for the training in passes of 2, of which TRL is given the prompts with answers to other prompts."""
    from trl import KTOTrainer

    seen: list[dict[str, Any]] = []
    own = KTOTrainer._compute_loss

    def heard(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append(dict(inputs))
        return own(self, model, inputs, *rest)

    monkeypatch.setattr(KTOTrainer, "_compute_loss", heard)
    recipe = kto_recipe(tmp_path, tiny("gemma3_text"), batch={"size": 4, "micro": 2}, optim={"max_steps": 11})
    assert main(["kto", str(recipe), "data.holdout=5", "evaluation.every=11"]) == 0
    *full, last = seen
    assert len(seen) == 22 and len(last["input_ids"]) == 1
    assert "KL_input_ids" not in last and last["ref_KL_logps"].tolist() == [0.0]
    for batch in full:
        answers, others = (
            [ids[mask == 1].tolist() for ids, mask in zip(*pair, strict=True)]
            for pair in (
                (batch["input_ids"], batch["completion_mask"]),
                (batch["KL_input_ids"], batch["KL_completion_mask"]),
            )
        )
        assert others == answers[::-1] and batch["ref_KL_logps"].shape == (2,)
    steps = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(0 < row["loss"] < 1 for row in steps)


def test_held_out_figures_do_not_depend_on_the_size_of_a_pass(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for micro in (2, 4):
        recipe = kto_recipe(tmp_path, tiny("gemma3_text"), batch={"size": 4, "micro": micro})
        output = tmp_path / f"run{micro}"
        assert main(["kto", str(recipe), f"output={output}", "evaluation.max_rows=7", "optim.max_steps=2"]) == 0
        adapter = document(output / "run.json")["results"]
        found.append(adapter["base"])
        assert adapter["tuned"]["rows"] == 7
    assert {key: value for key, value in found[0].items() if isinstance(value, float)} == pytest.approx(
        {key: value for key, value in found[1].items() if isinstance(value, float)}, abs=1e-6
    )


def test_answers_out_of_balance_are_said(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_judged(tmp_path / "judged.jsonl")
    rows = [row for row in lines(source) if row["label"] or row["prompt"].endswith("5?")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = kto_recipe(tmp_path, tiny("gemma3_text"), source)
    assert main(["kto", str(recipe), "optim.max_steps=1", "data.holdout=4"]) == 0
    assert "KTO's authors balance them by kto.desirable_weight" in " ".join(capsys.readouterr().out.split())


def test_kto_on_four_bits(tiny: Tiny, tmp_path: Path) -> None:
    """QLoRA: TRL would train the adapter in bf16."""
    from safetensors.torch import load_file

    recipe = kto_recipe(tmp_path, tiny("gemma3_text"))
    assert main(["kto", str(recipe), "model.quantization=nf4"]) == 0
    results = document(tmp_path / "run" / "run.json")["results"]
    assert results["base"]["loss"] == pytest.approx(0.5, abs=1e-6) and results["tuned"]["loss"] < 0.5
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.float32"}
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in saved.values()), "fp32 to the last bit"


def test_two_processes_end_together_and_score_the_held_out_rows_as_one_does(tiny: Tiny, tmp_path: Path) -> None:
    """The KL point of a pass is that of both processes, so that losses are near those of one process, not the same."""
    recipe = str(kto_recipe(tmp_path, tiny("gemma3_text"), optim={"max_steps": 6}))
    changes = ["batch.micro=2", "data.holdout=5", "samples.held_out=0"]
    assert main(["kto", recipe, f"output={tmp_path / 'one'}", *changes]) == 0
    on_two_processes("kto", recipe, *changes)
    first, second = (document(tmp_path / name / "run.json")["results"] for name in ("one", "run"))
    assert second["steps"] == 6 and second["tuned"]["rows"] == first["tuned"]["rows"] == 5
    assert second["base"] == pytest.approx(first["base"], abs=1e-6)
    assert second["tuned"]["loss"] == pytest.approx(first["tuned"]["loss"], abs=0.05) and second["tuned"]["loss"] < 0.5
    assert second["tokens_trained"] == first["tokens_trained"], "the last row of 43 counts once"
