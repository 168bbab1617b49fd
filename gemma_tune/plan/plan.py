"""Recipe x machine x model -> plan. Pure: no I/O, no torch, the same arguments give the same plan."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_data import data_choices
from gemma_tune.plan.choices_model import lora_choices, model_choices, quantization_choices
from gemma_tune.plan.choices_session import session_choices
from gemma_tune.plan.choices_trainer import trainer_choices
from gemma_tune.plan.decide import decide
from gemma_tune.plan.fit import refusal
from gemma_tune.plan.machine import Launch, Machine
from gemma_tune.plan.memory import estimate
from gemma_tune.plan.notes import notes_of
from gemma_tune.plan.refusals import check_combination
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.schema import Recipe


def make_plan(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    family: Family,
    *,
    start: Start | None = None,
    rewards: Sequence[Start] = (),
    world_size: int | None = None,
    launch: Launch | None = None,
) -> Plan:
    """Everything that a run of `recipe` needs on `machine`.

    Args:
        recipe: what the user wrote.
        machine: where it will run.
        shape: the size of the recipe's model (`plan.facts.model_facts`).
        family: its generation.
        start: the adapter that `model.adapter` names (`plan.starts.read_start`); None where it names none.
        rewards: the reward models that `ppo.reward` names (`plan.starts.rewards_of`), in its order.
        world_size: processes that train together; by default the machine's.
        launch: what the launcher says (`machine.launch_of`), `world_size` included; by default nothing but that number.

    Returns:
        The plan. A run that does not fit the machine has a `refusal`; `plan.fit.require_fit` raises it.

    Raises:
        UserError: the recipe contradicts itself or the model, or the global batch cannot be split, or the run cannot
            be sharded.
        AccessError: the machine cannot do what the recipe insists on.
    """
    if launch is None:
        launch = Launch(world_size=machine.world_size if world_size is None else world_size, nodes=machine.nodes)
    processes = launch.world_size
    if (start is None) != (recipe.model.adapter is None):
        raise ValueError("`start` is what plan.starts.read_start makes of model.adapter")
    if len(rewards) != (len(recipe.ppo.models) if recipe.stage == "ppo" else 0):
        raise ValueError("`rewards` is what plan.starts.rewards_of makes of ppo.reward")
    check_combination(recipe, machine, shape, family, start, launch)
    loaded = shape.text if recipe.model.text_only else shape
    decided = decide(recipe, machine, shape, family, start, rewards, launch)
    precision, batch, sharding = decided.precision, decided.batch, decided.sharding
    memory = estimate(loaded, batch.work)
    return Plan(
        stage=recipe.stage,
        family=family.name,
        machine=machine.facts() | {"world_size": processes, "nodes": launch.nodes},
        model=model_choices(recipe, family, precision),
        quantization=quantization_choices(recipe, family, precision),
        lora=lora_choices(recipe, family, start),
        trainer=trainer_choices(recipe, machine, family, precision, batch, sharding),
        data=data_choices(recipe),
        session=session_choices(recipe, family, precision, sharding),
        memory=memory,
        notes=notes_of(recipe, machine, shape, family, precision, memory, start, launch, sharding),
        refusal=refusal(recipe, machine, shape, family, start, rewards, launch),
    )
