"""What a run needs beside the keywords of the libraries."""

from __future__ import annotations

from typing import Any

from gemma_tune.gemma.families import Family
from gemma_tune.plan.choices_model import Precision
from gemma_tune.plan.choices_ppo import critic_choice, rewards_choice
from gemma_tune.plan.sharding import Sharding, distributed_choice
from gemma_tune.plan.stages import written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Recipe


def session_choices(recipe: Recipe, family: Family, precision: Precision, sharding: Sharding) -> dict[str, Choice]:
    """What the run folder, evaluation, samples, checkpoints, tracking and the stage's own code need."""
    tenth = "every: a tenth of the steps, which are known when the data is read"
    return {
        "output": written(recipe, "output"),
        "seed": written(recipe, "seed"),
        "adapter": _adapter(recipe),
        "evaluation": _section(recipe.evaluation, tenth if recipe.evaluation.every is None else ""),
        "samples": _samples(recipe),
        "checkpoint": _section(recipe.checkpoint, tenth if recipe.checkpoint.every is None else ""),
        "tracking": _section(recipe.tracking, ""),
        "distributed": distributed_choice(sharding),
        "loss_scaling": _loss_scaling(precision),
        **_of_stage(recipe, family),
    }


def _section(section: Any, open_value: str) -> Choice:
    """One section of the recipe as a plain dictionary; `open_value` explains what the run itself will fill in."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in section.model_dump().items()}
    return Choice(values, "; ".join(filter(None, ["recipe" if section.model_fields_set else "default", open_value])))


def _samples(recipe: Recipe) -> Choice:
    chosen = _section(recipe.samples, "every: before and after the training" if recipe.samples.every is None else "")
    held_out = written(recipe, "samples.held_out")
    if recipe.stage == "reward":
        return Choice(chosen.value | {"held_out": held_out.value}, held_out.reason)
    return chosen


def _loss_scaling(precision: Precision) -> Choice:
    if precision.loss_scaling:
        return Choice(True, "small gradients underflow fp16: the loss is multiplied, and gradients are divided again")
    return Choice(False, f"{precision.compute} has the range of fp32")


def _adapter(recipe: Recipe) -> Choice:
    """`{start, mode}`: the saved adapter that the training begins with; both None where a new one is trained."""
    start = recipe.model.adapter
    if start is None:
        return Choice({"start": None, "mode": None}, "model.adapter names none: a new one, or none, is trained")
    mode = written(recipe, "model.adapter_mode")
    what = "a copy of it is trained" if mode.value == "continue" else "it is frozen below a new one"
    return Choice({"start": start, "mode": mode.value}, f"recipe; adapter_mode: {mode.value} ({mode.reason}), {what}")


def _of_stage(recipe: Recipe, family: Family) -> dict[str, Choice]:
    if recipe.stage == "reward":
        return {"reward": _section(recipe.reward, "")}
    if recipe.stage == "dpo":
        return {"precompute_reference": _precompute(recipe)}
    if recipe.stage == "ppo":
        return {"rewards": rewards_choice(recipe), "critic": critic_choice(recipe, family)}
    return {}


def _precompute(recipe: Recipe) -> Choice:
    """Whether the reference scores all pairs first. It pays where a pair is trained more than once."""
    asked, optim = recipe.dpo.precompute_reference, recipe.optim
    if asked != "auto":
        return Choice(asked, "recipe")
    if optim.max_steps is not None:
        return Choice(False, "optim.max_steps ends the run: whether pairs come twice is not known before they are read")
    if optim.epochs > 1:
        return Choice(True, f"optim.epochs {optim.epochs:g}: every pair would be scored again in each")
    return Choice(False, f"optim.epochs {optim.epochs:g}: a pair is scored once in any case")
