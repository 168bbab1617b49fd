"""Every shipped recipe is planned on every machine of the table."""

from pathlib import Path

import pytest

from gemma_tune.plan.choices_batch import most_processes
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import MACHINES
from gemma_tune.plan.plan import make_plan
from gemma_tune.recipe.reader import read_recipe
from tests.unit.plan.recipes import saved_adapter

FOLDER = Path(__file__).parents[3] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def start(recipe):
    """What the run that the recipe begins with leaves: all shipped recipes have the same adapter but its rank."""
    return saved_adapter(rank=16, targets="all-linear") if recipe.model.adapter else None


def rewards(recipe):
    """The reward models that it names."""
    return [saved_adapter(rank=16, targets="all-linear") for _ in recipe.ppo.models]


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_planned(path, machine):
    recipe, target = read_recipe(path), MACHINES[machine]
    family, shape = model_facts(recipe.model.name, recipe.model.revision)
    processes = most_processes(recipe, target)  # a small batch cannot be split over 8 GPUs
    plan = make_plan(recipe, target, shape, family, start=start(recipe), rewards=rewards(recipe), world_size=processes)
    trainer = plan.values("trainer")
    assert (
        trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] * processes == recipe.batch.size
    )
    assert plan.memory and plan.notes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_the_machine_that_it_names(path):
    """The first lines of a recipe say what it is for."""
    first = path.read_text().partition("stage:")[0]
    names = {"24 GB": "rtx4090", "80 GB": "a100-80gb", "T4": "t4"}
    machine = next((name for words, name in names.items() if words in first), "cpu")
    recipe = read_recipe(path)
    family, shape = model_facts(recipe.model.name, recipe.model.revision)
    require_fit(make_plan(recipe, MACHINES[machine], shape, family, start=start(recipe), rewards=rewards(recipe)))
