"""Bad data, end to end through `build`: exit code 2, a place that can be looked up, a remedy, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import UserError
from tests.unit.data.toys import GEMMA1, GEMMA3, GEMMA4, chat, prepare

GOOD = json.dumps(chat("q", "a")) + "\n"


def line(row: Any) -> str:
    return json.dumps(row) + "\n"


def said(*roles: str) -> str:
    return line({"messages": [{"role": role, "content": f"text {i}"} for i, role in enumerate(roles)]})


CASES: dict[str, tuple[bytes | str, str, str]] = {
    # name: content of rows.jsonl, place behind its path, what is said
    "D3 empty file": ("", "", "0 rows"),
    "D3 blank lines": ("\n\n", "", "0 rows"),
    "D4 invalid JSON": (GOOD + "{'messages': []}\n", ":2:2", "broken JSON"),
    "D5 cut last line": (GOOD + '{"messages": [{"role": "us', ":2:", "was the download cut?"),
    "D6 two objects on a line": (GOOD + GOOD.strip() + GOOD, ":2:", "more than one JSON value"),
    "D7 NaN": (GOOD + '{"messages": NaN}\n', ":2:14", "NaN is not JSON"),
    "D8 duplicate key": (GOOD + '{"messages": 1, "messages": 2}\n', ":2:17", "duplicate key 'messages'"),
    "D9 number": (GOOD + "3\n", ":2", "the row is a number (3)"),
    "D9 null": (GOOD + "null\n", ":2", "the row is null"),
    "D9 list": (GOOD + "[]\n", ":2", "the row is a list"),
    "D11 latin-1": (GOOD.encode() + '{"text": "é"}\n'.encode("latin1"), ":2", "byte 0xe9 at offset"),
    "D12 lone surrogate": (
        GOOD + '{"messages": [{"role": "user", "content": "\\ud800"}]}\n',
        ":2",
        "messages[0].content holds a lone surrogate",
    ),
    "D13 nesting": (GOOD + "[" * 100_000 + "\n", ":2:1", "nested too deeply"),
    "D14 long line": (GOOD + line(chat("q", "x" * 12_000_000)), ":2", "the limit is 8,388,608"),
    "D15 gzip": (b"\x1f\x8b\x08\x00", "", "is gzip, not .jsonl"),
    "D15 parquet": (b"PAR1\x00", "", "is Parquet, not .jsonl"),
    "D16 zip": (b"PK\x03\x04", "", "is a zip archive"),
    "D17 missing column": (line({"dialog": []}), ":1", "the columns 'dialog' fit no known shape"),
    "D18 other type in a later row": (GOOD + line({"messages": "q"}), ":2", "messages is text ('q'), not a list"),
    "D19 messages null": (GOOD + line({"messages": None}), ":2", "messages is null"),
    "D19 messages empty": (GOOD + line({"messages": []}), ":2", "messages is an empty list"),
    "D20 message is text": (line({"messages": ["q"]}), ":1", "messages[0] is text ('q'), not an object"),
    "D20 no role": (line({"messages": [{"content": "q"}]}), ":1", "messages[0] has no 'role'"),
    "D20 no content": (line({"messages": [{"role": "user"}]}), ":1", "messages[0] has no 'content'"),
    "D21 content null": (line({"messages": [{"role": "user", "content": None}]}), ":1", "messages[0].content is null"),
    "D22 content number": (line({"messages": [{"role": "user", "content": 1}]}), ":1", "not text"),
    "D22 image": (
        line({"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
        ":1",
        "block of type 'image'",
    ),
    "D23 empty answer": (GOOD + line(chat("q", "  ")), ":2", "turn 2 ('model') is empty"),
    "D23 empty question": (line(chat("", "a")), ":1", "turn 1 ('user') is empty"),
    "D24 unknown role": (said("user", "robot"), ":1", "unknown role 'robot'"),
    "D24 sharegpt role": (said("human", "gpt"), ":1", "unknown role 'human'"),
    "D25 two users": (said("user", "user", "assistant"), ":1", "turn 2 is 'user' after 'user'"),
    "D25 two models": (said("user", "assistant", "assistant"), ":1", "turn 3 is 'model' after 'model'"),
    "D26 assistant first": (said("assistant", "user", "assistant"), ":1", "turn 1 is 'model'"),
    "D28 system in the middle": (said("user", "system", "assistant"), ":1", "turn 2 is 'system'"),
    "D28 two systems": (said("system", "system", "user", "assistant"), ":1", "turn 2 is 'system'"),
    "D29 tool": (said("user", "tool", "assistant"), ":1", "turn 2 is a tool turn"),
    "D35, D36 nothing to train on": (said("user") + said("user", "user"), "", "dropped no model turn: 2"),
    "D36 nothing fits": (line(chat("q", "x" * 5000)), "", "the first trained answer does not fit max_length: 1"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", [GEMMA1, GEMMA3], ids=["gemma1", "gemma3"])
def test_bad_data(tmp_path: Path, name: str, family: Any) -> None:
    content, place, what = CASES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(UserError) as caught:
        prepare(str(path), tmp_path, family)
    assert caught.value.exit_code == 2
    problem = caught.value.problems[0]
    assert what in problem.what
    assert problem.fix
    expected = f"{path}{place}" if not name.startswith(("D35", "D36")) else "data.sources"
    assert problem.where.startswith(expected)
    assert problem.what.isprintable() and len(problem.what) < 400


ROW_FAULTS = [name for name, (_, place, _) in CASES.items() if place]


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_a_bad_row_may_be_dropped_and_is_counted(tmp_path: Path, name: str) -> None:
    content = CASES[name][0]
    raw = content if isinstance(content, bytes) else content.encode("utf-8")
    good = 1 + raw.startswith(GOOD.encode())
    # One more good row, in front: the last line of a file may be cut.
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line(chat("other", "row")).encode() + raw)
    report = prepare(str(path), tmp_path, on_bad_row="drop").report
    assert sum(report.dropped.values()) == 1 and report.documents == good


@pytest.mark.parametrize(
    ("roles", "settings", "documents"),
    [
        (("user", "user", "assistant"), {"fix_roles": "merge"}, 2),
        (("user", "user", "assistant"), {"fix_roles": "drop"}, 1),
        (("assistant", "user", "assistant"), {"fix_roles": "drop"}, 1),
        (("system", "user", "assistant"), {}, 2),
        (("system", "user", "assistant"), {"system_role": "drop"}, 2),
        (("user", "assistant", "user"), {}, 2),
    ],
)
def test_the_advised_setting_helps(
    tmp_path: Path, roles: tuple[str, ...], settings: dict[str, Any], documents: int
) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD + said(*roles))
    assert prepare(str(tmp_path / "rows.jsonl"), tmp_path, **settings).report.documents == documents


@pytest.mark.parametrize("text", ["a\0b", "a\u2028b", "a\u200db", "\u202eabc", "e\u0301", "\x1b[31m", "a\r\nb", "🧑‍🚀"])
def test_d33_odd_text_is_kept_to_the_byte(tmp_path: Path, text: str) -> None:
    prepared = prepare([chat("q", text)], tmp_path)
    labels = [label - 1000 for label in prepared.train[0]["labels"] if label >= 1000]
    assert bytes(labels).decode("utf-8") == text
    assert ("NUL character" in prepared.report.noted) == ("\0" in text)


def test_d2_a_folder_and_d1_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    for name, what in ((str(tmp_path), "is a folder"), (str(tmp_path / "row.jsonl"), "no such file")):
        with pytest.raises(UserError) as caught:
            prepare(name, tmp_path)
        assert what in str(caught.value) and "rows.jsonl" in caught.value.problems[0].fix


def test_one_problem_stands_for_all_of_its_kind(tmp_path: Path) -> None:
    """The first place of every fault at once, with how many there are, instead of one error an hour."""
    content = GOOD + line({"messages": None}) * 3 + GOOD.replace("q", "r") + said("assistant") + "oops\n"
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        prepare(str(tmp_path / "rows.jsonl"), tmp_path)
    found = [(problem.where.rsplit("/", 1)[1], problem.what) for problem in caught.value.problems]
    assert found[0] == ("rows.jsonl:2", "messages is null, not a list (and 2 more rows like it)")
    assert found[1][0] == "rows.jsonl:6" and "user to speak first" in found[1][1]
    assert found[2][0] == "rows.jsonl:7:1" and "broken JSON" in found[2][1]


def test_gemma_4_takes_what_others_refuse(tmp_path: Path) -> None:
    content = said("user", "user", "assistant") + said("system", "user", "assistant", "assistant")
    (tmp_path / "rows.jsonl").write_text(content)
    report = prepare(str(tmp_path / "rows.jsonl"), tmp_path, GEMMA4).report
    assert (report.documents, report.repaired, report.dropped) == (2, {}, {})


def test_a_bad_row_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from gemma_tune.gemma.conversation import *\n"
        "def rows():\n    yield {'prompt': 'q', 'completion': 'a'}\n    yield 3\n"
        "def typed():\n    yield Conversation((Message('user', None), Message('model', 'a')))\n"
        "def roles():\n    yield Conversation((Message('assistant', 'a'),))\n"
    )
    for function, what in (
        ("rows", "rows row 2: the row is a number (3)"),
        ("typed", "typed row 1: messages[0] is not a Message with text"),
        ("roles", "roles row 1: messages[0] unknown role 'assistant'"),
    ):
        with pytest.raises(UserError) as caught:
            prepare(f"{tmp_path / 'mine.py'}:{function}", tmp_path)
        assert what in str(caught.value)
