from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data import json_files
from gemma_tune.data.cells import RowError, SourceRow
from gemma_tune.data.files import read_file
from gemma_tune.errors import UserError

GOOD = '{"text": "ä"}'


def rows_of(path: Path, content: bytes | str) -> list[SourceRow]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return list(read_file(path))


def values_of(path: Path, content: bytes | str) -> list[Any]:
    return [row.value for row in rows_of(path, content)]


@pytest.mark.parametrize(
    "content",
    [
        f"{GOOD}\n{GOOD}\n".encode(),
        f"\n{GOOD}\r\n   \r\n{GOOD}".encode(),
        b"\xef\xbb\xbf" + f"{GOOD}\n{GOOD}\n".encode(),
        f"{GOOD}\n{GOOD}\n".encode("utf-16"),
        b"\xfe\xff" + f"{GOOD}\n{GOOD}".encode("utf-16-be"),
        f"[{GOOD},\n{GOOD}]".encode(),
        f"[{GOOD},\n{GOOD}]".encode("utf-8-sig"),
        f" [{GOOD},\n{GOOD}]".encode("utf-16"),
    ],
    ids=[
        "plain",
        "crlf and blank lines",
        "bom",
        "utf-16",
        "utf-16-be",
        "json array",
        "json array with bom",
        "utf-16 array",
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_in_its_forms(tmp_path: Path, content: bytes, suffix: str) -> None:
    assert values_of(tmp_path / f"x.{suffix}", content) == [{"text": "ä"}] * 2


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "x.jsonl", f"{GOOD}\n\n{GOOD}\n")
    assert [(row.number, row.where.rsplit("/", 1)[1]) for row in rows] == [(1, "x.jsonl:1"), (3, "x.jsonl:3")]


def test_gzip(tmp_path: Path) -> None:
    assert values_of(tmp_path / "x.jsonl.gz", gzip.compress(GOOD.encode())) == [{"text": "ä"}]
    with pytest.raises(UserError, match="is damaged"):
        rows_of(tmp_path / "y.jsonl.gz", gzip.compress(GOOD.encode() * 1000)[:-12])


def test_csv_and_parquet(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "x.csv", 'quote,author\n"a, ""b""\nc",d\n\ne,f\n')
    assert [row.value for row in rows] == [{"quote": 'a, "b"\nc', "author": "d"}, {"quote": "e", "author": "f"}]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["3", "5"]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "x"}]] * 300}), tmp_path / "x.parquet")
    found = list(read_file(tmp_path / "x.parquet"))
    assert len(found) == 300 and found[299].where.endswith("x.parquet row 300")
    assert found[0].value == {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("line", "place", "what"),
    [
        ('{"a": 1,}', ":2:9", "broken JSON"),
        ("{'a': 1}", ":2:2", "broken JSON"),
        ("hello", ":2:1", "broken JSON"),
        ('{"a": 1} {"a": 2}', ":2:10", "more than one JSON value on one line"),
        ('{"a": 1}{"a": 2}', ":2:9", "more than one JSON value on one line"),
        ('{"b": {"a": 1, "a": 2}}', ":2:16", "duplicate key 'a'"),
        ('{"s": "NaN", "a": NaN}', ":2:19", "NaN is not JSON"),
        ('{"a": [-Infinity]}', ":2:8", "-Infinity is not JSON"),
        ('{"a": ' + "[" * 200_000 + "}", ":2:1", "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", ":2:1", "too many digits"),
    ],
)
def test_a_broken_line_has_a_place(tmp_path: Path, line: str, place: str, what: str) -> None:
    rows = rows_of(tmp_path / "x.jsonl", f"{GOOD}\n{line}\n{GOOD}\n")
    assert [type(row.value) for row in rows] == [dict, RowError, dict]
    assert rows[1].where == f"{tmp_path / 'x.jsonl'}{place}"
    assert what in rows[1].value.reason and rows[1].value.fix


@pytest.mark.parametrize("cut", ['{"text": "hal', '{"text": ', '{"text"', '{"text": "x"', '{"a": [1, '])
def test_a_cut_last_line_is_called_cut(tmp_path: Path, cut: str) -> None:
    *_, last = rows_of(tmp_path / "x.jsonl", f"{GOOD}\n{cut}")
    assert isinstance(last.value, RowError) and "was the download cut?" in last.value.reason
    *_, last = rows_of(tmp_path / "x.jsonl", f"{GOOD}\n{cut}\n")
    assert isinstance(last.value, RowError) and "cut" not in last.value.reason


def test_latin1_names_the_byte(tmp_path: Path) -> None:
    content = f"{GOOD}\n".encode() + '{"text": "é"}'.encode("latin1") + b"\n" + GOOD.encode()
    rows = rows_of(tmp_path / "x.jsonl", content)
    assert [type(row.value) for row in rows] == [dict, RowError, dict]
    assert f"byte 0xe9 at offset {content.index(0xE9)}" in rows[1].value.reason
    with pytest.raises(UserError, match="byte 0xe9 at offset 11 is not UTF-8"):
        rows_of(tmp_path / "x.json", '[{"text": "é"}]'.encode("latin1"))
    (row,) = rows_of(tmp_path / "x.csv", "quote\né\n".encode("latin1"))
    assert "byte 0xe9 in column 'quote' is not UTF-8" in row.value.reason


