"""Recipe x machine x model -> plan. Pure: no I/O, no torch, the same arguments give the same plan."""

from __future__ import annotations

from typing import Any

from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_batch import choose_batch, workload
from gemma_tune.plan.choices_model import choose_precision, lora_choices, model_choices, quantization_choices, written
from gemma_tune.plan.choices_trainer import optimizer_choice, trainer_choices
from gemma_tune.plan.fit import refusal
from gemma_tune.plan.machine import Machine
from gemma_tune.plan.memory import estimate
from gemma_tune.plan.notes import notes_of
from gemma_tune.plan.refusals import check_combination
from gemma_tune.plan.types import Choice, Plan
from gemma_tune.recipe.schema import Recipe


def make_plan(recipe: Recipe, machine: Machine, shape: Shape, family: Family, *, world_size: int | None = None) -> Plan:
    """Everything that a run of `recipe` needs on `machine`.

    Args:
        recipe: what the user wrote.
        machine: where it will run.
        shape: the size of the recipe's model (`plan.facts.model_facts`).
        family: its generation.
        world_size: processes that train together; by default the machine's.

    Returns:
        The plan. A run that does not fit the machine has a `refusal`; `plan.fit.require_fit` raises it.

    Raises:
        UserError: the recipe contradicts itself or the model, or the global batch cannot be split.
        AccessError: the machine cannot do what the recipe insists on.
    """
    processes = machine.world_size if world_size is None else world_size
    check_combination(recipe, machine, shape, family)
    loaded = shape.text if recipe.model.text_only else shape
    precision = choose_precision(recipe, machine, family)
    work = workload(recipe, machine, family, precision, optimizer_choice(recipe, machine).value, processes)
    batch = choose_batch(recipe, machine, loaded, work)
    memory = estimate(loaded, batch.work)
    return Plan(
        stage=recipe.stage,
        family=family.name,
        machine=machine.facts() | {"world_size": processes},
        model=model_choices(recipe, family, precision),
        quantization=quantization_choices(recipe, family, precision),
        lora=lora_choices(recipe.adapter, family),
        trainer=trainer_choices(recipe, machine, precision, batch),
        data=_data_choices(recipe),
        session=_session_choices(recipe),
        memory=memory,
        notes=notes_of(recipe, machine, shape, family, precision, memory, processes),
        refusal=refusal(recipe, machine, shape, family, processes),
    )


def _data_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of `data.build.build`: the recipe's section, with the seed."""
    data = recipe.data
    chosen = {key: written(data, key) for key in type(data).model_fields}
    chosen["sources"] = Choice([source.model_dump() for source in data.sources], "recipe")
    return chosen | {"seed": Choice(recipe.seed, "the recipe's seed")}


def _session_choices(recipe: Recipe) -> dict[str, Choice]:
    """What the run folder, evaluation, samples, checkpoints and tracking need."""
    tenth = "every: a tenth of the steps, which are known when the data is read"
    return {
        "output": written(recipe, "output"),
        "seed": written(recipe, "seed"),
        "evaluation": _section(recipe.evaluation, tenth if recipe.evaluation.every is None else ""),
        "samples": _section(
            recipe.samples, "every: before and after the training" if recipe.samples.every is None else ""
        ),
        "checkpoint": _section(recipe.checkpoint, tenth if recipe.checkpoint.every is None else ""),
        "tracking": _section(recipe.tracking, ""),
    }


def _section(section: Any, open_value: str) -> Choice:
    """One section of the recipe as a plain dictionary; `open_value` explains what the run itself will fill in."""
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in section.model_dump().items()}
    return Choice(values, "; ".join(filter(None, ["recipe" if section.model_fields_set else "default", open_value])))
