"""The decisions that everything else in a plan follows from: types, who holds what, and how a batch is worked off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_batch import Batch, choose_batch, fits, workload
from gemma_tune.plan.choices_model import Precision, choose_precision, quantization_choices
from gemma_tune.plan.choices_trainer import optimizer_choice
from gemma_tune.plan.machine import Launch, Machine
from gemma_tune.plan.sharding import Sharding, check_types, choose_sharding
from gemma_tune.plan.starts import Start
from gemma_tune.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Decided:
    """Types, the processes' shares, and the batch with the workload of one pass."""

    precision: Precision
    sharding: Sharding
    batch: Batch


def decide(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    family: Family,
    start: Start | None,
    rewards: Sequence[Start],
    launch: Launch,
) -> Decided:
    """Types, sharding and batch of `recipe` on `machine` under `launch`.

    Raises:
        UserError: the global batch or the processes cannot be divided, or this run cannot be sharded.
    """
    loaded = shape.text if recipe.model.text_only else shape
    precision = choose_precision(recipe, machine, family)

    def batch_of(sharding: Sharding | None) -> Batch:
        sharded = sharding is not None and sharding.sharded
        optimizer = optimizer_choice(recipe, machine, sharded=sharded).value
        work = workload(recipe, machine, family, precision, optimizer, start, rewards, launch.world_size, sharding)
        return choose_batch(recipe, machine, loaded, work)

    def fits_whole() -> bool:
        return fits(loaded, batch_of(None).work, machine)

    sharding = choose_sharding(recipe, machine, precision, launch, fits_whole)
    if sharding.sharded:
        check_types(precision, quantization_choices(recipe, family, precision))
    return Decided(precision, sharding, batch_of(sharding))
