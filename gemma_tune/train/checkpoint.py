"""Checkpoints that are whole or absent, and never trusted unread.

    run/.staging-40/   every file of the checkpoint is written here
    run/checkpoint-40/ the same folder after one rename; COMPLETE.json lists size and sha256 of each file
    run/.trash-*/      on its way out

A crash at any moment leaves either the old state or the new one: files are flushed to the disk before the rename, the
parent folder after it. Reading checks every hash. Order is by step number, never by a file's date: a date changes when
anybody writes into an old checkpoint, and stock rotation then removes the newest one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.errors import AccessError, GemmaTuneError, TrainingError
from gemma_tune.models.modes import follow_umask

MANIFEST = "COMPLETE.json"
_FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BROKEN = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.ESTALE}


class Damaged(Exception):
    """A folder that is named like a checkpoint and must not be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: where it is.
        step: optimizer steps that were done.
        identity: what the run that wrote it was made of (`train.identity`).
        progress: counters that the trainer's own state does not hold (tokens seen, seconds trained).
    """

    folder: Path
    step: int
    identity: Mapping[str, Any]
    progress: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Search:
    """The newest verified checkpoint, None where there is none; and (folder, reason) of what was passed over."""

    found: Checkpoint | None
    skipped: tuple[tuple[Path, str], ...] = field(default=())


# --- writing --------------------------------------------------------------------------------------------------------


def save(
    run: Path,
    step: int,
    fill: Callable[[Path], None],
    *,
    identity: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> Path:
    """One process: stage, `fill(folder)`, commit. On any failure nothing but earlier checkpoints is left."""
    staging = open_staging(run, step)
    try:
        with disk_errors(run / f"checkpoint-{step}"):
            fill(staging)
            return commit(staging, run, step, identity=identity, progress=progress)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def open_staging(run: Path, step: int) -> Path:
    """An empty folder to write checkpoint `step` into."""
    staging = run / f".staging-{step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def commit(staging: Path, run: Path, step: int, *, identity: Mapping[str, Any], progress: Mapping[str, Any]) -> Path:
    """Turn a filled staging folder into `checkpoint-<step>`, in one rename. Returns its path."""
    seal(staging, {"step": step, "identity": dict(identity), "progress": dict(progress)})
    target = run / f"checkpoint-{step}"
    publish(staging, target)
    return target


def seal(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the manifest of `folder` (hashes, then `content`) and flush everything in it to the disk."""
    body = {"format": _FORMAT, **content, "files": hashes(folder)}
    body["self"] = _digest(body)
    (folder / MANIFEST).write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
    flush_all(folder)


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> `size` and `sha256` of every file below `folder`, but for the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }


def flush_all(folder: Path) -> None:
    """Flush every file below `folder`, then the folders. Modes follow the umask: safetensors leaves 0600."""
    below = sorted(folder.rglob("*"))
    files = [path for path in below if path.is_file()]
    follow_umask(files)
    for path in files:
        flush(path)
    for path in (*(path for path in below if path.is_dir()), folder):
        flush(path)


def publish(staging: Path, target: Path) -> None:
    """Rename a sealed folder to its final name. What stood there is moved away first and removed afterwards."""
    old = None
    if target.exists():
        old = _trash_name(target)
        os.rename(target, old)
    os.replace(staging, target)
    flush(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file by rename, so that a reader or a crash never meets half of it."""
    staging = path.with_name(f".{path.name}.new")
    with open(staging, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def rotate(run: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest checkpoints (at least 1), by step number. Returns what was removed."""
    doomed = [folder for _, folder in checkpoints(run)][max(keep, 1) :]
    for folder in doomed:
        trash = _trash_name(folder)
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
    return doomed


def set_aside_after(run: Path, step: int) -> list[Path]:
    """Rename every checkpoint above `step`: they were found damaged, and must not count as the newest any more."""
    aside = []
    for number, folder in checkpoints(run):
        if number > step:
            name = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(name, ignore_errors=True)
            os.rename(folder, name)
            aside.append(name)
    return aside


def sweep(run: Path) -> None:
    """Remove what a crash left half done. Only the process that holds the run's lock may call this."""
    for path in run.glob(".staging-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run.glob(".trash-*"):
        shutil.rmtree(path, ignore_errors=True)


# --- reading --------------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything that is named like a checkpoint, highest step first. Nothing is verified."""
    if not run.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir())
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def read(folder: Path) -> Checkpoint:
    """Verify every file of a checkpoint.

    Raises:
        Damaged: the manifest is missing or altered, or a file is missing, cut or altered.
    """
    body = verify(folder)
    return Checkpoint(folder, body["step"], body["identity"], body["progress"])


def verify(folder: Path) -> dict[str, Any]:
    """What `seal` wrote into the manifest of `folder`, once every file has been compared with it.

    Raises:
        Damaged: as `read`.
    """
    body = read_manifest(folder)
    for name, expected in body["files"].items():
        _check_file(folder / name, name, expected)
    return body


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote into the manifest of `folder`; the files themselves are not looked at.

    Raises:
        Damaged: it is missing, altered, or of another version.
    """
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing: the save never ended") from None
    except (OSError, ValueError) as exc:
        raise Damaged(f"{MANIFEST} cannot be read: {exc}") from None
    if not isinstance(body, dict) or body.pop("self", None) != _digest(body):
        raise Damaged(f"{MANIFEST} was altered")
    if body.get("format") != _FORMAT:
        raise Damaged(f"{MANIFEST} has format {body.get('format')!r}; this version reads {_FORMAT}")
    return dict(body)


def _check_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            raise Damaged(f"{name} has {size:,} bytes instead of {expected['size']:,}")
        if sha256_of(path) != expected["sha256"]:
            raise Damaged(f"{name} was altered: its sha256 differs")
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as exc:
        raise Damaged(f"{name} cannot be read: {exc}") from None


def newest(run: Path) -> Search:
    """The checkpoint with the highest step that verifies; damaged ones above it are listed with their reason."""
    skipped: list[tuple[Path, str]] = []
    for _, folder in checkpoints(run):
        try:
            return Search(read(folder), tuple(skipped))
        except Damaged as exc:
            skipped.append((folder, str(exc)))
    return Search(None, tuple(skipped))


# --- small parts ----------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(
    path: Path,
    error: type[GemmaTuneError] = TrainingError,
    fix: str = "make room, or set `output` to a larger disk; then run the same command with --resume auto",
) -> Iterator[None]:
    """Name the disk in what torch, safetensors and Python say about a full or unwritable one; the rest passes through.

    torch reports a full disk as `RuntimeError: basic_ios::clear: iostream error` or `PytorchStreamWriter failed`,
    safetensors as `SafetensorError ... No space left on device`.
    """
    try:
        yield
    except GemmaTuneError:
        raise
    except Exception as exc:
        number = exc.errno if isinstance(exc, OSError) else None
        text = str(exc)
        if number in _REFUSED:
            raise AccessError(
                f"cannot write: {os.strerror(number)}", where=str(path), fix="choose an output folder that is writable"
            ) from exc
        full = number in _FULL or re.search(r"No space left|iostream error|PytorchStreamWriter failed|quota", text)
        if not full and number not in _BROKEN:
            raise
        what = "the disk is full" if full else f"the disk failed: {text}"
        raise error(
            f"{what}; {_free(path)} free",
            where=str(path),
            fix=fix,
        ) from exc


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    return f"{shutil.disk_usage(path).free / 1e9:.2f} GB"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _trash_name(path: Path) -> Path:
    trash = path.with_name(f".trash-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    return trash
