"""CSV and Parquet files, row by row."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_tune.data.cells import RowError, SourceRow
from gemma_tune.data.json_files import MAX_ROW_BYTES, is_utf16
from gemma_tune.errors import UserError


def read_csv(path: Path, head: bytes) -> Iterator[SourceRow]:
    name = str(path)
    encoding = "utf-16" if is_utf16(head) else "utf-8-sig"
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


def read_parquet(path: Path, head: bytes) -> Iterator[SourceRow]:
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
