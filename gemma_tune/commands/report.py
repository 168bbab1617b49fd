"""`gemma-tune report`: report.html of a run, again. Trainings and `eval` write it at their end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_tune import console
from gemma_tune.errors import Aborted, AccessError, GemmaTuneError, UserError


def run(folder: str, output: str | None) -> int:
    """Write the report of the run in `folder` and print where it is.

    Args:
        folder: a run folder.
        output: the file to write; by default report.html in the run folder.

    Raises:
        UserError: there is no run here, or `output` is a folder.
        AccessError: the file cannot be written.
    """
    from gemma_tune.report import write_report

    target = Path(output) if output else None
    if target is not None and target.is_dir():
        raise UserError("is a folder", where=output or "", fix=f"name a file: --output {output}/report.html")
    if target is not None and not target.absolute().parent.is_dir():
        raise UserError("this folder does not exist", where=str(target.parent), fix="make it, or name another file")
    try:
        console.out(f"report: {write_report(Path(folder), target)}")
    except OSError as exc:
        where = target or Path(folder)
        raise AccessError(
            f"the report cannot be written: {exc.strerror or exc}",
            where=str(where),
            fix="free some space, or write it elsewhere: --output FILE",
        ) from exc
    return 0


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Write the report of the run that goes on inside when it ends, finished, stopped or failed, and print where it is.

    A report that cannot be made is a note, not an error: the run's own outcome is what its exit code says. A run that
    fails before it opened its folder has none, since the folder may be another run's; and who presses Ctrl-C a second
    time waits for nothing.

    Args:
        folder: the run folder.
    """
    before = _version(folder)
    try:
        yield
    except Exception as exc:
        if not isinstance(exc, Aborted) and _version(folder) != before:
            write_again(folder)
        raise
    write_again(folder)


def write_again(folder: Path, *, quiet: bool = False) -> None:
    """Write the report of the run in `folder`, and print where it is or, as a note, why there is none.

    Args:
        quiet: whether only the note is printed, where stdout is for JSON.
    """
    try:
        from gemma_tune.report import write_report

        file = write_report(folder)
        if not quiet:
            console.out(f"report: {file}")
    except Exception as exc:  # of any kind: what it is about is done
        reason = str(exc) if isinstance(exc, GemmaTuneError | OSError) else f"{type(exc).__name__}: {exc}"
        console.note(f"no report was written ({reason}); try again with: gemma-tune report {folder}")


def _version(folder: Path) -> tuple[int, int] | None:
    """Tells one run.json from the next, which replaces it as a new file; None where there is none."""
    try:
        facts = (folder / "run.json").stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns
