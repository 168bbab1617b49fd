"""When a run does not fit the machine: say by how much, and which settings would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_batch import gib
from gemma_tune.plan.choices_model import Precision
from gemma_tune.plan.decide import decide
from gemma_tune.plan.machine import MACHINES, Launch, Machine
from gemma_tune.plan.memory import estimate, total
from gemma_tune.plan.sharding import Sharding, obstacle
from gemma_tune.plan.stages import continues, least_micro, written
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.rules_ppo import MIN_PROMPT
from gemma_tune.recipe.schema import Adapter, Distributed, Recipe


def needed(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    family: Family,
    start: Start | None,
    rewards: Sequence[Start],
    launch: Launch,
) -> int:
    """Bytes that this recipe needs on this machine, after `auto` has done what it can."""
    decided = decide(recipe, machine, shape, family, start, rewards, launch)
    return total(estimate(shape.text if recipe.model.text_only else shape, decided.batch.work))


def refusal(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    family: Family,
    start: Start | None,
    rewards: Sequence[Start],
    launch: Launch,
) -> str:
    """Why the run cannot start on this machine, with settings that could; empty where it fits."""
    need = needed(recipe, machine, shape, family, start, rewards, launch)
    if need <= machine.memory_bytes:
        return ""
    return f"the run needs {gib(need)} and {machine.name} has {gib(machine.memory_bytes)}. " + (
        _settings(recipe, machine, shape, family, start, rewards, launch)
        or _larger_machines(recipe, shape, family, start, rewards)
    )


def _settings(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    family: Family,
    start: Start | None,
    rewards: Sequence[Start],
    launch: Launch,
) -> str:
    """Up to three settings that fit: single changes first, then the changes one on top of the other."""

    def size(candidate: Recipe) -> float:
        try:
            return needed(candidate, machine, shape, family, start, rewards, launch)
        except UserError:  # what cannot be combined, such as fp16 and fsdp2, is no advice
            return inf

    decided = decide(recipe, machine, shape, family, start, rewards, launch)
    sharding = decided.sharding
    sharing = list(_sharing(recipe, machine, decided.precision, sharding))
    steps = [*sharing, *_changes(recipe, shape, family, sharding.sharded or bool(sharing))]
    if sharding.sharded and machine.device == "cuda" and not sharding.offload:  # the slowest comes last
        steps.append(("distributed.offload: true", {"distributed": {"offload": True}}))
    attempts = [[step] for step in steps] + [steps[:count] for count in range(2, len(steps) + 1)]
    fitting: list[str] = []
    for attempt in attempts:
        need = size(_apply(recipe, [change for _, change in attempt]))
        # A later value of the same key replaces the earlier one.
        text = " with ".join({line.partition(":")[0]: line for line, _ in attempt}.values())
        if need <= machine.memory_bytes and len(fitting) < 3:
            fitting.append(f"{text} ({gib(need)})")
    return "Settings that would fit: " + ", or ".join(fitting) + "." if fitting else ""


def _sharing(
    recipe: Recipe, machine: Machine, precision: Precision, sharding: Sharding
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to spread a run over its processes that need less of each."""
    if sharding.strategy == "ddp" and machine.device == "cuda" and not obstacle(recipe, precision):
        yield "distributed.strategy: fsdp2", {"distributed": {"strategy": "fsdp2"}}
    if sharding.sharded and not sharding.reshard_after_forward:
        yield "distributed.reshard_after_forward: true", {"distributed": {"reshard_after_forward": True}}


def _changes(recipe: Recipe, shape: Shape, family: Family, sharded: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes that save memory, the harmless ones first: (as written in a recipe, section -> values)."""
    # What was saved decides about an adapter that is trained on.
    ppo = recipe.ppo if recipe.stage == "ppo" else None
    adapter = recipe.adapter if not continues(recipe) or (ppo and ppo.new_critic) else None
    shortest = ppo.max_new_tokens + MIN_PROMPT if ppo else 0
    least = least_micro(recipe.stage)
    if recipe.batch.micro not in ("auto", least):
        yield f"batch.micro: {least}", {"batch": {"micro": least}}
    if recipe.memory.gradient_checkpointing is False:
        yield "memory.gradient_checkpointing: true", {"memory": {"gradient_checkpointing": True}}
    if adapter is not None and adapter.dora and written(recipe, "adapter.dropout").value:
        yield "adapter.dropout: 0", {"adapter": adapter.model_copy(update={"dropout": 0.0})}
    if shape.towers and not recipe.model.text_only:
        yield "model.text_only: true", {"model": {"text_only": True}}
    if recipe.adapter is None:
        yield "adapter: {r: 16} with model.quantization: nf4", {"adapter": Adapter(), "model": {"quantization": "nf4"}}
    elif recipe.model.quantization != "nf4":
        yield "model.quantization: nf4", {"model": {"quantization": "nf4"}}
    if recipe.model.attention == "eager" and "sdpa" in family.attention:
        yield "model.attention: sdpa", {"model": {"attention": "sdpa"}}
    for length in (recipe.data.max_length // 2, recipe.data.max_length // 4):
        if length >= max(128, shortest):
            yield f"data.max_length: {length}", {"data": {"max_length": length}}
    if recipe.optim.optimizer in ("auto", "adamw_torch", "paged_adamw_32bit") and not sharded:
        yield "optim.optimizer: adamw_8bit", {"optim": {"optimizer": "adamw_8bit"}}
    if adapter is not None and adapter.r > 8:
        yield "adapter.r: 8", {"adapter": adapter.model_copy(update={"r": 8})}
    if ppo and ppo.estimator == "gae" and ppo.critic == "adapter":
        yield "ppo.critic: head", {"ppo": {"critic": "head"}}


def _apply(recipe: Recipe, changes: list[dict[str, Any]]) -> Recipe:
    for change in changes:
        sections = {
            name: getattr(recipe, name).model_copy(update=value) if isinstance(value, dict) else value
            for name, value in change.items()
        }
        recipe = recipe.model_copy(update=sections)
    return recipe


def _larger_machines(
    recipe: Recipe, shape: Shape, family: Family, start: Start | None, rewards: Sequence[Start]
) -> str:
    """Machines of the table that could hold the run, in one process."""
    recipe = recipe.model_copy(update={"distributed": Distributed()})
    fitting = [
        machine
        for machine in MACHINES.values()
        if machine.device == "cuda"
        and machine.gpus == 1
        and needed(recipe, machine, shape, family, start, rewards, Launch()) <= machine.memory_bytes
    ]
    if not fitting:
        return "No setting of this recipe fits it, nor one GPU of the table: choose a smaller Gemma."
    names = " or ".join(f"{machine.name} ({gib(machine.memory_bytes)})" for machine in fitting[:3])
    return f"No setting of this recipe fits it: choose a smaller Gemma, or {names}."


def require_fit(plan: Plan) -> None:
    """Stop a run before it loads anything that its machine cannot hold.

    Raises:
        AccessError: the estimate exceeds the machine's memory; the message holds settings that would fit.
    """
    if plan.refusal:
        what, _, remedy = plan.refusal.partition(". ")
        raise AccessError(what, where=plan.model["name"].value, fix=remedy)
