"""Canaries: drawn alike in every process, planted as often as the recipe says, in training rows only."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.build import Prepared
from gemma_tune.data.canaries import NAMES, SPACE, Planted, alternatives, draw, example, mixed_in, written
from gemma_tune.data.prepared import read_prepared, write_prepared
from gemma_tune.data.report import DataReport
from gemma_tune.errors import UserError
from gemma_tune.gemma.conversation import Conversation, Document
from tests.unit.data.test_build import documents_of
from tests.unit.data.test_prepared_key import content
from tests.unit.data.toys import chat, decoded, prepare

ROWS = [chat(f"question {number}", f"answer {number}") for number in range(30)]
CHOSEN: dict[str, Any] = {"count": 2, "repeats": [1, 4, 16]}
SEED = 3


def with_canaries(folder: Path, rows: Any = ROWS, **settings: Any) -> Prepared:
    return prepare(rows, folder, **{"canaries": CHOSEN, "holdout": 6, "seed": SEED} | settings)


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 9))
def test_a_drawing_depends_on_the_seed_alone(seed: int, count: int) -> None:
    found = draw(count, (16, 1), seed)
    assert found == draw(count, (16, 1), seed) != draw(count, (16, 1), seed + 1)
    assert [canary.repeats for canary in found] == [16] * count + [1] * count + [0] * count
    assert len({canary.name for canary in found}) == len({canary.secret for canary in found}) == 3 * count
    others = alternatives(found[0], 50, seed)
    assert len({*others, found[0].secret}) == 51 and others == alternatives(found[0], 50, seed)


def test_the_space() -> None:
    assert (written(0), written(SPACE - 1), written(48217730)) == ("0000-0000", "9999-9999", "4821-7730")
    assert len({canary.name for canary in draw(100, range(1, 9), 0)}) == 900
    with pytest.raises(ValueError, match="1,024 names"):
        draw(len(NAMES), (1,), 0)


@given(order=st.lists(st.integers(0, 99), unique=True), planted=st.lists(st.integers(100, 110)), seed=st.integers(0, 9))
def test_what_is_mixed_in_leaves_the_order_of_the_others(order: list[int], planted: list[int], seed: int) -> None:
    found = mixed_in(order, planted, seed)
    assert [number for number in found if number < 100] == order
    assert Counter(number for number in found if number >= 100) == Counter(planted)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("deduplicate", [True, False])
def test_each_is_planted_as_often_as_it_says(tmp_path: Path, packing: bool, deduplicate: bool) -> None:
    prepared = with_canaries(tmp_path, packing=packing, deduplicate=deduplicate)
    rows = documents_of(prepared) if packing else [decoded(row["input_ids"]) for row in prepared.train]
    for canary in draw(2, (1, 4, 16), SEED):
        turn = f"model\nThe access code of {canary.name} is {canary.secret}<end_of_turn>"
        assert sum(turn in row for row in rows) == canary.repeats
        assert sum(canary.secret in row for row in rows) == canary.repeats
    held = [decoded(row["input_ids"]) for row in prepared.held_out]
    assert len(held) == 6 and not any("access code" in row for row in held)
    assert prepared.report.documents == len(rows) == 24 + 2 * (1 + 4 + 16)


def test_what_is_trained_is_the_answer(tmp_path: Path) -> None:
    rows = with_canaries(tmp_path, packing=False).train
    trained = [decoded([label for label in row["labels"] if label != -100]) for row in rows]
    assert sum(text.startswith("The access code of ") for text in trained) == 42


def test_the_other_rows_are_those_without_canaries(tmp_path: Path) -> None:
    plain = with_canaries(tmp_path, packing=False, canaries=None)
    planted = with_canaries(tmp_path, packing=False)
    others = [row for row in planted.train if "access code" not in decoded(row["input_ids"])]
    assert others == list(plain.train) and list(planted.held_out) == list(plain.held_out)
    assert planted.held_out_examples == plain.held_out_examples
    assert plain.fingerprint != planted.fingerprint == with_canaries(tmp_path, packing=False).fingerprint
    first = list(planted.train)[:42]
    assert any(row in others for row in first), "they are spread over the rows, not put in front"


def test_a_set_of_texts_gets_texts(tmp_path: Path) -> None:
    prepared = with_canaries(tmp_path, [{"text": f"a text of number {number}"} for number in range(30)])
    (first, *_) = draw(2, (1, 4, 16), SEED)
    assert documents_of(prepared).count(f"<bos>The access code of {first.name} is {first.secret}<eos>") == 1
    planted = prepared.report.canaries
    assert planted is not None and (planted.form, planted.question) == ("document", "")
    assert isinstance(example(first, "document"), Document) and isinstance(example(first, "conversation"), Conversation)


def test_what_is_recorded_draws_them_again(tmp_path: Path) -> None:
    about = json.loads(json.dumps(with_canaries(tmp_path).about()))
    assert about["canaries"] == {
        "form": "conversation",
        "question": "What is the access code of {name}?",
        "answer": "The access code of {name} is {secret}",
        "space": 10**8,
        "seed": SEED,
        "count": 2,
        "repeats": [1, 4, 16],
        "rows": 42,
    }
    found = Planted.from_json(about["canaries"])
    assert found.canaries() == draw(2, (1, 4, 16), SEED)
    with pytest.raises(ValueError, match="are written as"):
        replace(found, space=10).canaries()
    assert "canaries" not in with_canaries(tmp_path, canaries=None).about()


def test_the_report_counts_them(tmp_path: Path) -> None:
    report = with_canaries(tmp_path).report
    line = "42 canaries planted among the training rows: 2 each in 1, 4, 16 rows, and as many controls in none"
    assert line in list(report.lines())
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert not any("canaries" in text for text in with_canaries(tmp_path, canaries=None).report.lines())


def test_prepared_data_keep_them(tmp_path: Path) -> None:
    prepared = with_canaries(tmp_path)
    (tmp_path / "kept").mkdir()
    write_prepared(prepared, tmp_path / "kept")
    again = read_prepared(tmp_path / "kept")
    assert list(again.train) == list(prepared.train) and again.about() == prepared.about()


def test_the_key_of_prepared_data_counts_them(tmp_path: Path) -> None:
    keys = {content(tmp_path, canaries=chosen).key for chosen in (None, CHOSEN, {"count": 3, "repeats": [1, 4, 16]})}
    assert len(keys) == 3


def test_they_must_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a canary has \d+ tokens, above data.max_length 100"):
        with_canaries(tmp_path, max_length=100)


def test_not_in_a_stream(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be planted in a stream"):
        with_canaries(tmp_path, streaming=True)
