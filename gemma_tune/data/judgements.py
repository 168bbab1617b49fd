"""A dataset row becomes a judged answer: any layout of a conversation with a column `label`, or a pair. Pure.

A row that does not have its layout raises `RowError`, never anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tune.data import preferences, rows
from gemma_tune.data.cells import RowError, kind_of, listed
from gemma_tune.data.columns import renamed, suggest_columns
from gemma_tune.gemma.conversation import Answered, Document, Judged, Preference

LABEL = "label"
"""The column that says whether an answer is good (trl-lib/kto-mix-14k)."""


_WRITTEN = {"true": True, "1": True, "false": False, "0": False}


def normalise_judged(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Answered:
    """One row as a judged answer, or as a pair where it holds two.

    Args:
        row: column name -> value.
        format: a name in `rows.SHAPES` or `preferences.LAYOUTS`, or `auto`.
        columns: renames, our column name -> the row's.

    Raises:
        RowError: the row holds no judged answer. No other exception leaves this function.
    """
    if isinstance(row, (Judged, Preference)):
        return row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {kind_of(row)}, not an object with columns", kind="row is not an object")
    row = renamed(row, columns or {})
    pair = row.get("chosen") is not None and row.get("rejected") is not None
    if format in preferences.LAYOUTS or (pair and format == "auto"):
        return preferences.normalise_pair(row, format)
    if row.get(LABEL) in (None, ""):
        raise RowError(
            f"no column {LABEL!r}, or it is null, and no pair 'chosen' and 'rejected'; columns found: {listed(row)}",
            fix=suggest_columns([LABEL], row) or f"name it in data.sources.columns: {{{LABEL}: ...}}",
            kind="no label and no pair",
        )
    return judged(row, format)


def judged(row: Mapping[str, Any], format: str = "auto") -> Judged:
    """A conversation whose last turn is the answer, `label` beside it: `prompt`, `completion`, `label`, and others."""
    conversation = rows.normalise(row, format)
    if isinstance(conversation, Document):
        raise RowError("is plain text: there is no prompt and no answer", kind="plain text")
    *prompt, answer = conversation.messages
    if answer.role != "model":
        raise RowError(
            f"ends with a '{answer.role}' turn, not with an answer of the model",
            fix="correct the row, or set data.on_bad_row: drop",
            kind="an answer is not the model's",
        )
    if not prompt:
        raise RowError("has an answer and no prompt", kind="no prompt")
    return Judged(
        tuple(prompt),
        answer,
        _good(row[LABEL]),
        tools=conversation.tools,
        thinking=conversation.thinking,
        group=preferences.group_of_row(row),
    )


def _good(value: Any) -> bool:
    """True or false; 1 and 0 are what tables without booleans hold, and a CSV file holds either as text."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and (said := value.strip().lower()) in _WRITTEN:
        return _WRITTEN[said]
    raise RowError(
        f"is {kind_of(value)}, not true or false",
        LABEL,
        fix="write true for a good answer and false for a bad one (or 1 and 0)",
        kind="label is not true or false",
    )
