"""`gemma-tune push`: a run, or what merge or export wrote, to a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from gemma_tune import __version__, console
from gemma_tune.errors import UserError


def run(target: str, repo: str, private: bool = False, revision: str | None = None, message: str | None = None) -> int:
    """Upload `target` and print where it is.

    Args:
        target: run folder, or a folder that merge or export wrote.
        repo: `account/name`.
        private: make the repository private.
        revision: branch; None for main.
        message: of the commit; None for one of ours.

    Raises:
        UserError, AccessError: see `export.push.push`.
    """
    from gemma_tune.export.push import check_repo, push

    check_repo(repo)
    folder, papers = _find(Path(target).expanduser())
    said = message or f"Upload of {folder.absolute().name}, made with gemma-tune {__version__}"
    url = push(folder, repo, private=private, revision=revision, message=said, papers=papers)
    console.out(f"pushed {console.printable(folder)} to {console.printable(url)}")
    return 0


def _find(target: Path) -> tuple[Path, dict[str, str]]:
    """The folder that goes up, and for a run the papers that it gets on the way."""
    from gemma_tune.export.papers import make_papers, recorded_subject

    if not target.is_dir():
        raise UserError("there is no such folder", where=str(target), fix="give a run, or what merge or export wrote")
    run_folder = _run_of(target)
    if run_folder is None:
        return target, {}
    subject = recorded_subject(run_folder)
    kind, folder = ("adapter", subject.adapters[0].folder) if subject.adapters else ("merged", run_folder / "model")
    return folder, make_papers(subject, kind=kind, facts={})  # type: ignore[arg-type]


def _run_of(target: Path) -> Path | None:
    if (target / "run.json").is_file():
        return target
    above = target.absolute().parent
    return above if target.absolute().name in ("adapter", "model") and (above / "run.json").is_file() else None
