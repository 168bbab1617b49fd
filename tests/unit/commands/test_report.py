"""`gemma-tune report`, and the report at the end of a training: never instead of the run's own outcome."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune import report as reports
from gemma_tune.cli import main
from gemma_tune.commands.report import reported
from gemma_tune.errors import Aborted, Stopped, TrainingError, UserError
from tests.unit.report.rig import make_run


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert main(["report", str(run), "--output", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").read_bytes() == (run / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no run.json"),
        (["run", "--output", "run"], "is a folder"),
        (["run", "--output", "gone/report.html"], "does not exist"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "fix:" in error


def test_a_finished_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with reported(tmp_path / "run"):
        make_run(tmp_path / "run")
    assert capsys.readouterr().out == f"report: {tmp_path / 'run' / 'report.html'}\n"


@pytest.mark.parametrize(
    "failure", [TrainingError("the loss is not finite"), Stopped("by a signal"), ValueError("bug")]
)
def test_a_run_that_failed_or_was_stopped_is_reported_and_fails_as_before(tmp_path: Path, failure: Exception) -> None:
    run = make_run(tmp_path / "run", status="running")
    with pytest.raises(type(failure)) as caught, reported(run):
        make_run(run, status="failed")
        raise failure
    assert caught.value is failure
    assert "failed after 60 steps" in (run / "report.html").read_text(encoding="utf-8")


def test_another_runs_folder_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError), reported(run):
        raise UserError("the run in the output folder was made of something else")
    assert not (run / "report.html").exists()


def test_a_second_interrupt_waits_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(Aborted), reported(tmp_path / "run"):
        make_run(tmp_path / "run")
        raise Aborted("twice")
    assert not (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyError("a bug of ours")])
def test_a_report_that_cannot_be_made_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: Exception
) -> None:
    def broken(*_: object) -> Path:
        raise failure

    monkeypatch.setattr(reports, "write_report", broken)
    with reported(tmp_path / "run"):
        make_run(tmp_path / "run")
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("note: no report was written")
    assert (
        "No space" in printed.err or "KeyError: 'a bug of ours'" in printed.err
    ) and "gemma-tune report" in printed.err
