"""Local data files: is it one, and which reader reads it."""

from __future__ import annotations

import difflib
import stat
from collections.abc import Iterator
from pathlib import Path

from gemma_tune.data.cells import SourceRow
from gemma_tune.data.json_files import read_json, read_jsonl
from gemma_tune.data.tables import read_csv, read_parquet
from gemma_tune.errors import UserError

_READERS = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
SUFFIXES = tuple(_READERS)

# The first bytes of files that are often given another name.
_MAGIC = (
    (b"\x1f\x8b", "gzip", "unpack it, or name it .jsonl.gz"),
    (b"PAR1", "Parquet", "name it .parquet"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "unpack it with `zstd -d`"),
    (b"\xfd7zXZ\x00", "xz", "unpack it with `xz -d`"),
    (b"BZh", "bzip2", "unpack it with `bunzip2`"),
    (b"%PDF", "PDF", "give the text as JSON Lines"),
    (b"ARROW1", "Arrow", "convert it to Parquet"),
    (b"\x89HDF", "HDF5", "convert it to Parquet"),
    (b"version https://git-lfs", "a git-lfs pointer, not the data", "run `git lfs pull`"),
    (b"<!DOCTYPE", "a web page", "download the raw file"),
    (b"<!doctype", "a web page", "download the raw file"),
    (b"<html", "a web page", "download the raw file"),
)


def suffix_of(path: str | Path) -> str:
    """The one of `SUFFIXES` that `path` ends in, empty if none."""
    name = str(path).lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default="")


def read_file(path: str | Path) -> Iterator[SourceRow]:
    """The rows of a data file, after checking that it is one.

    Raises:
        UserError: the file is missing, is a folder, is empty, has an unknown or wrong suffix, or is damaged.
    """
    path = Path(path).expanduser()
    name = str(path)
    suffix = suffix_of(path)
    head = _head(path)
    if not suffix:
        raise UserError(
            f"{path.suffix or 'no suffix'!r} is not a data format that is read here",
            where=name,
            fix=f"convert it to one of {', '.join(SUFFIXES)}",
        )
    _check_magic(name, suffix, head)
    return _not_empty(_READERS[suffix](path, head), name)


def _not_empty(rows: Iterator[SourceRow], name: str) -> Iterator[SourceRow]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise UserError("0 rows: the file has only blank lines or a header", where=name, fix="check the path")


# ------------------------------------------------------------------------------------------------- is it a data file?


def _head(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            inside = sorted(entry.name for entry in path.iterdir() if suffix_of(entry))[:5]
            raise UserError(
                "is a folder, not a data file",
                where=str(path),
                fix=f"name a file in it: {', '.join(inside)}" if inside else f"give a {'/'.join(SUFFIXES)} file",
            )
        if not stat.S_ISREG(mode):
            raise UserError("is a device or a pipe, not a data file", where=str(path), fix="write the rows to a file")
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), fix=_nearest(path)) from None
    except (PermissionError, NotADirectoryError, OSError) as error:
        raise UserError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path and its rights"
        ) from error
    if not head:
        raise UserError("0 rows: the file is empty", where=str(path), fix="check the path, or write the file again")
    return head


def _nearest(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if suffix_of(entry)]
    except OSError:
        return f"the folder {path.parent} does not exist; paths are relative to the working directory"
    near = difflib.get_close_matches(path.name, names, 3, 0.4) or sorted(names)[:3]
    listed = ", ".join(str(path.parent / name) for name in near)
    return (
        f"did you mean {listed}?"
        if near
        else f"{path.parent} holds no data file; paths are relative to the working directory"
    )


def _check_magic(name: str, suffix: str, head: bytes) -> None:
    expected = {".jsonl.gz": b"\x1f\x8b", ".parquet": b"PAR1"}.get(suffix)
    if expected is not None and head.startswith(expected):
        return
    for magic, kind, fix in _MAGIC:
        if head.startswith(magic):
            raise UserError(f"is {kind}, not {suffix}", where=name, fix=fix)
    if expected is not None:
        raise UserError(
            f"is not {suffix}: it begins with {head[:8]!r}", where=name, fix="give the file its true suffix"
        )
