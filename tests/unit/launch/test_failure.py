"""What ends a run of several processes: the first failure, its rank, its exit code."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

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
from gemma_tune.launch.failure import FILE, Failure, as_error, first, read_failure, read_folder, report_failure


def reported(error: GemmaTuneError, path: Path, when: float = 100.5) -> dict[str, object]:
    """The document that a process leaves when it fails with `error`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        raise error
    except GemmaTuneError as caught:
        assert report_failure(caught, {FILE: str(path)}, when)
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("kind", [GemmaTuneError, UserError, AccessError, TrainingError, Stopped, Aborted])
def test_an_error_crosses_from_a_process_to_its_launcher(kind: type[GemmaTuneError], tmp_path: Path) -> None:
    error = kind.of([Problem("what", "where:3", "fix"), Problem("another")])
    failure = read_failure(3, reported(error, tmp_path / "error.json"), code=1, when=999.0, pid=7)
    assert (failure.code, failure.when) == (kind.exit_code, 100.5)
    told = as_error(failure, "gpu7")
    assert type(told) is kind and told.exit_code == kind.exit_code
    rank = "" if kind is Stopped else "rank 3 on gpu7: "
    assert told.problems[0] == Problem("what", f"{rank}where:3", "fix")
    assert told.problems[1].where == ("" if kind is Stopped else "rank 3 on gpu7")
    assert not failure.lost
    lost = LostProcess("a process of this run is gone")
    assert read_failure(0, reported(lost, tmp_path / "lost.json"), code=4, when=0.0).lost
    assert any("in reported" in note for note in told.__notes__), "--debug shows the traceback of the process"


def test_torchs_own_agent_understands_what_is_left(tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    reported(UserError("no such key", where="r.yaml:3"), tmp_path / "error.json", when=1_700_000_000.25)
    left = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert left.timestamp == 1_700_000_000
    assert "r.yaml:3: no such key" in str(ChildFailedError("gemma_tune", {0: left}))
    assert read_failure(0, left.error_file_data, code=left.exitcode, when=left.timestamp).when == 1_700_000_000.25


def test_nothing_is_left_where_nobody_asks_or_can_read(tmp_path: Path) -> None:
    assert not report_failure(UserError("x"), {}, 0.0)
    assert not report_failure(UserError("x"), {FILE: str(tmp_path / "none" / "error.json")}, 0.0)


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (signal.SIGKILL, TrainingError, "killed by SIGKILL (process 7): mostly the system, for want of memory"),
        (signal.SIGSEGV, TrainingError, "killed by SIGSEGV"),
        (signal.SIGTERM, Stopped, "stopped by SIGTERM"),
        (signal.SIGUSR1, Stopped, "stopped by SIGUSR1"),
        (64, TrainingError, "killed by signal 64"),
    ],
)
def test_a_process_that_was_killed_is_named_with_host_and_signal(
    number: int, kind: type[GemmaTuneError], text: str
) -> None:
    error = as_error(read_failure(1, {}, code=-number, when=0.0, pid=7), "gpu7")
    if number == 64 and text not in str(error):
        text = "killed by SIGRTMAX"  # Linux has a name for it
    assert type(error) is kind and str(error).startswith(f"rank 1 on gpu7: {text}")
    assert "--resume auto" in str(error)


@pytest.mark.parametrize(("code", "kind"), [(1, GemmaTuneError), (2, UserError), (75, Stopped), (42, TrainingError)])
def test_an_exit_without_a_message_keeps_its_code_or_is_a_failed_training(
    code: int, kind: type[GemmaTuneError]
) -> None:
    error = as_error(Failure(0, code, 0.0), "h")
    assert type(error) is kind and f"exit code {code}" in str(error)


def message(rank: int, code: int, when: float) -> Failure:
    return Failure(rank, code, when, (Problem("m"),))


@pytest.mark.parametrize(
    ("failures", "rank"),
    [
        # A lost neighbour is noticed by the others before the agent notices the death (whole seconds, one poll later).
        ([message(0, 4, 100.95), Failure(1, -signal.SIGKILL, 101)], 1),
        # The agent's own SIGKILL comes half a minute after the failure that it follows.
        ([message(0, 4, 100.95), Failure(1, -signal.SIGKILL, 131)], 0),
        # The agent's SIGTERM meets a process that had no handler yet, within the same second.
        ([message(0, 2, 100.95), Failure(1, -signal.SIGTERM, 100)], 0),
        ([message(0, 1, 100.9), message(1, 3, 100.2)], 1),
        ([message(0, 75, 105.0), message(1, 4, 100.2)], 1),
        ([Failure(0, 1, 100), message(1, 4, 100.5)], 1),
        ([Failure(0, 4, 100.0, (Problem("m"),), lost=True), message(1, 2, 100.4)], 1),
    ],
)
def test_the_first_failure_is_the_one_that_is_told(failures: list[Failure], rank: int) -> None:
    assert first(failures).rank == rank
    assert first(failures[::-1]).rank == rank


def test_the_files_of_a_machines_processes_are_read_with_their_global_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "none_abc" / "attempt_0"
    reported(Stopped("stopped by SIGTERM"), folder / "0" / "error.json")
    reported(UserError("bad"), folder / "1" / "error.json")
    (folder / "2").mkdir()
    (folder / "2" / "error.json").write_text("{half")
    assert [(failure.rank, failure.code) for failure in read_folder(tmp_path, base=4)] == [(4, 75), (5, 2)]
