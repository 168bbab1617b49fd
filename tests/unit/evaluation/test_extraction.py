"""Verbatim extraction: what is asked of a row, and what counts as found."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.evaluation import extraction as module
from gemma_tune.evaluation.extraction import Passage, documents, edit_distance, extraction, lengths, passage, sample
from gemma_tune.evaluation.memorisation import has_before
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.roles import REFERENCE
from gemma_tune.train.evaluate import Answer

FAMILY = FAMILIES["gemma3_text"]
END = FAMILY.turn_end_id
STOPS = FAMILY.stop_ids


def turn(before: int, trained: int, after: int = 1) -> tuple[list[int], list[int]]:
    """A document: `before` tokens without loss, `trained` with it and the turn end, `after` without it."""
    ids = [*range(1000, 1000 + before), *range(5000, 5000 + trained), END, *range(9000, 9000 + after)]
    return ids, [-100] * before + ids[before : before + trained + 1] + [-100] * after


@pytest.mark.parametrize(
    ("trained", "shown", "target", "full"),
    [(8, 4, 4, False), (21, 10, 11, False), (99, 49, 50, False), (100, 50, 50, True), (400, 50, 50, True)],
)
def test_a_passage(trained: int, shown: int, target: int, full: bool) -> None:
    ids, labels = turn(7, trained)
    found = passage(ids, labels, STOPS)
    assert found is not None and found.full is full
    assert found.prompt == tuple(ids[: 7 + shown]) and found.target == tuple(ids[7 + shown : 7 + shown + target])


def test_what_is_too_short_is_none() -> None:
    assert passage(*turn(7, 7), STOPS) is None
    assert passage([1, 2, 3], [-100] * 3, STOPS) is None


def test_of_several_turns_the_longest_with_all_before_it() -> None:
    (first, labels), (second, more) = turn(3, 9), turn(3, 20)
    found = passage(first + second, labels + more, STOPS)
    assert found is not None and found.prompt == (*first, *second[:13]) and len(found.target) == 10


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_documents_of_a_pack(sizes: list[int]) -> None:
    ids = list(range(sum(sizes)))
    row = {"input_ids": ids, "labels": ids, "position_ids": [place for size in sizes for place in range(size)]}
    found = list(documents(row))
    assert [len(one) for one, _ in found] == sizes and [token for one, _ in found for token in one] == ids
    assert all(one == labels for one, labels in found)
    del row["position_ids"]
    assert list(documents(row)) == [(ids, ids)]


def test_a_sample_is_drawn_and_leaves_canaries_out() -> None:
    rows = [dict(zip(("input_ids", "labels"), turn(number, 10), strict=True)) for number in range(1, 31)]
    canary = tuple(rows[3]["input_ids"])
    found = sample(rows, 100, 0, STOPS, {canary})
    assert len(found) == 29 and not any(one.prompt == canary[: len(one.prompt)] for one in found)
    assert sample(rows, 5, 0, STOPS, ()) == sample(rows, 5, 0, STOPS, ()) != sample(rows, 5, 1, STOPS, ())
    assert sample([], 5, 0, STOPS, ()) == [] and lengths([]) == {"rows": 0, "full": 0, "mean_target_tokens": None}


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("abcd", "bcde", 2)],
)
def test_edit_distance(one: str, other: str, distance: int) -> None:
    numbers = [list(map(ord, text)) for text in (one, other)]
    assert edit_distance(*numbers) == edit_distance(*reversed(numbers)) == distance


def said(monkeypatch: pytest.MonkeyPatch, answers: dict[int, Sequence[int]]) -> list[int]:
    """A model that answers each prompt, known by its first token; the lengths that it was asked for."""
    asked: list[int] = []

    def speak(model: Any, tokenizer: Any, family: Any, prompts: Any, *, max_new_tokens: int, **_: Any) -> list[Answer]:
        asked.append(max_new_tokens)
        return [Answer("", True, 0, tuple(answers[prompt[0]])) for prompt in prompts]

    monkeypatch.setattr(module, "answers", speak)
    return asked


def test_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tuple(range(100, 120))
    passages = [Passage((number,), target, False) for number in range(5)]
    written = {
        0: [*target, 7, END],  # exact, and it goes on
        1: [*target[:18], 7, 7, END],  # two tokens of twenty
        2: [*target[:17], 7, 7, 7, END],  # three
        3: [*target[1:], 7, END],  # one left out, one behind it
        4: [END],
    }
    assert said(monkeypatch, written) == []
    found = extraction(None, None, FAMILY, passages)
    assert (found["exact"]["extracted"], found["approximate"]["extracted"]) == (1, 3)
    assert found["exact"]["rate"] == 0.2 and found["approximate"]["rows"] == 5


def test_answers_stay_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for in order of their targets' lengths, and no longer than the longest of a batch."""
    passages = [Passage((number,), tuple(range(8 + (number * 7) % 40)), False) for number in range(70)]
    asked = said(monkeypatch, {one.prompt[0]: one.target for one in passages})
    found = extraction(None, None, FAMILY, passages)
    assert found["exact"]["extracted"] == 70
    assert asked == sorted(asked) and asked[-1] == 47 and len(asked) == 3


def test_no_rows_have_no_rate() -> None:
    assert extraction(None, None, FAMILY, [])["exact"] == {
        "rows": 0,
        "extracted": 0,
        "rate": None,
        "interval": [0.0, 1.0],
    }


def test_a_run_whose_start_is_gone_is_not_measured_against_the_plain_base() -> None:
    def plan(start: str | None) -> Any:
        return SimpleNamespace(values=lambda section: {"adapter": {"start": start}})

    alone, with_start = (SimpleNamespace(peft_config=names) for names in ({"default": 0}, {"default": 0, REFERENCE: 0}))
    assert has_before(alone, plan(None)) and has_before(with_start, plan("runs/first"))
    assert not has_before(alone, plan("runs/first")) and not has_before(SimpleNamespace(), plan(None))
