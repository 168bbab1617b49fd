"""Local data files, read row by row, with a place for every fault: `file:line:column`.

JSON Lines is read by our own reader: `json` and `datasets` accept duplicate keys, NaN and two objects on one line, and
name no line that a person could look up. A row that cannot be read is yielded as a `RowError` (the policy
`data.on_bad_row` decides); a file that cannot be read at all raises `UserError`.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import io
import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from gemma_tune.data.cells import RowError
from gemma_tune.errors import UserError

MAX_ROW_BYTES = 8 * 2**20
"""A longer line is a mistake (a whole file on one line) more often than a conversation."""
MAX_JSON_BYTES = 2 * 2**30
"""A JSON array is held in memory; JSON Lines and Parquet have no such limit."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")

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


class SourceRow(NamedTuple):
    """One row as a source yields it: its number from 1, its value (or why it has none), and where it stands."""

    number: int
    value: Any
    where: str


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
    rows = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}[suffix](
        path, head
    )
    return _not_empty(rows, name)


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


# ------------------------------------------------------------------------------------------------------------- JSON


class _Refused(ValueError):
    """What `json` would accept and we do not. `pattern` finds it in the text."""

    def __init__(self, message: str, pattern: str, occurrence: int = 0) -> None:
        super().__init__(message)
        self.pattern = pattern
        self.occurrence = occurrence


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"duplicate key {key!a}", re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", 1)
            seen.add(key)
    return row


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON", re.escape(name))


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_STRING = r'"(?:[^"\\]|\\.)*"'