def test_a_line_above_the_limit_is_skipped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_ROW_BYTES", 100)
    long = json.dumps({"text": "x" * 1000})
    for name, content in (
        ("a", f"{GOOD}\n{long}\n{GOOD}\n".encode()),
        ("b", f"{GOOD}\n{long}\n{GOOD}".encode("utf-16")),
    ):
        rows = rows_of(tmp_path / f"{name}.jsonl", content)
        assert [type(row.value) for row in rows] == [dict, RowError, dict]
        assert "the limit is 100" in rows[1].value.reason
        assert rows[2].number == 3


def test_the_limit_is_8_mib(tmp_path: Path) -> None:
    fits = json.dumps({"text": "x" * (8 * 2**20 - 20)})
    first, second = rows_of(tmp_path / "x.jsonl", f"{fits}\n" + json.dumps({"text": "x" * 12_000_000}))
    assert isinstance(first.value, dict)
    assert "12,000,012 bytes, the limit is 8,388,608" in second.value.reason


@pytest.mark.parametrize("content", ["", "\n", "  \r\n\n", "[]", "\ufeff"])
def test_an_empty_file_has_0_rows(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match="0 rows"):
        rows_of(tmp_path / "x.jsonl", content)


@pytest.mark.parametrize(
    ("name", "magic", "what"),
    [
        ("x.jsonl", b"\x1f\x8b\x08", "is gzip"),
        ("x.jsonl", b"PAR1....", "is Parquet"),
        ("x.parquet", b'{"text": "x"}', "is not .parquet"),
        ("x.jsonl.gz", b'{"text": "x"}', "is not .jsonl.gz"),
        ("x.jsonl", b"PK\x03\x04", "is a zip archive"),
        ("x.json", b"\x28\xb5\x2f\xfd", "is zstandard"),
        ("x.csv", b"%PDF-1.7", "is PDF"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer"),
        ("x.jsonl", b"<!DOCTYPE html>", "a web page"),
        ("x.txt", b"hello", "'.txt' is not a data format"),
        ("x", b"hello", "'no suffix' is not a data format"),
        ("x.json", b'"text"', "not an array of objects"),
        ("x.json", b'[{"a": 1}', "x.json:1:10: the file ends"),
        ("x.json", b'[{"a": 1},\n {"a": 1, "a": 2}]', "x.json:2:11: broken JSON: duplicate key 'a'"),
        ("x.parquet", b"PAR1 not really", "damaged Parquet"),
        ("x.csv", b"a,a\n1,2\n", "names column 'a' twice"),
        ("x.csv", b'a,b\n"1,2\n', "broken CSV"),
        ("x.csv", b"a,b\n", "0 rows"),
    ],
)
def test_a_file_that_is_not_what_it_says(tmp_path: Path, name: str, magic: bytes, what: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path / name, magic)
    assert what in str(caught.value)
    assert all(problem.fix for problem in caught.value.problems)


def test_csv_cells_must_match_the_header(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path / "x.csv", "a,b\n1,2,3\n4,5\n")
    assert "3 cells under a header of 2 columns" in first.value.reason
    assert second.value == {"a": "4", "b": "5"}


def test_a_missing_file_has_near_names(tmp_path: Path) -> None:
    for name in ("train.jsonl", "trains.jsonl", "other.csv", "readme.md"):
        (tmp_path / name).write_text(GOOD)
    with pytest.raises(UserError, match="no such file") as caught:
        read_file(tmp_path / "trian.jsonl")
    assert f"did you mean {tmp_path / 'train.jsonl'}" in str(caught.value)
    assert "readme" not in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        read_file(tmp_path / "nowhere" / "x.jsonl")


def test_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="is a folder") as caught:
        read_file(tmp_path)
    assert "a.jsonl" in str(caught.value)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="a device or a pipe"):
        read_file(tmp_path / "pipe.jsonl")


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.text(alphabet='{}[]":,\\ab1NaI-u\ud800\x00', max_size=25).map(
                lambda t: t.encode("utf-8", "surrogatepass")
            ),
            st.sampled_from([b'{"text": "x"}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf", b"\xff\xfe", b"[", b"null"]),
        ),
        max_size=6,
    ),
    suffix=st.sampled_from(["jsonl", "json", "csv", "jsonl.gz", "parquet"]),
)
def test_no_bytes_make_anything_but_rows_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if suffix == "jsonl.gz" else content)
    try:
        for row in read_file(path):
            assert isinstance(row, SourceRow) and row.where
    except UserError as error:
        assert str(path) in str(error)
