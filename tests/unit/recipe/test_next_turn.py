"""The pairs of recipes/next_turn.py: nothing but the context tells which answer is the true one."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.sources import open_source
from tests.pair_baseline import held_out_accuracy

pytest.importorskip("chitchat_dataset", reason="needs the package chitchat-dataset")

RECIPES = Path(__file__).parents[3] / "recipes"


def read(name: str) -> list[dict[str, Any]]:
    return [row.value for row in open_source({"name": name}, wanted="preferences")]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return read(f"{RECIPES}/next_turn.py:pairs")


def test_each_text_is_chosen_once_and_rejected_once_within_its_group(rows: list[dict[str, Any]]) -> None:
    assert len(rows) > 2_500
    groups = {name: list(members) for name, members in groupby(rows, key=lambda row: row["group"])}
    assert len(groups) * 2 == len(rows)
    for first, second in groups.values():
        assert first["chosen"] == second["rejected"] and second["chosen"] == first["rejected"]
        assert first["prompt"] != second["prompt"]


def test_the_context_begins_and_ends_with_the_user(rows: list[dict[str, Any]]) -> None:
    lengths = Counter(len(row["prompt"]) for row in rows)
    assert set(lengths) == {3, 5}
    for row in rows:
        roles = [message["role"] for message in (*row["prompt"], *row["chosen"])]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(3 <= len(row[side][0]["content"].split()) <= 80 for side in ("chosen", "rejected"))


def test_the_true_answer_is_what_the_dialogue_goes_on_with(rows: list[dict[str, Any]]) -> None:
    dialogues = {
        tuple(message["content"] for message in row["messages"]) for row in read(f"{RECIPES}/chitchat.py:rows")
    }
    runs = {
        talk[begin : begin + size] for talk in dialogues for size in (4, 6) for begin in range(len(talk) - size + 1)
    }
    for row in rows[:200]:
        context = tuple(message["content"] for message in row["prompt"])
        assert (*context, row["chosen"][0]["content"]) in runs
        assert (*context, row["rejected"][0]["content"]) not in runs


def test_several_places_of_a_couple_share_its_group(rows: list[dict[str, Any]]) -> None:
    more = read(f"{RECIPES}/next_turn.py:pairs_all")
    sizes = Counter(row["group"] for row in more)
    assert set(sizes) == {row["group"] for row in rows}
    assert max(sizes.values()) == 10 and len(more) > 3 * len(rows)


def test_a_copy_finds_the_dialogues_beside_it(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for name in ("next_turn.py", "chitchat.py"):
        shutil.copy(RECIPES / name, tmp_path)
    assert read(f"{tmp_path}/next_turn.py:pairs")[:10] == rows[:10]


def test_length_alone_says_nothing_and_shared_words_say_much(rows: list[dict[str, Any]]) -> None:
    """The number to beat: what a reward model finds must be more than words of the context that come again."""
    train, held_out = rows[:2000], rows[2000:]
    assert held_out_accuracy(train, held_out, columns=[0]) == 0.5
    assert 0.68 < held_out_accuracy(train, held_out) < 0.80
