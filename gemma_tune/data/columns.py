"""Columns by our names: renames that a recipe asks for, and renames that an error suggests. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from gemma_tune.data.cells import Row, RowError, listed

SYNONYMS: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "msgs"),
    "conversations": ("conversation", "items"),
    "prompt": ("question", "query", "input", "instruction", "user"),
    "completion": ("response", "answer", "output", "assistant", "target", "reply"),
    "instruction": ("question", "prompt", "query"),
    "input": ("context",),
    "system": ("system_prompt",),
    "output": ("response", "answer", "completion"),
    "text": ("content", "document", "body", "sentence"),
    "quote": ("text",),
    "author": ("by", "name"),
    "data": ("dialogue", "turns"),
    "chosen": ("preferred", "accepted", "better", "winner", "chosen_response", "response_chosen", "answer_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected", "answer_rejected"),
    "label": ("desirable", "is_desirable", "thumbs_up", "good", "is_good", "liked", "feedback", "kto_tag"),
    "score_chosen": ("chosen_score", "rating_chosen", "chosen_rating"),
    "score_rejected": ("rejected_score", "rating_rejected", "rejected_rating"),
}
"""Our column name -> names under which public sets keep the same thing. Only used to suggest `data.sources.columns`."""


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with our names for its columns (`data.sources.columns`: ours -> theirs).

    Raises:
        RowError: it has no column of that name.
    """
    if not columns:
        return row
    absent = [theirs for theirs in columns.values() if theirs not in row]
    if absent:
        near = difflib.get_close_matches(absent[0], [str(name) for name in row], 1)
        raise RowError(
            f"no column {absent[0]!r}; columns found: {listed(row)}",
            fix=f"did you mean {near[0]!r}?" if near else "correct data.sources.columns",
            kind=f"no column {absent[0]!r}",
        )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def suggest_columns(missing: Iterable[str], found: Collection[str]) -> str:
    """What to write in the recipe so that `missing` are found; empty where nothing is near enough."""
    pairs = []
    for column in missing:
        candidates = [name for name in SYNONYMS.get(column, ()) if name in found]
        candidates += difflib.get_close_matches(column, [str(name) for name in found], 1)
        if not candidates:
            return ""
        pairs.append(f"{column}: {candidates[0]}")
    return f"set data.sources.columns: {{{', '.join(pairs)}}}"
