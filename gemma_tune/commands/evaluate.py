"""`gemma-tune eval`: what a run or a model is worth, on the terminal and as evaluation.json."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.evaluate_options import Wanted, check_alone, check_files, check_kind, check_options, file_of
from gemma_tune.commands.figures import held_out
from gemma_tune.commands.report import write_again
from gemma_tune.commands.train import print_answers, quieten, unseen
from gemma_tune.errors import AccessError
from gemma_tune.export.card_results import FIGURES
from gemma_tune.gemma.licences import last_name

if TYPE_CHECKING:
    from gemma_tune.evaluation.target import Target
    from gemma_tune.plan.types import Plan

_TUNED_TO_ANSWER = re.compile(r"-it(?![a-z0-9])", re.IGNORECASE)
"""In the name of a published Gemma."""


def run(targets: Sequence[str], wanted: Wanted) -> int:
    """Evaluate each of `targets`, or compare two of them; print, and write evaluation.json.

    Raises:
        UserError: options that do not go together, or a target that cannot be evaluated so.
        AccessError: the hub, or a package that is missing.
    """
    check_options(targets, wanted)
    check_alone(os.environ)
    quieten()
    from gemma_tune.models.remedies import import_bitsandbytes
    from gemma_tune.train.session import dump

    import_bitsandbytes()  # before trl and peft, which would import it their way
    with unseen("wandb"):
        from gemma_tune.evaluation.result import check_writable, read
        from gemma_tune.evaluation.target import find_target
    found = [find_target(name) for name in targets]
    for target in found:
        check_kind(target, wanted)
        read(file_of(target, wanted))  # what is there must be an evaluation: said before anything is measured
        check_writable(file_of(target, wanted))
    check_files(found, wanted)
    recipe = read_plan_of(wanted.recipe) if wanted.recipe else None
    with memory_errors():
        if wanted.compare:
            documents = [compare(found[0], found[1], recipe, wanted)]
        else:
            documents = []
            for target in found:
                documents.append(evaluate(target, recipe, wanted))
                gc.collect()  # an adapter's model refers to itself: the next one need not fit beside it
    if wanted.as_json:
        print(dump(documents if len(documents) > 1 else documents[0]), end="")
    return 0


@contextmanager
def memory_errors() -> Iterator[None]:
    """Say what to do where a GPU is too small."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise AccessError(
            "the GPU has not enough memory for this",
            where=str(exc).splitlines()[0][:200] if str(exc) else "",
            fix="end what else is on it; or set CUDA_VISIBLE_DEVICES= to evaluate on the CPU, which takes its time",
        ) from exc


def read_plan_of(recipe: str) -> Plan:
    """The plan of a recipe, for its data: which rows, which of them are held out, what is asked.

    Its adapter is not looked for, and it need not fit into this machine: nothing is trained.
    """
    from gemma_tune.plan.facts import model_facts
    from gemma_tune.plan.machine import probe
    from gemma_tune.plan.plan import make_plan
    from gemma_tune.plan.starts import rewards_of
    from gemma_tune.recipe.reader import read_recipe

    read = read_recipe(recipe, ["model.adapter=null"])
    family, shape = model_facts(read.model.name, read.model.revision)
    return make_plan(read, probe(1, 1), shape, family, start=None, rewards=rewards_of(read, family))


# --- what is measured


def evaluate(target: Target, recipe: Plan | None, wanted: Wanted) -> dict[str, Any]:
    """Measure, print and write one target; returns its evaluation.json."""
    if wanted.held_out:
        from gemma_tune.evaluation.measure import measure

        parts, rows = measure(
            target, recipe, base=wanted.base, limit=wanted.limit, max_new_tokens=wanted.max_new_tokens
        )
        said = [*held_out_lines(parts["held_out"]), *reward_lines(parts)]
        return finish(target, parts, rows, said, wanted)
    from gemma_tune.evaluation.target import open_target

    opened = open_target(target)
    asked = (opened.model, opened.tokenizer, opened.family)
    parts, rows, said = {}, [], []
    chat = talks(target) if wanted.chat is None else wanted.chat
    if wanted.tasks:
        from gemma_tune.evaluation import harness

        found = harness.run_tasks(
            *asked, wanted.tasks, include_path=wanted.include_path, shots=wanted.shots, limit=wanted.limit, chat=chat
        )
        rows += found.pop("rows", [])
        said += harness.render(found)
        parts["tasks"] = found
    if wanted.suite:
        from gemma_tune.evaluation import suite

        found = suite.run_suite(*asked, wanted.suite, limit=wanted.limit, include_path=wanted.include_path, chat=chat)
        rows += found.pop("rows", [])
        said += suite.render(found)
        parts["tasks"] = {**parts.get("tasks", {}), **found}
    if wanted.memorisation:
        from gemma_tune.evaluation import memorisation

        assert target.folder is not None
        found = memorisation.audit(*asked, target.folder, limit=wanted.limit)
        said += memorisation.render(found)
        parts["memorisation"] = found
    return finish(target, parts, rows, said, wanted)


