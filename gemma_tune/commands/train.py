"""`gemma-tune sft`, `reward`, `dpo`, `kto` and `ppo`: recipe -> plan -> run, then what came of it."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gemma_tune import console
from gemma_tune.commands.figures import figures
from gemma_tune.commands.report import reported
from gemma_tune.errors import UserError
from gemma_tune.launch.parent import follow_launcher
from gemma_tune.launch.world import check_world
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import launch_of, named_machine, overruled, probe
from gemma_tune.plan.memory import total
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.stages import unit
from gemma_tune.plan.starts import rewards_of, start_of
from gemma_tune.plan.types import Plan
from gemma_tune.recipe import yaml
from gemma_tune.recipe.reader import read_recipe_text

if TYPE_CHECKING:
    from gemma_tune.train.session import Resume

SHOWN_CHARACTERS = 160
"""Of an answer in the table; samples.jsonl has all of it."""


def run(stage: str, recipe: str, overrides: list[str], resume: Resume = "never", machine: str | None = None) -> int:
    """Train what `recipe` says and print what came of it, base and tuned side by side.

    Args:
        stage: the command; the recipe's `stage` must be the same.
        recipe: path of the recipe.
        overrides: `a.b=c`, in order.
        resume: `never`, `auto` or `must`.
        machine: plan for a machine of the table instead of this one; for tests.

    Raises:
        UserError: the recipe, or that it is for another command.
        AccessError: another number of processes came than was asked for.
        Stopped: the launcher is gone.
    """
    import os

    follow_launcher(os.environ)
    check_world(os.environ)
    text = yaml.decode(yaml.read_bytes(recipe), recipe)
    read = read_recipe_text(text, recipe, overrides)
    check_stage(read.stage, stage, recipe)
    family, shape = model_facts(read.model.name, read.model.revision)
    start, rewards = start_of(read, family), rewards_of(read, family)
    from gemma_tune.models.remedies import import_bitsandbytes
    from gemma_tune.train.session import RunFolder, is_first_process

    first = is_first_process()
    RunFolder(read.output, resume=resume, writes=first).check()  # before anything slow: libraries, data and weights
    launch = launch_of(os.environ)
    for name in overruled(os.environ):
        del os.environ[name]
    here = named_machine(machine) if machine else probe(launch.world_size, launch.nodes)
    plan = make_plan(read, here, shape, family, start=start, rewards=rewards, launch=launch)
    require_fit(plan)
    if first:
        console.out(summary(plan))
        for note in plan.notes:
            console.note(note)
    quieten()
    import_bitsandbytes()  # before trl and peft, which would import it their way
    with nullcontext() if read.tracking.wandb else unseen("wandb"):
        from gemma_tune.train.run import run_plan, stage_of

        stage_of(plan)  # imports the module of its trainer

    folder = Path(read.output)
    with reported(folder) if first else nullcontext():
        results = run_plan(plan, text, resume=resume, console=console.stdout())
        if first:
            report(stage, results, folder)
    return 0


def check_stage(written: str, stage: str, recipe: str) -> None:
    """Refuse a recipe that is for another command.

    Raises:
        UserError: its stage is not the one of the command.
    """
    if written != stage:
        raise UserError(
            f"this recipe is for gemma-tune {written}: its stage is {written}",
            where=recipe,
            fix=f"gemma-tune {written} {shlex.quote(recipe)}",
        )


def summary(plan: Plan) -> str:
    """The plan in two lines; `gemma-tune check` has all of it."""
    model, lora, trainer, data = (plan.values(name) for name in ("model", "lora", "trainer", "data"))
    how = plan.values("quantization")
    held = "nf4" if how.get("load_in_4bit") else "int8" if how.get("load_in_8bit") else model["dtype"]
    trained = f"LoRA r={lora['r']}" if lora else "all weights"
    micro, accumulation = trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]
    processes = plan.machine.get("world_size", 1)
    need = total(plan.memory) / 2**30
    begun = plan.values("session")["adapter"]
    if begun["start"]:
        trained += f" {'on from' if begun['mode'] == 'continue' else 'on top of'} {begun['start']}"
    length = f"{data['max_length']} tokens {'a row' if plan.stage == 'sft' else 'a prompt with its answer'}"
    if plan.stage == "ppo":
        length = f"{data['max_length']} tokens a prompt and {trainer['max_new_tokens']} a response"
    return (
        f"{model['name']} in {held}, {trained}, on {plan.machine['name']}: about {need:.1f} GiB\n"
        f"batch {micro * accumulation * processes} = {micro} {unit(plan.stage)}s x {accumulation} steps x "
        f"{processes} processes, {length}, learning rate {trainer['learning_rate']:g}"
    )


@contextmanager
def unseen(name: str) -> Iterator[None]:
    """Let libraries that are imported here believe that package `name` is not installed.

    TRL imports W&B wherever it finds it, which costs a second and is nothing that a run without it asked for.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = cast(Any, None)  # what `find_spec` takes for "not there"
    try:
        yield
    finally:
        del sys.modules[name]


def quieten() -> None:
    """Keep library chatter out of the output: what matters in it we check and say ourselves."""
    import datasets

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    datasets.disable_progress_bars()
    for name in ("transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


# --- the end --------------------------------------------------------------------------------------------------------


def report(stage: str, results: Mapping[str, Any], folder: Path) -> None:
    """Answers of base and tuned model side by side, the held-out figures, and where things are."""
    print_answers(results.get("answers", []))
    for line in figures(stage, results):
        console.out(line)
    if "weights" in results:
        console.out(f"result: {folder / results['weights']['folder']}")
    if stage == "reward":
        console.out(f"rate answers with it: gemma_tune.models.reward.load_reward({str(folder)!r})")
    else:
        console.out(f"talk to it: gemma-tune chat {shlex.quote(str(folder))}")


def print_answers(answers: list[Mapping[str, Any]]) -> None:
    """A table on a terminal; one line a text where the reader is a file or a pipe."""
    if not answers:
        return
    names = [name for name in ("base", "tuned") if any(name in row for row in answers)]
    if not console.stdout().is_terminal:
        for row in answers:
            console.out(f"prompt: {shown(row['prompt'])}")
            for name in names:
                console.out(f"  {name}: {shown(spoken(row.get(name)))}")
        return
    from rich.table import Table

    table = Table("prompt", *names, show_lines=True)
    for row in answers:
        table.add_row(*(shown(text) for text in (row["prompt"], *(spoken(row.get(name)) for name in names))))
    console.out(table)


def spoken(answer: Mapping[str, Any] | None) -> str:
    """An answer, with a mark where it did not end by itself."""
    if answer is None:
        return "-"
    return answer["text"] + ("" if answer["ended"] else " [cut]")


def shown(text: str) -> str:
    line = console.printable(" ".join(text.split()))
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."
