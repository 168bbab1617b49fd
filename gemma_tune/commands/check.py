"""`gemma-tune check RECIPE`: the plan with its reasons and the memory it will need. Loads nothing, imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gemma_tune import console
from gemma_tune.errors import AccessError, Problem, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.accelerate_check import file_problems
from gemma_tune.plan.accelerate_counts import count_problems
from gemma_tune.plan.accelerate_files import accelerate_file, launch_in, read_accelerate_file
from gemma_tune.plan.choices_batch import most_processes
from gemma_tune.plan.choices_model import choose_precision
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import Launch, Machine, cpu_machine, glance, is_true, launch_of, named_machine
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.report import report
from gemma_tune.plan.starts import rewards_of, start_of
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.reader import read_recipe
from gemma_tune.recipe.schema import Recipe


def run(
    recipe: str, overrides: Sequence[str], machine: str | None, as_json: bool, accelerate: str | None = None
) -> int:
    """Print the plan of `recipe` for `machine`, by default for this one.

    Args:
        recipe: path of the recipe.
        overrides: `a.b=c`, in order.
        machine: name of another machine, such as `l4` or `2x8xh100`.
        as_json: print the plan as JSON.
        accelerate: a file of accelerate, or the name of a shipped one: the plan is that of a run under it, and what is
            wrong with it is an error.

    Raises:
        UserError: the recipe, or what it asks of the model, or of the accelerate file.
        AccessError: this machine cannot run it. For another machine, named by `machine`, that is only printed.
    """
    wanted = read_recipe(recipe, overrides)
    family, shape = model_facts(wanted.model.name, wanted.model.revision)
    if accelerate is not None:
        return _under(accelerate_file(accelerate), wanted, machine, family, shape, as_json)
    if machine:
        target = named_machine(machine)
        launch = Launch(world_size=most_processes(wanted, target), nodes=target.nodes)
    else:
        launch = launch_of(os.environ)
        target = glance(os.environ, launch.world_size, launch.nodes)
    plan = _plan(wanted, target, shape, family, launch)
    _show(plan, as_json)
    if machine is None:
        require_fit(plan)
    return 0


def _plan(recipe: Recipe, machine: Machine, shape: Shape, family: Family, launch: Launch) -> Plan:
    start, rewards = start_of(recipe, family), rewards_of(recipe, family)
    return make_plan(recipe, machine, shape, family, start=start, rewards=rewards, launch=launch)


def _show(plan: Plan, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
        return
    for part in report(plan):
        console.out(part)


def _under(path: Path, recipe: Recipe, name: str | None, family: Family, shape: Shape, as_json: bool) -> int:
    """The plan under an accelerate file, and everything that is wrong with the two together.

    Raises:
        UserError: something is, all of it at once; whether the run fits the machine counts here too.
    """
    file = read_accelerate_file(path)
    target = named_machine(name) if name else glance(os.environ)
    problems = list(count_problems(file, target if name else None))
    launch = launch_in(file, target.world_size if name else max(1, target.gpus))
    on_cpu = is_true(file.text("use_cpu"))
    if on_cpu and target.device == "cuda" and not name:
        target = cpu_machine()
    memory = target.memory_bytes // launch.processes_per_node if target.device == "cpu" else target.memory_bytes
    target = replace(target, memory_bytes=memory, world_size=launch.world_size, nodes=launch.nodes)
    problems += file_problems(file, recipe, family, choose_precision(recipe, target, family))
    if on_cpu and target.device == "cuda":
        problems.append(
            Problem(f"keeps to the CPU, and {name} has GPUs", file.where("use_cpu"), "write `use_cpu: false`")
        )
    if not launch.other and launch.fsdp in (None, 2):  # otherwise said already, with the line
        try:
            plan = _plan(recipe, target, shape, family, launch)
        except (UserError, AccessError) as error:
            problems += error.problems
        else:
            _show(plan, as_json)
            problems += _room(plan, launch, target)
    if problems:
        raise UserError.of(problems)
    console.note(f"{path}: nothing found that would stop {launch.world_size} processes")
    return 0


def _room(plan: Plan, launch: Launch, machine: Machine) -> list[Problem]:
    """Devices and their memory."""
    found = []
    if plan.refusal:
        what, _, remedy = plan.refusal.partition(". ")
        found.append(Problem(f"each process: {what}", plan.model["name"].value, remedy))
    if machine.device == "cuda" and launch.processes_per_node > machine.gpus:
        found.append(
            Problem(
                f"{launch.processes_per_node} processes a node, and {machine.name} has {machine.gpus} GPUs",
                "num_processes",
                f"set num_processes: {machine.gpus * launch.nodes}",
            )
        )
    return found
