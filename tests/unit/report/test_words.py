"""Figures as people read them, and the rows of a preview."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_tune.report import mask, words
from gemma_tune.report.answers import make_answers, squeezed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.8293382, "2.829"),
        (107.89, "107.9"),
        (5798.4, "5,798"),
        (0.0004711, "0.0004711"),
        (2.22e-5, "2.22e−5"),
        (1e-5, "1e−5"),
        (-0.51, "−0.5100"),
        (12_345_678.0, "1.23e7"),
        (0, "0"),
        (None, "–"),
        (float("nan"), "–"),
        (True, "–"),
        ("3", "–"),
    ],
)
def test_figures(value: Any, text: str) -> None:
    assert words.figure(value) == text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (words.duration(4.23), "4.2 s"),
        (words.duration(59.96), "1 min 00 s"),
        (words.duration(203), "3 min 23 s"),
        (words.duration(7500), "2 h 05 min"),
        (words.duration(None), "–"),
        (words.size(4525912064), "4.22 GiB"),
        (words.size(5_000_000), "5 MiB"),
        (words.short_count(41_416), "41.4 k"),
        (words.short_count(9_999), "9,999"),
        (words.short_count(123_456_789), "123 M"),
        (words.change(4.0, 2.0), "−50.0 %"),
        (words.change(0, 2.0), ""),
        (words.when("2026-11-23T23:03:28+00:00"), "23 November 2026, 23:03 UTC"),
        (words.when("2026-11-23T23:03:28+02:00"), "23 November 2026, 23:03 +0200"),
        (words.when("soon"), "–"),
        (words.cut("abcdef", 4), "abcd… (2 characters more)"),
        (words.signed(0.25), "+0.250"),
    ],
)
def test_sizes_and_times(found: str, text: str) -> None:
    assert found == text


def test_a_preview_is_read_back_into_stretches() -> None:
    part = {
        "name": "row",
        "tokens": 40,
        "text": "<bos>Who?<end>Me.<bos>",
        "lengths": "5 4 5 3 5",
        "kinds": "PptTP",
        "begins": "4",
        "more": 35,
    }
    (row,) = mask.rows({"data": {"preview": [{"held_out": False, "label": "good", "parts": [part]}]}})
    (found,) = row.parts
    assert row.label == "good" and found.trained == 2 and found.more == 35
    assert [(stretch.trained, stretch.begins) for stretch in found.stretches] == [
        (False, False),
        (True, False),
        (False, True),
    ]
    assert [piece.text for stretch in found.stretches for piece in stretch.pieces] == [
        "<bos>",
        "Who?",
        "<end>",
        "Me.",
        "<bos>",
    ]
    assert found.stretches[0].pieces[0].control and not found.stretches[0].pieces[1].control
    assert mask.rows({}) == []


def test_many_steps_are_thinned_and_the_ends_stay() -> None:
    samples = [
        {"step": step, "prompt": "q", "answer": f"at {step}", "ended": True, "tokens": 1} for step in range(0, 101, 10)
    ]
    found = make_answers(samples, {"results": {"steps": 100}}, prompts=5, between=3, characters=50)
    (prompt,) = found.prompts
    assert [said.when for said in prompt.sides] == ["before", "after"] and found.steps == 11
    assert [said.when for said in prompt.between] == ["step 10", "step 50", "step 90"]


def test_without_samples_the_answers_of_run_json_are_shown() -> None:
    row = {
        "prompt": "q",
        "base": {"text": "b", "ended": False, "tokens": 3},
        "tuned": {"text": "t", "ended": True, "tokens": 2, "score": 0.5},
    }
    found = make_answers([], {"results": {"steps": 9, "answers": [row]}}, prompts=5, between=3, characters=50)
    before, after = found.prompts[0].sides
    assert (before.text, before.ended, after.text, after.about) == ("b", False, "t", "2 tokens, score 0.500")


def test_line_breaks_that_only_take_room_are_counted() -> None:
    assert squeezed("a\n\nb") == "a\n\nb"
    assert squeezed("\n" * 13) == "[13 line breaks]"
    assert squeezed("a\n \n\n\nb") == "a\n[4 line breaks]\nb"
