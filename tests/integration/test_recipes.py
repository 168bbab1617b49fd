"""Every shipped recipe, executed on a tiny random Gemma of its own generation, on sample rows in its set's schema."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.cli import main
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.stages import least_micro
from gemma_tune.recipe.reader import read_recipe
from gemma_tune.recipe.shipped import Shipped, shipped_recipes
from tests.integration.test_preferences_tiny import pair_recipe
from tests.integration.tiny_runs import document, write_recipe

SAMPLE_OF = {
    "ultrachat": "ultrachat_200k",
    "english_quotes": "english_quotes",
    "ultrafeedback": "ultrafeedback_binarized",
}


def source_for(name: str) -> str:
    """The source itself where it is here, otherwise sample rows in the identical schema."""
    if name.startswith("sample:") or ".py:" in name:
        return name
    return f"sample:{SAMPLE_OF[name]}"


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_a_shipped_recipe_runs_on_a_tiny_model_of_its_generation(
    recipe: Shipped, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    read = read_recipe(recipe.path)
    family, _ = model_facts(read.model.name, read.model.revision)
    base, run = tiny(family.name), tmp_path / "run"
    smaller = [
        f"model.name={base}",
        f"data.sources.0.name={source_for(read.data.sources[0].name)}",
        "data.sources.0.limit=40",
        "data.max_length=256",
        "data.holdout=4",
        "optim.max_steps=2",
        "batch.size=2",
        f"batch.micro={least_micro(read.stage)}",
        "evaluation.every=2",
        "evaluation.max_rows=2",
        f"output={run}",
    ]
    if read.stage != "reward":
        smaller += ["samples.max_new_tokens=3", "samples.held_out=1"]
    if read.model.adapter:
        begun = tmp_path / "begun"
        begun.mkdir()
        assert main(["sft", str(write_recipe(begun, base, optim={"max_steps": 1}, samples={"held_out": 0}))]) == 0
        smaller.append(f"model.adapter={begun / 'run'}")
    if read.stage == "ppo":
        smaller.append("ppo.max_new_tokens=8")
        for number, one in enumerate(read.ppo.reward):
            if one.kind == "function":
                continue
            judge = tmp_path / f"judge-{number}"
            judge.mkdir()
            recipe_of_judge = pair_recipe(judge, base, "reward", optim={"max_steps": 1})
            whole = f"model.text_only={str(read.model.text_only).lower()}"
            assert main(["reward", str(recipe_of_judge), whole]) == 0
            key = "ppo.reward" if len(read.ppo.reward) == 1 else f"ppo.reward.{number}.source"
            smaller.append(f"{key}={judge / 'run'}")
    assert main([read.stage, str(recipe.path), *smaller]) == 0
    record = document(run / "run.json")
    assert record["status"] == "finished" and record["family"] == family.name
    assert record["results"]["steps"] == 2
    tuned = record["results"]["tuned"]
    assert record["stage"] == read.stage and math.isfinite(tuned["score" if read.stage == "ppo" else "loss"])
    if read.stage != "sft":
        assert tuned[{"kto": "rows", "ppo": "prompts"}.get(read.stage, "pairs")] == 2
        assert (run / "adapter" / "reward_head.safetensors").is_file() == (read.stage == "reward")
    assert (run / "adapter" / "adapter_model.safetensors").stat().st_size > 1000
