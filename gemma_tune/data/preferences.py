"""A dataset row becomes a prompt and two answers: one reader for each layout in which public sets keep pairs.

The layout is chosen by the names of the columns and by what the cells hold, or forced by the recipe. Every function
here is pure. A row that does not have its layout raises `RowError`, never anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from gemma_tune.data import rows
from gemma_tune.data.cells import Row, RowError, as_number, as_text, kind_of, listed
from gemma_tune.data.columns import renamed, suggest_columns
from gemma_tune.data.messages import openai_message, sharegpt_message, system_turn, thinking_of, tools_of, turns_of
from gemma_tune.gemma.conversation import Message, Preference, Role


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout of pairs: the columns that it must have, and what reads it."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Row], Preference]


LAYOUTS: dict[str, Layout] = {}

RATINGS = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
"""Columns in which public sets keep how good each answer was found, on one scale for both."""

ReadMessage = Callable[[Row, str], Message]


def _layout(name: str, *required: str) -> Callable[[Callable[[Row], Preference]], Callable[[Row], Preference]]:
    def register(read: Callable[[Row], Preference]) -> Callable[[Row], Preference]:
        LAYOUTS[name] = Layout(name, required, read)
        return read

    return register


# ---------------------------------------------------------------------------------------------------- entry points


def normalise_pair(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Preference:
    """One row as a preference.

    Args:
        row: column name -> value.
        format: a name in `LAYOUTS`, or `auto`.
        columns: renames, our column name -> the row's.

    Raises:
        RowError: the row holds no pair in this layout. No other exception leaves this function.
    """
    if isinstance(row, Preference):
        return row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {kind_of(row)}, not an object with columns", kind="row is not an object")
    row = renamed(row, columns or {})
    if format != "auto" and format not in LAYOUTS:
        raise RowError(
            f"format {format!r} holds no pairs; formats of pairs: {', '.join(LAYOUTS)}",
            fix="set data.sources.format: auto, or stage: sft",
            kind="format without pairs",
        )
    layout = LAYOUTS[detect_layout(row) if format == "auto" else format]
    for column in layout.required:
        if column not in row:
            raise RowError(
                f"no column {column!r}; columns found: {listed(row)}",
                fix=suggest_columns([column], row) or f"name it in data.sources.columns: {{{column}: ...}}",
                kind=f"no column {column!r}",
            )
    try:
        return layout.read(row)
    except RecursionError:
        raise RowError("is nested too deeply", kind="nested too deeply") from None


def detect_layout(row: Row) -> str:
    """The name of the layout that the row has. Sets that were joined fill only their own columns: null is no cell.

    Raises:
        RowError: it holds no pair, or nothing that the answers answer; says what to do.
    """
    filled = {name for name, value in row.items() if value is not None}
    missing = [column for column in ("chosen", "rejected") if column not in filled]
    if missing:
        raise _no_pair(row, filled, missing)
    answers = (row["chosen"], row["rejected"])
    chats = all(isinstance(answer, (list, tuple)) for answer in answers)
    if "prompt" in filled:
        return "preference"
    if "conversations" in filled and not chats:
        return "sharegpt_preference"
    if "messages" in filled and not chats:
        return "messages_preference"
    if "question" in filled:
        return "question_preference"
    if chats:
        return "preference"
    if all(isinstance(answer, str) and _DIALOGUE.match(answer) for answer in answers):
        return "dialogue_preference"
    raise _no_prompt(filled)


def _no_pair(row: Row, filled: Collection[str], missing: list[str]) -> RowError:
    if len(missing) == 2 and (suggestion := suggest_columns(missing, filled)):
        return RowError(f"no columns 'chosen' and 'rejected'; found: {listed(row)}", fix=suggestion, kind="no pair")
    if len(missing) == 2:
        try:
            shape = rows.detect_format(filled)
        except RowError:
            known = "; ".join(f"{layout.name} ({', '.join(layout.required)})" for layout in LAYOUTS.values())
            return RowError(
                f"the columns {listed(row)} hold no pair of answers: {known}",
                fix="name the answers in data.sources.columns: {chosen: ..., rejected: ...}",
                kind="no pair",
            )
        if "label" in filled:
            return RowError(
                f"the rows hold no pairs but single answers with a 'label'; columns found: {listed(row)}",
                fix="set stage: kto, or name a set with two answers to a prompt, such as ultrafeedback",
                kind="no pair",
            )
        return RowError(
            f"the rows hold no pairs: this is a set for sft ({shape}); columns found: {listed(row)}",
            fix="set stage: sft, or name a set with two answers to a prompt, such as ultrafeedback",
            kind="no pair",
        )
    return RowError(
        f"no column {missing[0]!r}, or it is null; columns found: {listed(row)}",
        fix=suggest_columns(missing, filled) or f"name it in data.sources.columns: {{{missing[0]}: ...}}",
        kind=f"no column {missing[0]!r}",
    )


def _no_prompt(found: Collection[str]) -> RowError:
    return RowError(
        f"there is no prompt: 'chosen' and 'rejected' are answers, and there is no column 'prompt'; "
        f"columns found: {listed(found)}",
        fix=suggest_columns(["prompt"], set(found) - {"chosen", "rejected"})
        or "name it in data.sources.columns: {prompt: ...}",
        kind="no prompt",
    )


# --------------------------------------------------------------------------------------------------------- layouts


@_layout("preference", "chosen", "rejected")
def preference(row: Row) -> Preference:
    """`chosen` and `rejected`: texts or lists of messages; `prompt`: text or messages, unless both are whole chats.

    In the rows of ultrafeedback_binarized `prompt` repeats the first user turn of both chats: the chats count.
    """
    prompt = row.get("prompt")
    if prompt is None:
        return _preference(row, None, openai_message)
    if isinstance(prompt, str):
        return _preference(row, [Message("user", as_text(prompt, "prompt"))], openai_message, repeated=True)
    turns = [prompt] if isinstance(prompt, Mapping) else prompt
    return _preference(row, turns_of(turns, "prompt", openai_message), openai_message)


@_layout("question_preference", "question", "chosen", "rejected")
def question_preference(row: Row) -> Preference:
    """`question`, `chosen` and `rejected`, with `system` where there is one (Intel/orca_dpo_pairs)."""
    question = [Message("user", as_text(row["question"], "question"))]
    return _preference(row, question, openai_message, repeated=True)


@_layout("sharegpt_preference", "conversations", "chosen", "rejected")
def sharegpt_preference(row: Row) -> Preference:
    """`conversations`: the turns before the answers as `{from, value}`; `chosen` and `rejected`: one such turn each."""
    return _preference(row, turns_of(row["conversations"], "conversations", sharegpt_message), sharegpt_message)


@_layout("messages_preference", "messages", "chosen", "rejected")
def messages_preference(row: Row) -> Preference:
    """`messages`: the turns before the answers as `{role, content}`; `chosen` and `rejected`: one message each."""
    return _preference(row, turns_of(row["messages"], "messages", openai_message), openai_message)


@_layout("dialogue_preference", "chosen", "rejected")
def dialogue_preference(row: Row) -> Preference:
    """`chosen` and `rejected`: dialogues as text, each turn behind `Human:` or `Assistant:` (Anthropic/hh-rlhf)."""
    chosen, rejected = (dialogue_turns(row[side], side) for side in ("chosen", "rejected"))
    return _from_chats(row, [*system_turn(row), *chosen], [*system_turn(row), *rejected])


_SPEAKERS: dict[str, Role] = {"Human": "user", "Assistant": "model"}
_DIALOGUE = re.compile(r"\s*(?:Human|Assistant):")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def dialogue_turns(value: Any, where: str) -> list[Message]:
    r"""The turns of a dialogue that is kept as one text (`\n\nHuman: ...\n\nAssistant: ...`), each trimmed.

    Raises:
        RowError: it is no text, or does not begin with a speaker.
    """
    text = as_text(value, where)
    before, *parts = _SPEAKER.split(text)
    if before or not parts:
        raise RowError("does not begin with 'Human:' or 'Assistant:'", where, kind="no dialogue")
    return [Message(_SPEAKERS[speaker], said.strip()) for speaker, said in zip(parts[::2], parts[1::2], strict=True)]


# ----------------------------------------------------------------------------------------------------- their parts


def _preference(row: Row, prompt: list[Message] | None, read: ReadMessage, *, repeated: bool = False) -> Preference:
    """From `prompt` and the answers of the row, or from two chats where `prompt` is None or the answers are chats.

    Args:
        prompt: turns before the answers, without the row's system turn.
        read: reads a message of an answer.
        repeated: chats hold `prompt` themselves, so that it needs no comparison with them.
    """
    chosen, rejected = (_turns(row[side], side, read) for side in ("chosen", "rejected"))
    whole = [prompt is None or turns[0].role != "model" for turns in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise RowError(
            "one of 'chosen' and 'rejected' is a whole chat, the other an answer alone",
            fix="write both in one way, or set data.on_bad_row: drop",
            kind="a chat against an answer",
        )
    system = list(system_turn(row))
    if prompt is None or whole[0]:
        if prompt is not None and not repeated:
            for side, turns in (("chosen", chosen), ("rejected", rejected)):
                if _shared(prompt, turns) != len(prompt):
                    raise RowError("does not begin with the turns of 'prompt'", side, kind="prompt and chat differ")
        return _from_chats(row, system + chosen, system + rejected)
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(turns, side)
    return _finished(row, system + prompt, chosen[0], rejected[0])


def _from_chats(row: Row, chosen: list[Message], rejected: list[Message]) -> Preference:
    """The prompt is what both chats share, turn by turn. Their last turns are not shared, even where they are equal."""
    shared = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not shared:
        raise RowError("'chosen' and 'rejected' share no first turn, so there is no prompt", kind="no prompt")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(turns[shared:], side)
    return _finished(row, chosen[:shared], chosen[shared], rejected[shared])


def _finished(row: Row, prompt: Sequence[Message], chosen: Message, rejected: Message) -> Preference:
    return Preference(
        tuple(prompt),
        chosen,
        rejected,
        tools=tools_of(row.get("tools")),
        thinking=thinking_of(row),
        margin=_margin(row),
        group=group_of_row(row),
    )


def _turns(value: Any, side: str, read: ReadMessage) -> list[Message]:
    if isinstance(value, (str, type(None))):
        return [Message("model", as_text(value, side))]
    if isinstance(value, Mapping):
        return [read(value, side)]
    return turns_of(value, side, read)


def _check_answer(turns: Sequence[Message], side: str) -> None:
    if len(turns) > 1:
        raise RowError(
            f"has {len(turns)} turns behind what both sides share; an answer is one turn",
            side,
            fix="correct the row, or set data.on_bad_row: drop",
            kind="the answers are more than one turn",
        )
    if turns[0].role != "model":
        raise RowError(
            f"ends with a '{turns[0].role}' turn, not with an answer of the model",
            side,
            fix="correct the row, or set data.on_bad_row: drop",
            kind="an answer is not the model's",
        )


def _shared(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many turns two chats share from their beginning. Blanks around a text make no difference."""

    def same(pair: tuple[Message, Message]) -> bool:
        one, other = (replace(message, content=message.content.strip()) for message in pair)
        return one == other

    return sum(1 for _ in takewhile(same, zip(first, second, strict=False)))


def _margin(row: Row) -> float | None:
    """`margin`, else how much higher `chosen` was rated; None where one of the ratings is missing."""
    if (margin := _rating(row, "margin")) is not None:
        return margin
    for chosen, rejected in RATINGS:
        better, worse = _rating(row, chosen), _rating(row, rejected)
        if better is not None and worse is not None:
            return better - worse
    return None


def _rating(row: Row, column: str) -> float | None:
    """The number in a cell; a CSV file has it as text. None where the cell is empty."""
    value = row.get(column)
    if isinstance(value, str):
        with suppress(ValueError):  # `as_number` says what it is instead
            value = float(value) if value.strip() else None
    return None if value is None else as_number(value, column)


def group_of_row(row: Row) -> str:
    """The group that a row names; empty where it names none."""
    value = row.get("group")
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:x}"  # decimal digits of a huge number cannot be printed (sys.set_int_max_str_digits)
    return as_text(value, "group")
