"""The options of `gemma-tune eval`, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.errors import UserError
from gemma_tune.plan.machine import world_size_of

if TYPE_CHECKING:
    from gemma_tune.evaluation.target import Target


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


def check_options(targets: Sequence[str], wanted: Wanted) -> None:
    """Refuse options that would do nothing, before anything is opened.

    Raises:
        UserError: see the text.
    """
    tasked = bool(wanted.tasks or wanted.suite)
    answered = "leave it out, or leave out --tasks, --suite and --memorisation"
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
                answered,
            )
        ],
        "--max-new-tokens": [
            (wanted.max_new_tokens is not None and (tasked or wanted.memorisation), "is for fixed prompts", answered)
        ],
        "--no-base": [(not wanted.base and not wanted.held_out, "is for held-out rows and answers", leave_out)],
    }
    for where, rules in broken.items():
        for applies, what, fix in rules:
            if applies:
                raise UserError(what, where=where, fix=fix)


def check_alone(environment: Mapping[str, str]) -> None:
    """Refuse to be one of several processes, which would measure the same and write one file.

    Raises:
        UserError: a launcher started several.
        AccessError: WORLD_SIZE is no number.
    """
    if (size := world_size_of(environment)) > 1:
        raise UserError(
            f"an evaluation is one process, and {size} were started",
            where="WORLD_SIZE",
            fix="start gemma-tune eval without torchrun and accelerate; it uses the first GPU",
        )


def check_files(targets: Sequence[Target], wanted: Wanted) -> None:
    """Each target has a file of its own: adapters of two runs may have one name.

    Raises:
        UserError: two targets would be written into one file.
    """
    owners: dict[Path, Target] = {}
    for target in () if wanted.compare else targets:
        other = owners.setdefault(file_of(target, wanted).absolute(), target)
        if other is not target:
            raise UserError(
                f"its evaluation would be written over that of {other.name}, into {file_of(target, wanted)}",
                where=target.name,
                fix="evaluate them one by one, each with --output FILE",
            )


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


def file_of(target: Target, wanted: Wanted) -> Path:
    """Where the evaluation of a target goes."""
    return Path(wanted.output).expanduser() if wanted.output else target.file
