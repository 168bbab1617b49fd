"""evaluation.json: what stays, what is replaced, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.evaluation.result import check_writable, merged, read, read_rows, rows_file, same_subject, write


def subject(**changes: Any) -> dict[str, Any]:
    return {"target": "run", "base": "b", "revision": None, "adapter_sha256": "aa", "content": "c"} | changes


def test_parts_of_one_subject_stay_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    write(file, subject(), {"held_out": {"rows": 1}}, [{"part": "held_out", "row": 0}])
    tasks = [{"part": "task", "task": "a", "item": 0}, {"part": "task", "task": "b", "item": 0}]
    write(file, subject(target="./run/"), {"tasks": {"a": 1, "b": 1}}, tasks)
    write(file, subject(), {"tasks": {"b": 2}}, [{"part": "task", "task": "b", "item": 7}])
    found = json.loads(file.read_text())
    assert found["format"] == 1 and found["held_out"] == {"rows": 1} and found["tasks"] == {"a": 1, "b": 2}
    assert [(row["part"], row.get("task"), row.get("item")) for row in read_rows(file)] == [
        ("held_out", None, None),
        ("task", "a", 0),
        ("task", "b", 7),
    ]


def test_nothing_of_another_subject_stays(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    write(file, subject(), {"held_out": {}}, [{"part": "held_out", "row": 0}])
    write(file, subject(adapter_sha256="bb"), {"tasks": {}})
    assert "held_out" not in read(file) and not rows_file(file).is_file()


def test_who_is_the_same() -> None:
    assert same_subject(subject(), subject(target="elsewhere"))
    assert not same_subject(subject(), subject(base="other"))
    unknown = {"adapter_sha256": None, "content": None}
    assert same_subject(subject(**unknown), subject(**unknown))
    assert not same_subject(subject(**unknown), subject(target="other", **unknown))
    assert same_subject(subject(**unknown, revision="r"), subject(target="other", revision="r", **unknown))


def test_figures_that_json_cannot_hold_are_null_and_secrets_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrst")
    file = tmp_path / "evaluation.json"
    rows = [{"part": "task", "task": "t", "item": "hf_abcdefghijklmnopqrst", "correct": float("inf")}]
    write(file, subject(), {"held_out": {"base": {"perplexity": float("inf")}}}, rows)
    assert read(file)["held_out"]["base"]["perplexity"] is None
    text = file.read_text() + rows_file(file).read_text()
    assert "abcdefgh" not in text and "Infinity" not in text


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 2, "subject": {}}', '{"format": 1}'])
def test_what_is_no_evaluation_is_refused_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(text)
    with pytest.raises(UserError):
        write(file, subject(), {"held_out": {}})
    assert file.read_text() == text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    rows_file(file).write_text('{"part": "task"}\n{"par\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2"):
        read_rows(file)


def test_rows_stand_beside_their_file() -> None:
    assert rows_file(Path("run/evaluation.json")) == Path("run/evaluation.rows.jsonl")
    assert rows_file(Path("gemma.evaluation.json")) == Path("gemma.evaluation.rows.jsonl")
    assert rows_file(Path("mine.json")) == Path("mine.rows.jsonl")


def test_merging_changes_neither_document() -> None:
    earlier = {"format": 1, "subject": subject(), "tasks": {"a": 1}}
    found = merged(earlier, subject(), {"tasks": {"b": 2}})
    assert found["tasks"] == {"a": 1, "b": 2} and earlier["tasks"] == {"a": 1}


def test_where_nothing_can_be_written_is_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "folder" / "evaluation.json")
    (tmp_path / "file").touch()
    with pytest.raises(AccessError, match="no folder"):
        check_writable(tmp_path / "file" / "evaluation.json")
    monkeypatch.setattr("os.access", lambda *_: False)  # who tests as root may write anywhere
    with pytest.raises(AccessError, match="nothing can be written"):
        check_writable(tmp_path / "evaluation.json")
