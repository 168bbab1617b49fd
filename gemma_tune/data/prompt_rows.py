"""A dataset row becomes a prompt: any layout of a conversation, a pair or a judged answer, or a prompt by itself. Pure.

The prompt is everything before the last turn of the model; a row that ends with another turn is a prompt as it is. A
row that does not have its layout raises `RowError`, never anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_tune.data import preferences, rows
from gemma_tune.data.cells import Row, RowError, kind_of
from gemma_tune.data.columns import renamed
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Example

UNANSWERED = {"prompt_completion": "completion", "alpaca": "output"}
"""Shape -> its column of answers, without which a row is a prompt all the same. In order of detection."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks.

    Attributes:
        prompt: turns of which the last is not the model's. There may be none, where the row has nothing before it.
        group: rows that share it stay on one side of the holdout; empty for the first user turn.
    """

    prompt: Conversation
    group: str = ""


def normalise_prompt(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Asked:
    """One row as what it asks.

    Args:
        row: column name -> value.
        format: a name in `rows.SHAPES` or `preferences.LAYOUTS`, or `auto`.
        columns: renames, our column name -> the row's.

    Raises:
        RowError: the row holds no prompt. No other exception leaves this function.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {kind_of(row)}, not an object with columns", kind="row is not an object")
    row = renamed(row, columns or {})
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    if format in preferences.LAYOUTS or (pair and format == "auto"):
        return asked(preferences.normalise_pair(row, format))
    if format == "auto":
        format = _unanswered(row) or format
    if (answer := UNANSWERED.get(format)) and row.get(answer) is None:
        row = {**row, answer: ""}
    return asked(rows.normalise(row, format), preferences.group_of_row(row))


def asked(example: Example | Answered, group: str = "") -> Asked:
    """What is asked in it. Several messages of the model in a row are one turn.

    Args:
        group: that its row names. A preference and a judged answer bring their own.

    Raises:
        RowError: it is plain text.
    """
    if isinstance(example, Document):
        raise RowError(
            "is plain text: nobody asks and nobody answers, so there is no prompt",
            fix="name a set with turns or prompts, or, where each text is a prompt, set "
            "data.sources.columns: {prompt: text}",
            kind="plain text",
        )
    prompt = example.conversation() if isinstance(example, Answered) else example
    turns = prompt.messages
    end = len(turns)
    while end and turns[end - 1].role == "model":
        end -= 1
    named = group or (example.group if isinstance(example, Answered) else "")
    return Asked(replace(prompt, messages=tuple(turns[:end])), named)


def _unanswered(row: Row) -> str:
    """The shape whose answers the row lacks; empty where it has some shape as it is, or none.

    Text beside a prompt is no turn of it (sets hold both as one text there).
    """
    filled = {name for name, value in row.items() if value is not None}
    if any(filled.issuperset(shape.required) for shape in rows.SHAPES.values() if shape.name != "text"):
        return ""
    shapes = (
        name for name, answer in UNANSWERED.items() if filled.issuperset({*rows.SHAPES[name].required} - {answer})
    )
    return next(shapes, "")
