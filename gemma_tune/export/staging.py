"""Nothing stands under its final name before it is whole.

    out's parent/.NAME.staging/    filled here, while a lock on the folder says that somebody works in it
    out's parent/NAME/             the same folder after one rename

What a killed process left is removed by the next one that wants the same name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_tune.errors import AccessError, UserError
from gemma_tune.train.checkpoint import disk_errors, flush_all, publish

_ROOM = "make room, or choose a larger disk with --out; then run the same command again"


def check_free(final: Path) -> None:
    """Refuse a name that is taken, before any work is done.

    Raises:
        UserError: a file, or a folder that holds something, has this name.
        AccessError: the folder above cannot be written.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError("it exists already", where=str(final), fix="remove it, or choose another name with --out")
    parent = next(folder for folder in final.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AccessError("cannot be written", where=str(parent), fix="choose another place with --out")


@contextmanager
def staged(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty folder to fill. It gets its final name when the body ends, and is removed when the body fails.

    Args:
        final: its name.
        replace: a folder of this name is replaced, by renaming, once the new one is whole.

    Raises:
        UserError: the name is taken.
        AccessError: the disk is full or cannot be written, or another process makes the same folder.
    """
    final = final.resolve()  # of a link to another disk, that disk
    if not (replace and final.is_dir()):
        check_free(final)
    staging = final.with_name(f".{final.name}.staging")
    with disk_errors(final, AccessError, fix=_ROOM):
        final.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir(exist_ok=True)
        with _locked(staging):
            try:
                _empty(staging)
                yield staging
                flush_all(staging)
                if not (replace and final.is_dir()):
                    check_free(final)
                publish(staging, final)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise


@contextmanager
def _locked(staging: Path) -> Iterator[None]:
    """A lock on the folder itself: it needs no file inside, and ends with the process."""
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AccessError(
                "another process is making this folder", where=str(staging), fix="wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
