"""`gemma-tune sft --accelerate FILE` and so on, which start themselves on all GPUs; `gemma-tune launch`: job files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands import train
from gemma_tune.errors import AccessError, UserError
from gemma_tune.launch.jobs import DDP, Job, render_job
from gemma_tune.launch.nodes import Nodes, checked
from gemma_tune.launch.settings import Settings, settings_of
from gemma_tune.launch.start import environment_of, gpus_here, launch
from gemma_tune.launch.world import Options, World, check_option, is_worker, nodes_of, world_of
from gemma_tune.plan.accelerate_check import file_problems
from gemma_tune.plan.accelerate_files import (
    AccelerateFile,
    accelerate_file,
    launch_in,
    read_accelerate_file,
    shipped_files,
)
from gemma_tune.plan.choices_model import choose_precision
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import cpu_machine, glance, named_machine
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.starts import rewards_of, start_of
from gemma_tune.recipe import yaml
from gemma_tune.recipe.reader import read_recipe, read_recipe_text
from gemma_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from gemma_tune.train.session import Resume


def start(
    stage: str,
    recipe: str,
    overrides: list[str],
    resume: Resume,
    accelerate: str | None,
    company: Sequence[int | str | None],
) -> int:
    """Train on all processes that the accelerate file, the scheduler and the options ask for.

    Where somebody else (accelerate launch, torchrun, Ray) started this process as one of several, the options are only
    checked.

    Args:
        stage: the command; the recipe's `stage` must be the same.
        recipe: path of the recipe.
        overrides: `a.b=c`, in order.
        resume: `never`, `auto` or `must`.
        accelerate: an accelerate file, or the name of one that is shipped.
        company: how many processes and machines: the fields of `Options`.

    Raises:
        UserError: the recipe, the file or the options.
        AccessError: the machine has not what they ask for, or the machines did not find each other.
        GemmaTuneError: what ended the process that failed first.
    """
    options = Options(*company)  # type: ignore[arg-type]
    if accelerate is None:
        raise UserError(
            f"{', '.join(options.given())} without --accelerate", where="command line", fix="--accelerate ddp"
        )
    file = read_accelerate_file(accelerate_file(accelerate))
    settings = settings_of(file)
    if is_worker(os.environ):
        check_option(settings, options, os.environ)
        return train.run(stage, recipe, overrides, resume)
    # Once and now: else each process would find it out after its start.
    read = read_recipe(recipe, overrides)
    train.check_stage(read.stage, stage, recipe)
    family, _ = model_facts(read.model.name, read.model.revision)
    here = cpu_machine() if settings.use_cpu else glance(os.environ)
    if problems := list(file_problems(file, read, family, choose_precision(read, here, family))):
        raise UserError.of(problems)
    nodes = nodes_of(settings, options, os.environ)
    world = world_of(settings, options, nodes, gpus_here())
    if world.size == 1 and settings.kind == "NO":
        with environment_of(settings, world):
            return train.run(stage, recipe, overrides, resume)
    _check_plan(read, world, settings, file)
    if nodes.rank == 0:
        machines = f"each of {nodes.count} machines" if nodes.count > 1 else "this machine"
        console.out(f"{world.size} processes: {world.a_node} on {machines}, by {settings.path}")
    words = [stage, recipe, *overrides, *(["--resume", resume] if resume != "never" else [])]
    sys.stdout.flush()
    launch(settings, world, words)
    return 0


def _check_plan(recipe: Recipe, world: World, settings: Settings, file: AccelerateFile) -> None:
    """Make the plan that each process will make. Without nvidia-smi nothing is known of the GPUs, and they find out.

    Raises:
        UserError: these processes cannot train this recipe.
        AccessError: it does not fit this machine.
    """
    size, count = world.size, world.nodes.count
    machine = cpu_machine(size, nodes=count) if settings.use_cpu else glance(os.environ, size, count)
    if machine.device == "cpu" and not settings.use_cpu:
        return
    family, shape = model_facts(recipe.model.name, recipe.model.revision)
    told = replace(launch_in(file, size), world_size=size, nodes=count)
    start, rewards = start_of(recipe, family), rewards_of(recipe, family)
    require_fit(make_plan(recipe, machine, shape, family, start=start, rewards=rewards, launch=told))


def _check_job(job: Job, recipe: Recipe) -> None:
    """Refuse an accelerate file under which the job would stop at its start, or leave GPUs idle.

    Raises:
        UserError: there is no such file, or it does not fit the recipe or the machines.
        AccessError: it asks for more GPUs than the machines have.
    """
    if job.template == "ray":
        return
    name = job.accelerate or DDP
    path = accelerate_file(name)
    if job.template == "kubeflow" and path not in shipped_files().values():
        raise UserError(
            "is a file of this machine, which a pod does not have",
            where=f"--accelerate {name}",
            fix=f"the name of a shipped one: {', '.join(shipped_files())}",
        )
    file = read_accelerate_file(path)
    family, _ = model_facts(recipe.model.name, recipe.model.revision)
    # Which types the GPUs of the job compute in is not known here.
    if problems := list(file_problems(file, recipe, family, choose_precision(recipe, named_machine("h100"), family))):
        raise UserError.of(problems)
    settings = settings_of(file)
    size = world_of(settings, Options(), checked(Nodes(job.nodes, address="first")), job.gpus).size
    there = job.nodes * job.gpus
    if size != there and not settings.use_cpu:
        raise UserError(
            f"{size} process{'es' * (size > 1)}, and the job has {there} GPUs",
            where=str(path),
            fix="change --nodes and --gpus-per-node, or num_processes and gpu_ids in the file",
        )
    told = launch_in(file, size)
    if told.replicas and told.shards and told.replicas * told.shards != size:
        raise UserError(
            f"{told.replicas} groups of {told.shards} processes, and the job has {size}",
            where=str(path),
            fix="change --nodes and --gpus-per-node, or parallelism_config in a file of your own",
        )


def render(order: Sequence[Any], out: str | None) -> int:
    """Print a job file, or write it to `out`.

    Args:
        order: the fields of `Job`.
        out: a new file; None for stdout.

    Raises:
        UserError: the recipe, the options or the accelerate file, or `out` exists already.
        AccessError: `out` cannot be written, or the accelerate file asks for more GPUs than the machines have.
    """
    job = Job(*order)
    written = yaml.decode(yaml.read_bytes(job.recipe), job.recipe)
    recipe = read_recipe_text(written, job.recipe, job.overrides)
    text = render_job(job, recipe, written)
    _check_job(job, recipe)
    if out is None:
        sys.stdout.write(text)
        return 0
    path = Path(out)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError("exists already", where=out, fix="name another file, or remove this one") from None
    except OSError as error:
        raise AccessError(f"cannot be written: {error.strerror}", where=out, fix="name another file") from None
    console.out(f"wrote {out}")
    return 0