def _decode(text: str) -> Any:
    """`json.loads`, strict.

    Raises:
        json.JSONDecodeError: whatever is wrong, with its position.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except _Refused as error:
        raise json.JSONDecodeError(str(error), text, _find(text, error)) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError:  # sys.set_int_max_str_digits
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None


def _find(text: str, error: _Refused) -> int:
    """Where it stands; strings that only contain the same characters are skipped."""
    pattern = error.pattern if error.pattern.startswith('"') else f"{_STRING}|(?P<hit>{error.pattern})"
    hits = [m.start() for m in re.finditer(pattern, text) if "hit" not in m.groupdict() or m.group("hit") is not None]
    return hits[min(error.occurrence, len(hits) - 1)] if hits else 0


def _json_error(error: json.JSONDecodeError, last: bool = False) -> RowError:
    excerpt = error.doc[max(0, error.pos - 20) : error.pos + 20]
    what, fix = f"broken JSON: {error.msg}", "correct the line, or set data.on_bad_row: drop"
    at_end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith(("Unterminated string", "Invalid \\escape"))
    if error.msg.startswith("Extra data"):
        what = "more than one JSON value on one line"
        fix = "write one object a line"
    elif last and at_end:
        inside = " inside a string" if error.msg.startswith("Unterminated string") else ""
        what = f"the file ends{inside} before its last row is complete: was the download cut?"
        fix = "fetch the file again, or set data.on_bad_row: drop"
    return RowError(f"{what} near {excerpt!a}", fix=fix, kind="broken JSON")


def _jsonl(path: Path, head: bytes) -> Iterator[SourceRow]:
    name = str(path)
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    if encoding == "utf-8" and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _json(path, head)
        return
    opened: Any = gzip.open if name.lower().endswith(".gz") else open
    with opened(path, "rb") as raw:
        lines = _lines_utf16(raw) if encoding == "utf-16" else _lines_utf8(raw)
        try:
            for number, (line, complete) in enumerate(lines, 1):
                if isinstance(line, RowError):
                    yield SourceRow(number, line, f"{name}:{number}")
                elif line.strip():
                    yield _line_row(line, number, name, last=not complete)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise UserError(f"is damaged: {error}", where=name, fix="fetch the file again") from error


def _line_row(line: str, number: int, name: str, last: bool) -> SourceRow:
    where = f"{name}:{number}"
    try:
        value = _decode(line)
    except json.JSONDecodeError as error:
        return SourceRow(number, _json_error(error, last), f"{where}:{error.pos + 1}")
    return SourceRow(number, value, where)


def _lines_utf8(raw: IO[bytes]) -> Iterator[tuple[str | RowError, bool]]:
    """Each line, or why it has none, and whether a newline ended it."""
    offset = 0
    while line := raw.readline(MAX_ROW_BYTES + 1):
        start, complete = offset, line.endswith(b"\n")
        offset += len(line)
        if len(line) > MAX_ROW_BYTES:
            while not complete and (rest := raw.readline(MAX_ROW_BYTES)):
                offset, complete = offset + len(rest), rest.endswith(b"\n")
            yield _too_long(offset - start), complete
            continue
        if start == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode("utf-8"), complete
        except UnicodeDecodeError as error:
            yield _not_utf8(start + error.start, line[error.start]), complete


def _lines_utf16(raw: IO[bytes]) -> Iterator[tuple[str | RowError, bool]]:
    reader = io.TextIOWrapper(raw, encoding="utf-16", newline="\n")
    try:
        while line := reader.readline(MAX_ROW_BYTES + 1):
            complete = line.endswith("\n")
            if len(line) > MAX_ROW_BYTES:
                size = len(line)
                while not complete and (rest := reader.readline(MAX_ROW_BYTES)):
                    size, complete = size + len(rest), rest.endswith("\n")
                yield _too_long(2 * size), complete
                continue
            yield line, complete
    except UnicodeDecodeError as error:
        # The decoder cannot find the next line any more: this is the last row.
        yield RowError(f"not UTF-16: {error.reason}", fix="save the file as UTF-8", kind="not UTF-16"), True


def _too_long(size: int) -> RowError:
    return RowError(
        f"the line has {size:,} bytes, the limit is {MAX_ROW_BYTES:,}",
        fix="write one row a line; split longer documents",
        kind="line too long",
    )


def _not_utf8(offset: int, byte: int) -> RowError:
    return RowError(
        f"byte 0x{byte:02x} at offset {offset:,} is not UTF-8; is the file Latin-1?",
        fix="convert it: iconv -f latin1 -t utf-8 IN > OUT",
        kind="not UTF-8",
    )


def _json(path: Path, head: bytes) -> Iterator[SourceRow]:
    """An array of objects. A `.json` file of one object a line is read as JSON Lines."""
    name = str(path)
    if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        yield from _jsonl(path, head)
        return
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(
            f"has {size:,} bytes; a JSON array is read whole", where=name, fix="write JSON Lines or Parquet"
        )
    opened: Any = gzip.open if name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = data.decode("utf-16")
        else:
            text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        broken = _not_utf8(error.start, data[error.start])
        raise UserError(broken.reason, where=name, fix=broken.fix) from None
    try:
        rows = _decode(text)
    except json.JSONDecodeError as error:
        broken = _json_error(error, last=True)
        fix = "write one object a line, or one array of objects" if "Extra data" in error.msg else "correct the file"
        raise UserError(broken.reason, where=f"{name}:{error.lineno}:{error.colno}", fix=fix) from None
    if not isinstance(rows, list):
        raise UserError("is not an array of objects", where=name, fix="write JSON Lines: one object a line")
    for number, row in enumerate(rows, 1):
        yield SourceRow(number, row, f"{name} row {number:,}")


# ---------------------------------------------------------------------------------------------------- CSV and Parquet


def _csv(path: Path, head: bytes) -> Iterator[SourceRow]:
    name = str(path)
    encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are not UTF-8 come through as lone surrogates, so that their row can be named.
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    with path.open("r", encoding=encoding, errors=errors, newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        number = 0
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeError) as error:
                raise UserError(
                    f"broken CSV: {error}", where=f"{name}:{reader.line_num}", fix="correct the line"
                ) from error
            if not cells:
                continue
            if not header:
                header = _header(cells, name)
                continue
            number += 1
            yield SourceRow(number, _cells(cells, header), f"{name}:{reader.line_num}")


def _header(cells: list[str], name: str) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise UserError(f"the header names column {twice[0]!r} twice", where=f"{name}:1", fix="rename one of them")
    return cells


def _cells(cells: list[str], header: list[str]) -> Any:
    if len(cells) != len(header):
        return RowError(
            f"{len(cells)} cells under a header of {len(header)} columns",
            fix='quote cells that hold commas: "like, this"',
            kind="wrong number of cells",
        )
    for column, cell in zip(header, cells, strict=True):
        escaped = re.search("[\udc80-\udcff]", cell)
        if escaped:
            byte = ord(escaped.group()) - 0xDC00
            return RowError(
                f"byte 0x{byte:02x} in column {column!r} is not UTF-8; is the file Latin-1?",
                fix="convert it: iconv -f latin1 -t utf-8 IN > OUT",
                kind="not UTF-8",
            )
    return dict(zip(header, cells, strict=True))


def _parquet(path: Path, head: bytes) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = str(path)
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield SourceRow(number, row, f"{name} row {number:,}")
    except (pa.ArrowException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"damaged Parquet after row {number:,}: {first}", where=name, fix="fetch the file again"
        ) from error
