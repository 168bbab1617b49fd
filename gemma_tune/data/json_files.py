"""JSON Lines and JSON arrays, read strictly, with a place for every fault: `file:line:column`.

`json` and `datasets` accept duplicate keys, NaN and two objects on one line, and name no line that a person could look
up. A row that cannot be read is yielded as a `RowError` (the policy `data.on_bad_row` decides); a file that cannot be
read at all raises `UserError`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gemma_tune.data.cells import RowError, SourceRow
from gemma_tune.errors import UserError

MAX_ROW_BYTES = 8 * 2**20
"""A longer line is a mistake (a whole file on one line) more often than a conversation."""
MAX_JSON_BYTES = 2 * 2**30
"""A JSON array is held in memory; JSON Lines and Parquet have no such limit."""


class _Refused(ValueError):
    """What `json` would accept and we do not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _Refused("duplicate key")
    return row


def _no_constant(name: str) -> Any:
    raise _Refused(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _decode(text: str) -> Any:
    """`json.loads`, strict.

    Raises:
        json.JSONDecodeError: whatever is wrong, with its position.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except _Refused:
        raise _first_refused(text) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError:  # sys.set_int_max_str_digits
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None


_TOKEN = re.compile(r'(?P<string>"(?:[^"\\]|\\.)*")(?P<colon>\s*:)?|[{}\[\]]|NaN|-?Infinity')


def _first_refused(text: str) -> json.JSONDecodeError:
    """The first repeated key or constant of a text that is JSON otherwise: `json` does not say where they are."""
    open_objects: list[set[str]] = []
    for token in _TOKEN.finditer(text):
        if token["colon"]:
            key = json.loads(token["string"])
            if key in open_objects[-1]:
                return json.JSONDecodeError(f"duplicate key {key!a}", text, token.start())
            open_objects[-1].add(key)
        elif token[0] in "{[":
            open_objects.append(set())
        elif token[0] in "}]":
            open_objects.pop()
        elif not token["string"]:
            return json.JSONDecodeError(f"{token[0]} is not JSON", text, token.start())
    raise AssertionError("json refused a text that has neither")


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


def read_jsonl(path: Path, head: bytes) -> Iterator[SourceRow]:
    """One object a line. An array in a file of this name is read as an array. `head` is how the file begins."""
    name = str(path)
    encoding = "utf-16" if is_utf16(head) else "utf-8"
    if _begins_with(head, "["):
        yield from read_json(path, head)
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


def is_utf16(head: bytes) -> bool:
    """Whether a file that begins with these bytes says that it is UTF-16."""
    return head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _begins_with(head: bytes, character: str) -> bool:
    text = head[: len(head) // 2 * 2].decode("utf-16" if is_utf16(head) else "utf-8-sig", errors="ignore")
    return text.lstrip().startswith(character)


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


def read_json(path: Path, head: bytes) -> Iterator[SourceRow]:
    """An array of objects. A `.json` file of one object a line is read as JSON Lines."""
    name = str(path)
    if _begins_with(head, "{"):
        yield from read_jsonl(path, head)
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
        text = data.decode("utf-16") if is_utf16(head) else data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
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
