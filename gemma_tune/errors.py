"""The error tree: every failure a user can meet, with its place and its remedy.

    GemmaTuneError (exit 1: a bug of ours)
    |-- UserError        (exit 2: the user's input: recipe, data, command line, wrong kind of model)
    |-- AccessError      (exit 3: environment or access: hardware, disk, network, gated model)
    |-- TrainingError    (exit 4: the training failed: non-finite loss, out of memory, damaged checkpoint)
    |   `-- LostProcess  (the same: of several processes another one is gone)
    |-- Stopped          (exit 75: stopped by a signal, a checkpoint is on disk; EX_TEMPFAIL of sysexits.h)
    `-- Aborted          (exit 130: second Ctrl-C, nothing was saved after it)

A message has three parts: what happened, where (``file:line``, key path, dataset row), and what to do next (`fix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: `what` happened, `where` (empty when it has no place), and the `fix` (empty when unknown)."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  fix: {self.fix}" if self.fix else head


class GemmaTuneError(Exception):
    """Base of all errors that are shown to the user without a traceback.

    Args:
        what: what happened, one sentence.
        where: `file:line`, key path or dataset row; empty when there is none.
        fix: what to do next; empty when nothing can be advised.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "", problems: Sequence[Problem] = ()) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems) or (Problem(what, where, fix),)
        super().__init__("\n".join(map(str, self.problems)))

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> GemmaTuneError:
        """One error that reports all `problems` (at least one) at once."""
        return cls(problems[0].what, problems=problems)


class UserError(GemmaTuneError):
    """The recipe, the data or the command line is wrong."""

    exit_code = 2


class AccessError(GemmaTuneError):
    """The machine, the disk, the network or a licence gate stands in the way."""

    exit_code = 3


class TrainingError(GemmaTuneError):
    """The training itself failed."""

    exit_code = 4


class LostProcess(TrainingError):
    """Another process of the run is gone. What it said, or what its launcher says of it, is the reason."""


class Stopped(GemmaTuneError):
    """A signal asked us to stop; a checkpoint was written and the same command continues."""

    exit_code = 75


class Aborted(GemmaTuneError):
    """A second Ctrl-C: stopped at once."""

    exit_code = 130