def talks(target: Target) -> bool:
    """Whether tasks are asked as a user asks: an untouched base, and a model of plain texts, are asked to go on.

    Of an untouched model its name tells: `gemma-3-1b-it`, `gemma-3-4b-it-qat-q4_0`, `gemma-3-1b-it-Q4_K_M.gguf`.
    """
    if target.plan is not None:
        return any(source.get("format") != "text" for source in target.plan.values("data")["sources"])
    return target.tuned or _TUNED_TO_ANSWER.search(last_name(target.name.rstrip("/"))) is not None


def compare(a: Target, b: Target, recipe: Plan | None, wanted: Wanted) -> dict[str, Any]:
    """Compare two targets on the same rows; what is found goes into the evaluation of the first."""
    from gemma_tune.evaluation import compare as pair
    from gemma_tune.evaluation.measure import rows_for
    from gemma_tune.evaluation.target import open_target

    pair.check_two(a, b)
    opened = open_target(a, recipe)
    rows = rows_for(a, opened, recipe, limit=wanted.limit, max_new_tokens=wanted.max_new_tokens)
    found = pair.compare(a, b, opened, rows)
    return finish(a, {"comparison": found}, [], pair.render(found), wanted)


def finish(
    target: Target, parts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], said: Sequence[str], wanted: Wanted
) -> dict[str, Any]:
    """Write what was found, make the report of a run again and, unless JSON is wanted, print it."""
    from gemma_tune.evaluation.result import write

    file = file_of(target, wanted)
    document = write(file, target.subject(), parts, rows)
    if not wanted.as_json:
        print_answers(list(parts.get("answers", ())))
        for line in said:
            console.out(line)
        console.out(f"written: {file}")
    if target.folder is not None and file == target.file:
        write_again(target.folder, quiet=wanted.as_json)
    return document


# --- lines


def held_out_lines(part: Mapping[str, Any]) -> list[str]:
    """The held-out figures, as a training prints them where both sides are there."""
    stage, base, tuned = part["stage"], part.get("base") or {}, part.get("tuned") or {}
    lines = []
    if base and tuned:
        results = {"base": base, "tuned": tuned}
        if base.get("loss") and tuned.get("loss") is not None:
            results["relative_fall"] = (base["loss"] - tuned["loss"]) / base["loss"]
        lines = held_out(stage, results)
    elif one := base or tuned:
        shown = [f"{name} {_number(one[key])}" for key, name in FIGURES[stage].items() if one.get(key) is not None]
        counted = f"{part['rows']:,} {'pairs' if stage in ('reward', 'dpo') else 'rows'}"
        lines = [f"held out, {counted}: {', '.join(shown)}"] if shown else []
    return [*lines, *_answer_lines(base, tuned)]


def reward_lines(parts: Mapping[str, Any]) -> list[str]:
    """A reward model's own lines; the accuracy and the margin stand in them."""
    if "reward" not in parts:
        return []
    from gemma_tune.evaluation.rewards import render

    return render(parts["reward"])


def _answer_lines(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    sides = [one for one in (base, tuned) if one.get("answers")]
    if not sides:
        return []
    count = sides[-1]["answers"]
    formed = " -> ".join(str(round(one["format_rate"] * one["answers"])) for one in sides)
    lines = [
        f"answers that end by themselves: {' -> '.join(str(one['ended']) for one in sides)} of {count} prompts",
        f"answers that are well-formed: {formed} of {count} prompts",
    ]
    found = sides[-1].get("format_faults") or {}
    if found:
        lines[-1] += f"; faults: {', '.join(f'{name} {number}' for name, number in found.items())}"
    return lines


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
