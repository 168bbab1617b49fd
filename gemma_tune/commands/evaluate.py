"""`gemma-tune eval`: what a run or a model is worth, on the terminal and as evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.figures import held_out
from gemma_tune.commands.train import print_answers, quieten, unseen
from gemma_tune.errors import AccessError, UserError
from gemma_tune.export.card_results import FIGURES

if TYPE_CHECKING:
    from gemma_tune.evaluation.target import Target
    from gemma_tune.plan.types import Plan


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options of the command. Of tasks, suite, memorisation and compare, what is wanted replaces the default."""

    compare: bool = False
    recipe: str | None = None
    tasks: tuple[str, ...] = ()
    suite: str | None = None
    include_path: str | None = None
    shots: int | None = None
    limit: int | None = None
    memorisation: bool = False
    base: bool = True
    max_new_tokens: int | None = None
    output: str | None = None
    as_json: bool = False
    chat: bool | None = None

    @property
    def held_out(self) -> bool:
        """Whether held-out rows and answers are wanted: where nothing else is asked for."""
        return not (self.compare or self.tasks or self.suite or self.memorisation)


def run(targets: Sequence[str], wanted: Wanted) -> int:
    """Evaluate each of `targets`, or compare two of them; print, and write evaluation.json.

    Raises:
        UserError: options that do not go together, or a target that cannot be evaluated so.
        AccessError: the hub, or a package that is missing.
    """
    check_options(targets, wanted)
    quieten()
    from gemma_tune.models.remedies import import_bitsandbytes

    import_bitsandbytes()  # before trl and peft, which would import it their way
    with unseen("wandb"):
        from gemma_tune.evaluation.result import read
        from gemma_tune.evaluation.target import find_target
    found = [find_target(name) for name in targets]
    for target in found:
        check_kind(target, wanted)
        read(file_of(target, wanted))  # what is there must be an evaluation: said before anything is measured
    recipe = read_plan_of(wanted.recipe) if wanted.recipe else None
    with memory_errors():
        if wanted.compare:
            documents = [compare(found[0], found[1], recipe, wanted)]
        else:
            documents = [evaluate(target, recipe, wanted) for target in found]
    if wanted.as_json:
        print(json.dumps(documents if len(documents) > 1 else documents[0], indent=2, ensure_ascii=False))
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


def check_options(targets: Sequence[str], wanted: Wanted) -> None:
    """Refuse options that would do nothing, before anything is opened.

    Raises:
        UserError: see the text.
    """
    tasked = bool(wanted.tasks or wanted.suite)
    leave_out, alone = "name one of them, or leave it out", wanted.compare and (tasked or wanted.memorisation)
    broken: dict[str, list[tuple[bool, str, str]]] = {
        "--compare": [
            (wanted.compare and len(targets) != 2, f"needs two targets, and {len(targets)} came", "name RUN_A RUN_B"),
            (alone, "compares held-out rows, and task items measured before", "evaluate each with --tasks first"),
        ],
        "--output": [
            (
                bool(wanted.output) and len(targets) > 1 and not wanted.compare,
                "is one file for several targets",
                "evaluate them one by one",
            ),
            (bool(wanted.output) and Path(str(wanted.output)).is_dir(), "is a folder", "name a file in it"),
        ],
        "--shots": [(wanted.shots is not None and not wanted.tasks, "is for --tasks", "name tasks, or leave it out")],
        "--include-path": [(wanted.include_path is not None and not tasked, "is for --tasks and --suite", leave_out)],
        "--chat": [(wanted.chat is not None and not tasked, "is for --tasks and --suite", leave_out)],
        "--recipe": [
            (
                wanted.recipe is not None and (tasked or wanted.memorisation),
                "is for held-out rows",
                "leave it out, or leave out --tasks, --suite and --memorisation",
            )
        ],
    }
    for where, rules in broken.items():
        for applies, what, fix in rules:
            if applies:
                raise UserError(what, where=where, fix=fix)


def check_kind(target: Target, wanted: Wanted) -> None:
    """The target can give what is asked of it.

    Raises:
        UserError: a reward model is asked for answers; or there is no run to audit.
    """
    if target.is_reward and (wanted.tasks or wanted.suite or wanted.memorisation or wanted.max_new_tokens):
        raise UserError(
            "this is a reward model: it rates answers and gives none",
            where=target.name,
            fix="evaluate it without --tasks, --suite, --memorisation and --max-new-tokens: on its held-out pairs",
        )
    if wanted.memorisation and (target.folder is None or target.plan is None):
        raise UserError(
            "memorisation is about training rows, and only a run says which those are",
            where=target.name,
            fix="name the run folder",
        )


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
    """Whether tasks are asked as a user asks: an untouched base, and a model of plain texts, are asked to go on."""
    if target.plan is not None and target.plan.values("data").get("train_on") == "all":
        return any(source.get("format") != "text" for source in target.plan.values("data")["sources"])
    return target.tuned or target.name.rstrip("/").endswith("-it")


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
    """Write what was found and, unless JSON is wanted, print it."""
    from gemma_tune.evaluation.result import write

    file = file_of(target, wanted)
    document = write(file, target.subject(), parts, rows)
    if not wanted.as_json:
        print_answers(list(parts.get("answers", ())))
        for line in said:
            console.out(line)
        console.out(f"written: {file}")
    return document


def file_of(target: Target, wanted: Wanted) -> Path:
    """Where the evaluation of a target goes."""
    return Path(wanted.output).expanduser() if wanted.output else target.file


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
