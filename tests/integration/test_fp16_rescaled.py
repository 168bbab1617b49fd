"""`model.precision: fp16_rescaled` in whole commands, on tiny Gemmas and a CPU: every stage, stops, what is saved."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.cli import main
from gemma_tune.train import loss_scaling
from tests.fp16_proof import apart
from tests.integration.test_ppo_tiny import outcome as ppo_outcome
from tests.integration.test_ppo_tiny import ppo_recipe
from tests.integration.test_preferences_tiny import pair_recipe
from tests.integration.test_resume import LIGHT, outcome, stop_at
from tests.integration.tiny_runs import document, lines, write_recipe

Tiny = Callable[..., Path]
RESCALED = ("gemma2", "gemma3_text", "gemma3")
FP16 = {"precision": "fp16_rescaled", "quantization": "nf4"}


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", RESCALED)
def test_sft_agrees_with_fp32(tiny: Tiny, tmp_path: Path, name: str) -> None:
    learnt = {}
    for precision in ("fp32", "fp16_rescaled"):
        folder = tmp_path / precision
        folder.mkdir()
        recipe = write_recipe(
            folder,
            tiny(name),
            **(LIGHT | {"model": FP16 | {"precision": precision}, "evaluation": None}),
            adapter={"dropout": 0.0},
            tracking={"log_every": 1},
        )
        assert main(["sft", str(recipe), "data.holdout=0"]) == 0
        learnt[precision] = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
    exact, found = (steps_of(tmp_path / precision / "run") for precision in ("fp32", "fp16_rescaled"))
    for one, other in zip(found, exact, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
        assert one["skipped_steps"] == 0 and one["loss_scale"] == loss_scaling.INITIAL
    assert apart(learnt["fp16_rescaled"], learnt["fp32"]) < 0.1
    assert all(value.dtype == torch.float32 for value in learnt["fp16_rescaled"].values())
    plan = document(tmp_path / "fp16_rescaled" / "run" / "plan.json")
    assert plan["model"]["residual_exponent"]["value"] == -8 and plan["session"]["loss_scaling"]["value"] is True
    assert plan["model"]["dtype"]["value"] == "float16" and plan["trainer"]["fp16"]["value"] is False


def test_skipped_steps_keep_weights_and_schedule_and_a_stop_keeps_the_scale(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with too large a scale: the first steps are skipped, and the run is cut right behind one of them."""
    monkeypatch.setattr(loss_scaling, "INITIAL", 2.0**16)
    changes = LIGHT | {"model": FP16, "tracking": {"log_every": 1}, "checkpoint": {"every": 1, "keep": 20}}
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), **changes))
    assert main(["sft", recipe, f"output={tmp_path / 'straight'}"]) == 0
    steps = steps_of(tmp_path / "straight")
    count = [0, *(int(step["skipped_steps"]) for step in steps)]
    was_skipped = [after > before for before, after in pairwise(count)]
    assert was_skipped[:2] == [True, True] and not all(was_skipped[2:]), "the scale above does not fit this model"
    for number, (step, after) in enumerate(pairwise(steps)):
        assert (after["learning_rate"] == step["learning_rate"]) == was_skipped[number], "the schedule waits"
    saved = [
        load_file(tmp_path / "straight" / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (1, 2, len(steps))
    ]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0]), "nothing was updated"
    assert not all(torch.equal(saved[0][key], saved[2][key]) for key in saved[0])
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert main(["sft", recipe]) == 75
    assert main(["sft", recipe, "--resume", "must"]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")
    figures = [
        [(step["loss_scale"], step["skipped_steps"]) for step in steps_of(tmp_path / name)]
        for name in ("run", "straight")
    ]
    assert figures[0] == figures[1]


def test_it_stops_where_no_scale_is_small_enough(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss_scaling, "INITIAL", 2.0**60)
    recipe = str(write_recipe(tmp_path, tiny("gemma3_text"), **(LIGHT | {"model": FP16})))
    assert main(["sft", recipe, "optim.max_steps=20"]) == 4
    said = capsys.readouterr()
    assert f"{loss_scaling.MOST_SKIPPED} steps in a row had an infinite gradient" in said.out + said.err


def test_plain_fp16_is_refused_and_an_infinite_loss_stops_the_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guard looks at the loss, whatever the scaler skips: a stream beyond what the rescaling makes room for."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("gemma3_text"))
    for layer in model.model.layers:
        layer.post_feedforward_layernorm.weight.data.fill_(3e7)
    base = tmp_path / "loud"
    model.save_pretrained(base)
    for file in tiny("gemma3_text").iterdir():
        if "token" in file.name:
            (base / file.name).write_bytes(file.read_bytes())
    recipe = str(
        write_recipe(tmp_path, base, **(LIGHT | {"model": {"precision": "fp16_rescaled"}, "evaluation": None}))
    )
    assert main(["sft", recipe, "data.holdout=0"]) == 4
    said = capsys.readouterr()
    assert "the loss of step 1 is not finite" in said.out + said.err
    assert main(["sft", recipe, "model.precision=fp16", f"output={tmp_path / 'other'}"]) == 2
    said = capsys.readouterr()
    assert "fp16_rescaled" in said.out + said.err


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_other_stages_train(tiny: Tiny, tmp_path: Path, stage: str) -> None:
    recipe = json.loads(pair_recipe(tmp_path, tiny("gemma2"), stage).read_text())
    recipe["model"] |= FP16
    recipe |= {"tracking": {"log_every": 1}, "evaluation": {"every": 100}}
    if stage == "dpo":
        recipe["samples"] = {"prompts": [], "held_out": 0}
    recipe["optim"]["max_steps"] = 6
    path = tmp_path / "fp16.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    assert main([stage, str(path)]) == 0
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 6 and steps[-1]["skipped_steps"] <= 3, "random weights have larger gradients than real ones"
    assert all(step["grad_norm"] > 0 for step in steps[3:])


def test_ppo_scales_and_resumes_to_the_same_bits(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scaler is its own. A scale that is too large at first, so that the state matters."""
    monkeypatch.setattr(loss_scaling, "INITIAL", 2.0**20)
    shorter = {"optim": {"max_steps": 3}, "evaluation": {"every": 100}}
    recipe = str(ppo_recipe(tmp_path, tiny("gemma3_text"), model=FP16, **shorter))
    assert main(["ppo", recipe, f"output={tmp_path / 'straight'}"]) == 0
    steps = [row for row in lines(tmp_path / "straight" / "metrics.jsonl") if "objective/scores" in row]
    assert len(steps) == 3 and all(row["val/first_ratio_gap"] == 0 for row in steps)
    assert steps[0]["skipped_steps"] > 0 and steps[-1]["loss_scale"] < 2.0**20
    from gemma_tune.train.ppo.trainer import PpoTrainer

    drawn = PpoTrainer.roll_out

    def stopped(self: Any, *args: Any) -> Any:
        if self.state.global_step == 1 and self.evaluated_at == 0:
            signal.raise_signal(signal.SIGTERM)
        return drawn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PpoTrainer, "roll_out", stopped)
        assert main(["ppo", recipe]) == 75
    assert main(["ppo", recipe, "--resume", "must"]) == 0
    assert ppo_outcome(tmp_path / "run") == ppo_outcome(tmp_path / "straight")


def test_a_run_is_opened_on_a_cpu_in_a_type_that_it_has(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gemma_tune.models.saved import load_run

    recipe = write_recipe(tmp_path, tiny("gemma3_text"), **(LIGHT | {"model": FP16, "optim": {"max_steps": 2}}))
    assert main(["sft", str(recipe)]) == 0
    capsys.readouterr()
    ids = {"input_ids": torch.arange(500, 520)[None]}
    model, _, _ = load_run(tmp_path / "run")
    assert model.dtype == torch.bfloat16
    said = capsys.readouterr()
    assert "computed in fp16, which a CPU only emulates" in said.out + said.err
    half, _, _ = load_run(tmp_path / "run", dtype="float16")
    exact, _, _ = load_run(tmp_path / "run", dtype="float32")
    assert half.get_base_model().get_input_embeddings()._gemma_tune_scale == 2.0**-8
    assert not hasattr(exact.get_base_model().get_input_embeddings(), "_gemma_tune_scale")
    with torch.no_grad():
        found, expected = half(**ids).logits.float(), exact(**ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.05  # NF4 of fp16 weights is not quite that of fp32
