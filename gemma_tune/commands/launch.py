"""`gemma-tune sft --accelerate FILE` and so on, which start themselves on all GPUs; `gemma-tune launch`: job files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands import train
from gemma_tune.errors import AccessError, UserError
from gemma_tune.launch.jobs import Job, render_job
from gemma_tune.launch.settings import settings_of
from gemma_tune.launch.start import environment_of, gpus_here, launch
from gemma_tune.launch.world import Options, check_option, is_worker, nodes_of, world_of
from gemma_tune.plan.accelerate_check import file_problems
from gemma_tune.plan.accelerate_files import accelerate_file, read_accelerate_file
from gemma_tune.plan.choices_model import choose_precision
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.machine import cpu_machine, glance
from gemma_tune.recipe import yaml
from gemma_tune.recipe.reader import read_recipe, read_recipe_text

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
    if nodes.rank == 0:
        machines = f"each of {nodes.count} machines" if nodes.count > 1 else "this machine"
        console.out(f"{world.size} processes: {world.a_node} on {machines}, by {settings.path}")
    words = [stage, recipe, *overrides, *(["--resume", resume] if resume != "never" else [])]
    sys.stdout.flush()
    launch(settings, world, words)
    return 0


def render(order: Sequence[Any], out: str | None) -> int:
    """Print a job file, or write it to `out`.

    Args:
        order: the fields of `Job`.
        out: a new file; None for stdout.

    Raises:
        UserError: the recipe or the options, or `out` exists already.
        AccessError: `out` cannot be written.
    """
    job = Job(*order)
    written = yaml.decode(yaml.read_bytes(job.recipe), job.recipe)
    text = render_job(job, read_recipe_text(written, job.recipe, job.overrides), written)
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
