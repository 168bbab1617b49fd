"""What a process leaves for its launcher when it fails, and what the launcher makes of it.

torch's agent gives each process a file to report in (TORCHELASTIC_ERROR_FILE). Its form is torch's
(torch/distributed/elastic/multiprocessing/errors/error_handler.py), so that torchrun shows the message as well; under
our own key are the exit code, the time in fractions of a second, and the message in its three parts. Who was killed
leaves nothing, and torch says which signal it was.
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import (
    Aborted,
    AccessError,
    GemmaTuneError,
    LostProcess,
    Problem,
    Stopped,
    TrainingError,
    UserError,
)

FILE = "TORCHELASTIC_ERROR_FILE"
_OURS = "gemma_tune"
_KINDS: dict[int, type[GemmaTuneError]] = {
    kind.exit_code: kind for kind in (UserError, AccessError, TrainingError, Stopped, Aborted)
}
_POLITE = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask to stop. Who dies of one had not reached the point yet from where it could save."""

_NOTICED_LATE = 10.0
"""Seconds. A killed process is noticed later than the failures of others that it causes; the agent itself kills only
after half a minute of waiting, so the two cannot be confused."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How one process ended.

    Attributes:
        rank: its global rank.
        code: exit code; negative is the signal that killed it.
        when: seconds since the epoch.
        problems: what it reported; empty where it could not.
        trace: its traceback.
        pid: process id.
        lost: it only noticed that another process was gone.
    """

    rank: int
    code: int
    when: float
    problems: tuple[Problem, ...] = ()
    trace: str = ""
    pid: int = 0
    lost: bool = False

    @property
    def killed(self) -> bool:
        return self.code < 0 and -self.code not in _POLITE


def report_failure(error: GemmaTuneError, environment: Mapping[str, str], when: float) -> bool:
    """Write `error`, which is being handled, where the launcher of this process will read it.

    Returns:
        Whether it is written. False where nobody gave this process such a file, or it cannot be written.
    """
    path = environment.get(FILE)
    if not path:
        return False
    trace = traceback.format_exc()
    document = {
        "message": {
            "message": str(error),
            "errorCode": error.exit_code,
            "extraInfo": {"py_callstack": trace, "timestamp": str(int(when))},
        },
        _OURS: {
            "code": error.exit_code,
            "when": when,
            "problems": [[problem.what, problem.where, problem.fix] for problem in error.problems],
            "trace": trace,
            "lost": isinstance(error, LostProcess),
        },
    }
    try:
        Path(path).write_text(json.dumps(document), encoding="utf-8")
    except OSError:
        return False
    return True


def read_failure(rank: int, document: Mapping[str, Any], *, code: int, when: float, pid: int = 0) -> Failure:
    """The failure of a process, from its file (empty where it left none) and from what the agent saw."""
    ours = document.get(_OURS)
    if not isinstance(ours, Mapping):
        return Failure(rank, code, when, pid=pid)
    problems = tuple(Problem(*parts) for parts in ours["problems"])
    return Failure(rank, int(ours["code"]), float(ours["when"]), problems, str(ours["trace"]), pid, bool(ours["lost"]))


def read_folder(folder: Path, base: int) -> list[Failure]:
    """What the processes of this machine left in `folder`: the files `RUN/attempt_N/RANK/error.json` of torch's agent.

    Used where the agent itself was stopped and therefore says nothing about them.

    Args:
        folder: the agent's log folder.
        base: rank of the first process of this machine.
    """
    failures = []
    for path in sorted(folder.rglob("error.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and _OURS in document:
            failures.append(read_failure(base + int(path.parent.name), document, code=1, when=0.0))
    return failures


def first(failures: Sequence[Failure]) -> Failure:
    """The failure that began it; the others are mostly its consequences: lost connections, and being told to stop."""

    def order(failure: Failure) -> float:
        if failure.killed:
            return failure.when - _NOTICED_LATE
        if failure.lost:
            return failure.when + _NOTICED_LATE
        return failure.when + (0.0 if failure.problems else 1.0)  # torch cuts its own times to whole seconds

    return min(failures, key=order)


def as_error(failure: Failure, host: str) -> GemmaTuneError:
    """The error that ends the launcher, with the exit code of the process that failed first."""
    who = f"rank {failure.rank} on {host}"
    if failure.code < 0 and not failure.problems:
        return _killed(failure, who)
    kind = _KINDS.get(failure.code, GemmaTuneError if failure.code == 1 else TrainingError)
    problems = [_told(problem, who, alone=kind is Stopped) for problem in failure.problems]
    if not problems:
        problems = [Problem(f"ended with exit code {failure.code} and no message", who, "its last lines are above")]
    error = kind.of(problems)
    if failure.trace:
        error.add_note(f"traceback of {who}:\n{failure.trace}")  # `--debug` prints it
    return error


def _told(problem: Problem, who: str, *, alone: bool) -> Problem:
    """A process's finding with its rank; a signal reaches all of them, and none has to be named."""
    where = problem.where if alone else f"{who}: {problem.where}" if problem.where else who
    return Problem(problem.what, where, problem.fix)


def _killed(failure: Failure, who: str) -> GemmaTuneError:
    number = -failure.code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if not failure.killed:
        return Stopped(
            f"stopped by {name}", where=who, fix="the same command with --resume auto starts or continues the run"
        )
    why = {
        "SIGKILL": "mostly the system, for want of memory (see dmesg), or the scheduler",
        "SIGSEGV": "a crash in native code: a driver, NCCL or a library",
        "SIGABRT": "a library gave up, mostly NCCL after its timeout; its last lines are above",
        "SIGBUS": "mostly a full /dev/shm",
    }.get(name, "")
    return TrainingError(
        f"killed by {name} (process {failure.pid})" + (f": {why}" if why else ""),
        where=who,
        fix="mend the cause; the same command with --resume auto goes on from the last checkpoint",
    )
