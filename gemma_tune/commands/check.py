"""`gemma-tune check RECIPE`: the plan with its reasons and the memory it will need. Loads nothing, imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from gemma_tune import console
from gemma_tune.plan.choices_batch import most_processes
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import glance, named_machine, world_size_of
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.report import report
from gemma_tune.plan.starts import rewards_of, start_of
from gemma_tune.recipe.reader import read_recipe


def run(recipe: str, overrides: Sequence[str], machine: str | None, as_json: bool) -> int:
    """Print the plan of `recipe` for `machine`, by default for this one.

    Raises:
        UserError: the recipe, or what it asks of the model.
        AccessError: this machine cannot run it. For another machine, named by `machine`, that is only printed.
    """
    wanted = read_recipe(recipe, overrides)
    family, shape = model_facts(wanted.model.name, wanted.model.revision)
    if machine:
        target = named_machine(machine)
        processes = most_processes(wanted, target)
    else:
        processes = world_size_of(os.environ)
        target = glance(os.environ, processes)
    start, rewards = start_of(wanted, family), rewards_of(wanted, family)
    plan = make_plan(wanted, target, shape, family, start=start, rewards=rewards, world_size=processes)
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        for part in report(plan):
            console.out(part)
    if machine is None:
        require_fit(plan)
    return 0
