from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.errors import UserError
from tests.unit.data.test_build import documents_of
from tests.unit.data.toys import chat, prepare

ROWS = [chat(f"prompt {i % 90}", f"answer {i}") for i in range(180)]


def test_rows_come_as_they_are_trained_and_the_same_each_time(tmp_path: Path) -> None:
    prepared = prepare(ROWS, tmp_path, streaming=True, holdout=10, shuffle_buffer=50)
    first, second = list(prepared.train), list(prepared.train)
    assert first == second
    assert set(first[0]) == {"input_ids", "labels", "position_ids"}
    assert all(len(row["input_ids"]) <= 512 for row in first)
    held = {example.messages[0].content for example in prepared.held_out_examples}  # type: ignore[union-attr]
    texts = documents_of(prepared)
    assert len(prepared.held_out) == 10
    # Each prompt has two rows: the other row of a held-out prompt is left out, all others are trained.
    assert len(texts) == len(set(texts)) == 180 - 2 * len(held)
    assert not any(f"\n{prompt}<" in text for prompt in held for text in texts)


def test_the_buffer_shuffles_by_seed(tmp_path: Path) -> None:
    def order(**settings: object) -> list[str]:
        return documents_of(prepare(ROWS, tmp_path, streaming=True, **settings))

    straight = order(shuffle=False)
    assert order(shuffle=False, seed=3) == straight
    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert sorted(order(seed=1)) == sorted(straight)


def test_repetitions_are_dropped(tmp_path: Path) -> None:
    assert len(documents_of(prepare(ROWS + ROWS, tmp_path, streaming=True))) == 180


def test_unpacked(tmp_path: Path) -> None:
    rows = list(prepare(ROWS, tmp_path, streaming=True, packing=False).train)
    assert len(rows) == 180 and set(rows[0]) == {"input_ids", "labels"}


def test_the_report_says_what_it_does_not_know(tmp_path: Path) -> None:
    report = prepare(ROWS, tmp_path, streaming=True, holdout=4).report
    assert (report.rows, report.tokens, report.held_out) == (None, None, 4)
    assert any("read as a stream" in line for line in report.lines())
    assert any("streaming" in remark for remark in report.remarks)


def test_a_fraction_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0\.01 is a fraction") as caught:
        prepare(ROWS, tmp_path, streaming=True, holdout=0.01)
    assert "data.holdout" in str(caught.value)


@pytest.mark.parametrize(("rows", "holdout"), [(ROWS, 180), (ROWS, 500), ([chat("only a question")], 0)])
def test_nothing_left(tmp_path: Path, rows: list[object], holdout: int) -> None:
    with pytest.raises(UserError, match="no row is left to train on"):
        prepare(rows, tmp_path, streaming=True, holdout=holdout)
