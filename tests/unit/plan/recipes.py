"""Recipes for the tests of the plan: short to write, valid, and easy to vary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.machine import MACHINES, Machine
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.schema import Recipe

BASE: dict[str, Any] = {
    "model": {"name": "google/gemma-3-1b-it"},
    "data": {"sources": [{"name": "ultrachat"}], "max_length": 1024},
    "output": "runs/test",
}


def make_recipe(changes: dict[str, Any] | None = None) -> Recipe:
    """BASE with `changes`: dotted keys -> values. PPO has the reward model in runs/reward where they name none."""
    content: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    changes = changes or {}
    if changes.get("stage") == "ppo" and "ppo.reward" not in changes:
        changes = {"ppo.reward": "runs/reward"} | changes
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value
    return Recipe.model_validate(content)


def plan_for(
    changes: dict[str, Any] | None = None,
    machine: str | Machine = "rtx4090",
    world_size: int | None = None,
    start: Start | None = None,
    rewards: Sequence[Start] | None = None,
) -> Plan:
    """The plan of BASE with `changes` on a machine of the table.

    `start` stands for what `model.adapter` names, `rewards` for the reward models that `ppo.reward` names.
    """
    recipe = make_recipe(changes)
    shape = PUBLISHED[recipe.model.name]
    family = FAMILIES[shape.family]
    target = MACHINES[machine] if isinstance(machine, str) else machine
    if recipe.model.adapter and start is None:
        start = saved_adapter(family.lora_targets["attention"])
    if rewards is None:
        rewards = [saved_adapter(rank=8, targets="mlp") for _ in recipe.ppo.models] if recipe.stage == "ppo" else []
    return make_plan(recipe, target, shape, family, start=start, rewards=rewards, world_size=world_size)


def saved_adapter(target_modules: str = "pattern", **changes: Any) -> Start:
    """An adapter as a finished run left it; its figures are no defaults of the recipe."""
    facts = {"rank": 4, "alpha": 12, "dropout": 0.1, "targets": "attention", "rslora": False, "dora": False}
    return Start(target_modules=target_modules, **(facts | changes))
