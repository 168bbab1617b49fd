"""The rows that run.json keeps: text, tokens and mask are those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.build import Prepared
from gemma_tune.data.preview import ROWS, TOKENS, preview
from gemma_tune.report import mask
from tests.unit.data.toys import FIRST_BYTE, GEMMA3, chat, decoded, prepare

CONTROL = frozenset(GEMMA3.tokens.values())


class Rows(list[Any]):
    """Stands for a dataset."""


def prepared_of(*rows: dict[str, Any], held_out: Sequence[dict[str, Any]] = ()) -> Prepared[Any]:
    return Prepared(Rows(rows), Rows(held_out), [], None, "")  # type: ignore[arg-type]


def piecewise(ids: Sequence[int]) -> str:
    """As a tokenizer decodes: half a character is U+FFFD."""
    spelled = {number: token for token, number in GEMMA3.tokens.items()}
    parts = (spelled[number].encode() if number in spelled else bytes([number - FIRST_BYTE]) for number in ids)
    return b"".join(parts).decode("utf-8", "replace")


def shown(stage: str, prepared: Prepared[Any], **more: Any) -> list[mask.Row]:
    return mask.rows({"data": {"preview": preview(stage, prepared, CONTROL, piecewise, **more)}})


def texts(part: mask.Part, *, trained: bool) -> str:
    return "".join(piece.text for one in part.stretches if one.trained is trained for piece in one.pieces)


@pytest.mark.parametrize("packing", [True, False])
def test_what_is_marked_is_what_carries_loss(tmp_path: Path, packing: bool) -> None:
    conversations = [chat(f"question {number} ü€😀", f"answer {number} 😀") for number in range(6)]
    prepared = prepare(conversations, tmp_path, packing=packing)
    found = shown("sft", prepared)
    assert len(found) == min(ROWS, len(prepared.train))
    for row, real in zip(found, prepared.train, strict=False):
        (part,) = row.parts
        assert part.tokens == len(real["input_ids"])
        if part.more:
            continue
        assert texts(part, trained=True) == decoded([label for label in real["labels"] if label != -100])
        whole = "".join(piece.text for one in part.stretches for piece in one.pieces)
        assert whole == decoded(real["input_ids"]) and "\ufffd" not in whole
        documents = sum(position == 0 for position in real.get("position_ids", [0]))
        assert sum(one.begins for one in part.stretches) == documents - 1
        assert all(piece.control == piece.text.startswith("<") for one in part.stretches for piece in one.pieces)


def test_long_rows_are_cut_and_say_so() -> None:
    ids = [ord("a") + 300] * (TOKENS + 7)
    (row,) = preview("sft", prepared_of({"input_ids": ids, "labels": ids}), CONTROL, lambda one: "x" * len(one))
    (part,) = row["parts"]
    assert part["tokens"] == TOKENS + 7 and part["more"] == 7 and len(part["kinds"]) == TOKENS


def letters(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("stage", "row", "trained"),
    [
        ("dpo", {"prompt_ids": "ask", "chosen_ids": "yes", "rejected_ids": "no"}, ["", "yes", "no"]),
        ("reward", {"prompt_ids": "ask", "chosen_ids": "yes", "rejected_ids": "no"}, ["", "s", "o"]),
        ("kto", {"prompt_ids": "ask", "completion_ids": "yes", "label": True}, ["", "yes"]),
        ("ppo", {"prompt_ids": "ask"}, [""]),
    ],
)
def test_what_carries_loss_in_other_stages(stage: str, row: dict[str, Any], trained: list[str]) -> None:
    row = {key: [ord(letter) for letter in value] if isinstance(value, str) else value for key, value in row.items()}
    document = preview(stage, prepared_of(row), frozenset(), letters)
    (found,) = mask.rows({"data": {"preview": document}})
    assert [texts(part, trained=True) for part in found.parts] == trained
    assert found.label == ("good" if stage == "kto" else "")


def test_a_stream_shows_what_is_held_out_and_a_secret_is_not_shown() -> None:
    class Stream:
        """Has no length, and must not be read."""

    def row(text: str) -> dict[str, Any]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": ids, "labels": ids}

    prepared = prepared_of(held_out=[row("secret"), row("plain")])
    object.__setattr__(prepared, "train", Stream())
    (found,) = preview("sft", prepared, frozenset(), letters, lambda text: text != "secret")
    assert found["held_out"] is True and found["parts"][0]["text"] == "plain"
