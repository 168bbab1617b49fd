"""A dataset row becomes a conversation or a document: one normaliser per shape of row.

The shape is chosen by the names of the columns (`detect_format`) or forced by the recipe. Every function here is pure:
no file, no `datasets`, no tokenizer. A row that does not have its shape raises `RowError`, never anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.data.cells import Row, RowError, as_list, as_text, kind_of, listed
from gemma_tune.data.columns import SYNONYMS, renamed, suggest_columns
from gemma_tune.data.messages import openai_message, sharegpt_message, system_turn, thinking_of, tools_of, turns_of
from gemma_tune.gemma.conversation import Conversation, Document, Example, Message, Role


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of row: the columns that it must have, and what reads it."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Row], Example]


SHAPES: dict[str, Shape] = {}
"""In order of detection: `ultrachat_200k` has `prompt` beside `messages`, so `messages` comes first."""


def _shape(name: str, *required: str) -> Callable[[Callable[[Row], Example]], Callable[[Row], Example]]:
    def register(read: Callable[[Row], Example]) -> Callable[[Row], Example]:
        SHAPES[name] = Shape(name, required, read)
        return read

    return register


# ---------------------------------------------------------------------------------------------------- entry points


def detect_format(columns: Collection[str]) -> str:
    """The name of the first shape whose columns are all there.

    Raises:
        RowError: no shape fits; lists what was found and suggests renames.
    """
    for shape in SHAPES.values():
        if all(column in columns for column in shape.required):
            return shape.name
    if {"chosen", "rejected"}.issubset(columns):
        raise _holds_pairs(columns)
    known = "; ".join(f"{shape.name} ({', '.join(shape.required)})" for shape in SHAPES.values())
    raise RowError(
        f"the columns {listed(columns)} fit no known shape: {known}",
        fix=_suggest_rename(columns) or "set data.sources.columns and data.sources.format",
        kind="unknown columns",
    )


def _holds_pairs(columns: Collection[str]) -> RowError:
    answer = "completion" if "prompt" in columns else "messages"
    return RowError(
        f"the rows hold pairs of answers (chosen, rejected): this is a set for reward, dpo and kto; "
        f"columns found: {listed(columns)}",
        fix="set stage: dpo, reward or kto, or train on the better answers: "
        f"data.sources.columns: {{{answer}: chosen}}",
        kind="pairs of answers",
    )


def _detected(row: Row) -> str:
    """As `detect_format`. Sets that were joined have the columns of both, of which one row fills only its own."""
    filled = {name for name, value in row.items() if value is not None}
    fits = [shape.name for shape in SHAPES.values() if filled.issuperset(shape.required)]
    if fits[:1] == ["sharegpt"] and filled.issuperset(("chosen", "rejected")):
        raise _holds_pairs(row)  # there the conversation ends before the answers
    return fits[0] if fits else detect_format(row)


def normalise(row: Any, format: str = "auto", columns: Mapping[str, str] | None = None) -> Example:
    """One row as an example.

    Args:
        row: column name -> value.
        format: a name in `SHAPES`, or `auto`.
        columns: renames, our column name -> the row's.

    Raises:
        RowError: the row does not have its shape. No other exception leaves this function.
    """
    if isinstance(row, (Conversation, Document)):
        return row
    if not isinstance(row, Mapping):
        raise RowError(f"the row is {kind_of(row)}, not an object with columns", kind="row is not an object")
    row = renamed(row, columns or {})
    if format != "auto" and format not in SHAPES:
        raise RowError(
            f"format {format!r} is none of conversations and texts; those are: {', '.join(SHAPES)}",
            fix="set data.sources.format: auto, or stage: dpo or reward for pairs of answers",
            kind="unknown format",
        )
    shape = SHAPES[_detected(row) if format == "auto" else format]
    missing = [column for column in shape.required if column not in row]
    if missing:
        raise RowError(
            f"no column {missing[0]!r}; columns found: {listed(row)}",
            fix=suggest_columns(missing, row) or f"name it in data.sources.columns: {{{missing[0]}: ...}}",
            kind=f"no column {missing[0]!r}",
        )
    try:
        return shape.read(row)
    except RecursionError:
        raise RowError("is nested too deeply", kind="nested too deeply") from None


# ---------------------------------------------------------------------------------------------------------- shapes


@_shape("messages", "messages")
def messages(row: Row) -> Conversation:
    """`messages`: a list of `{role, content}`, with tool calls and reasoning where there are any; `tools` beside it."""
    turns = turns_of(row["messages"], "messages", openai_message)
    return Conversation((*system_turn(row), *turns), tools=tools_of(row.get("tools")), thinking=thinking_of(row))


@_shape("sharegpt", "conversations")
def sharegpt(row: Row) -> Conversation:
    """`conversations`: a list of `{from, value}` (or `{role, content}`); `system` and `tools` may stand beside it."""
    turns = turns_of(row["conversations"], "conversations", sharegpt_message)
    return Conversation((*system_turn(row), *turns), tools=tools_of(row.get("tools")), thinking=thinking_of(row))


@_shape("prompt_completion", "prompt", "completion")
def prompt_completion(row: Row) -> Conversation:
    """`prompt` and `completion`: both text, or lists of messages."""
    turns: list[Message] = [*system_turn(row)]
    for column, role in (("prompt", "user"), ("completion", "model")):
        value = row[column]
        if isinstance(value, str) or value is None:
            turns.append(Message(role, as_text(value, column)))  # type: ignore[arg-type]
        else:
            turns.extend(turns_of(value, column, openai_message))
    return Conversation(tuple(turns), tools=tools_of(row.get("tools")), thinking=thinking_of(row))


@_shape("alpaca", "instruction", "output")
def alpaca(row: Row) -> Conversation:
    """`instruction`, `input` (may be missing or empty) and `output`; `history` holds earlier [user, model] pairs."""
    turns: list[Message] = [*system_turn(row)]
    for index, pair in enumerate(as_list(row.get("history") or [], "history", empty=True)):
        where = f"history[{index}]"
        asked, answered = _pair(pair, where)
        turns += [Message("user", as_text(asked, f"{where}[0]")), Message("model", as_text(answered, f"{where}[1]"))]
    instruction = as_text(row["instruction"], "instruction")
    extra = row.get("input")
    extra = "" if extra is None else as_text(extra, "input")
    turns.append(Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction))
    turns.append(Message("model", as_text(row["output"], "output")))
    return Conversation(tuple(turns))


@_shape("quotes", "quote", "author")
def quotes(row: Row) -> Conversation:
    """`quote` and `author`: the user gives the beginning of a quote, the model the whole of it and its author.

    The text form of the 2024 notebook (`Quote: ...` newline `Author: ...`) as a conversation. Every row is one example.
    Surrounding quotation marks go, an author loses a trailing comma and the book behind a comma.
    """
    quote = _unquoted(as_text(row["quote"], "quote"))
    if not quote:
        raise RowError("is empty", "quote", kind="empty quote")
    author = _author(as_text(row["author"], "author"))
    words = quote.split()
    # At most half of the quote, so that something is left to say; four words name most quotes.
    beginning = " ".join(words[: max(1, min(4, len(words) // 2))])
    return Conversation((Message("user", f"Quote: {beginning}"), Message("model", f"Quote: {quote}\nAuthor: {author}")))


@_shape("string_list", "data")
def string_list(row: Row) -> Conversation:
    """`data`: a list of texts, user first, in turn. Every turn is used."""
    texts = as_list(row["data"], "data")
    roles: tuple[Role, Role] = ("user", "model")
    return Conversation(tuple(Message(roles[i % 2], as_text(text, f"data[{i}]")) for i, text in enumerate(texts)))


@_shape("text", "text")
def text(row: Row) -> Document:
    """`text`: plain text without turns."""
    value = as_text(row["text"], "text")
    if not value.strip():
        raise RowError("is empty", "text", kind="empty text")
    return Document(value)


@_shape("exchanges", "conversation")
def exchanges(row: Row) -> Conversation:
    """`conversation`: a list of `{input, output}`, one exchange each (Capybara)."""
    turns: list[Message] = [*system_turn(row)]
    for index, item in enumerate(as_list(row["conversation"], "conversation")):
        for key, role in (("input", "user"), ("output", "model")):
            where = f"conversation[{index}]"
            if not isinstance(item, Mapping) or key not in item:
                raise RowError(
                    f"has no {key!r}",
                    where,
                    fix="set data.sources.columns: {messages: conversation}, or {conversations: conversation}",
                    kind=f"exchange without {key!r}",
                )
            turns.append(Message(role, as_text(item[key], f"{where}.{key}")))  # type: ignore[arg-type]
    return Conversation(tuple(turns))


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    items = as_list(value, where)
    if len(items) != 2:
        raise RowError(f"has {len(items)} items, not [user, model]", where, kind="history is not pairs")
    return items[0], items[1]


_MARKS = {'"': '"', "“": "”", "«": "»", "„": "“", "‟": "”"}


def _unquoted(quote: str) -> str:
    """Without the quotation marks around the whole of it; marks inside stay."""
    quote = quote.strip()
    opening, closing = quote[:1], _MARKS.get(quote[:1], "")
    inside = quote[1:-1]
    if closing and len(quote) > 1 and quote.endswith(closing) and _balanced(inside, opening, closing):
        return inside.strip()
    if closing and closing not in quote[1:]:
        return quote[1:].strip()  # cut: only the opening mark is left
    if quote.endswith("”") and "“" not in quote:
        return quote[:-1].strip()
    return quote


def _balanced(text: str, opening: str, closing: str) -> bool:
    """False for the inside of `“Be,” he said, “quiet.”`, whose outer marks are no pair."""
    depth = 0
    for character in text:
        if character == closing:
            depth -= 1
        elif character == opening:
            depth += 1
        if depth < 0:
            return False
    return depth == 0


def _author(author: str) -> str:
    name, *rest = (part.strip() for part in author.strip().strip(",").split(","))
    if rest and re.fullmatch(r"(Jr|Sr|Ph\.?D|M\.?D|I{1,3}|IV)\.?", rest[0]):
        name = f"{name}, {rest[0]}"
    return name.strip() or "Unknown"


def _suggest_rename(found: Collection[str]) -> str:
    """For the shape of which a column is there already, else for the first that fits.

    With the columns that a row may lack: a rename without them would lose a system prompt, or Dolly's context.
    """
    for shape in sorted(SHAPES.values(), key=lambda shape: not any(column in found for column in shape.required)):
        missing = [column for column in shape.required if column not in found]
        optional = ("system", "input") if shape.name == "alpaca" else ("system",)
        if missing:
            missing += [ours for ours in optional if ours not in found and any(n in found for n in SYNONYMS[ours])]
        suggestion = suggest_columns(missing, found)
        if suggestion:
            return suggestion
    return ""
