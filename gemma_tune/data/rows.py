"""A dataset row becomes a conversation or a document: one normaliser per shape of row.

The shape is chosen by the names of the columns (`detect_format`) or forced by the recipe. Every function here is pure:
no file, no `datasets`, no tokenizer. A row that does not have its shape raises `RowError`, never anything else.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.gemma.conversation import Conversation, Document, Example, Message, Role, ToolCall

Row = Mapping[str, Any]


class RowError(Exception):
    """A row cannot be used.

    Args:
        reason: what is wrong, without the place.
        where: place inside the row (`messages[2].content`), empty for the whole row.
        fix: what to do about it.
        kind: a short name that rows with the same fault share; it is what gets counted. By default `reason`.
    """

    def __init__(self, reason: str, where: str = "", *, fix: str = "", kind: str = "") -> None:
        super().__init__(f"{where} {reason}" if where else reason)
        self.reason = reason
        self.where = where
        self.fix = fix
        self.kind = kind or reason


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of row: the columns that it must have, and what reads it."""

    name: str
    required: tuple[str, ...]
    read: Callable[[Row], Example]


SHAPES: dict[str, Shape] = {}
"""In order of detection: `ultrachat_200k` has `prompt` beside `messages`, so `messages` comes first."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns", "msgs"),
    "conversations": ("conversation", "items"),
    "prompt": ("question", "query", "input", "instruction", "user"),
    "completion": ("response", "answer", "output", "assistant", "target", "reply"),
    "instruction": ("question", "prompt", "query"),
    "output": ("response", "answer", "completion"),
    "text": ("content", "document", "body", "sentence"),
    "quote": ("text",),
    "author": ("by", "name"),
    "data": ("dialogue", "turns"),
}
"""Our column name -> names under which public sets keep the same thing. Only used to suggest `data.sources.columns`."""


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
    known = "; ".join(f"{shape.name} ({', '.join(shape.required)})" for shape in SHAPES.values())
    raise RowError(
        f"the columns {_listed(columns)} fit no known shape: {known}",
        fix=_suggest_rename(columns) or "set data.sources.columns and data.sources.format",
        kind="unknown columns",
    )


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
        raise RowError(f"the row is {_kind(row)}, not an object with columns", kind="row is not an object")
    row = _renamed(row, columns or {})
    if format != "auto" and format not in SHAPES:
        raise RowError(f"unknown format {format!r}; known: {', '.join(SHAPES)}")
    shape = SHAPES[detect_format(row) if format == "auto" else format]
    missing = [column for column in shape.required if column not in row]
    if missing:
        raise RowError(
            f"no column {missing[0]!r}; columns found: {_listed(row)}",
            fix=_suggest_columns(missing, row) or f"name it in data.sources.columns: {{{missing[0]}: ...}}",
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
    turns = _turns(row["messages"], "messages", _message)
    return Conversation(tuple([*_system(row), *turns]), tools=_tools(row.get("tools")), thinking=_thinking(row))


@_shape("sharegpt", "conversations")
def sharegpt(row: Row) -> Conversation:
    """`conversations`: a list of `{from, value}` (or `{role, content}`); `system` and `tools` may stand beside it."""
    turns = _turns(row["conversations"], "conversations", _sharegpt_message)
    return Conversation(tuple([*_system(row), *turns]), tools=_tools(row.get("tools")), thinking=_thinking(row))


@_shape("prompt_completion", "prompt", "completion")
def prompt_completion(row: Row) -> Conversation:
    """`prompt` and `completion`: both text, or lists of messages."""
    turns: list[Message] = [*_system(row)]
    for column, role in (("prompt", "user"), ("completion", "model")):
        value = row[column]
        if isinstance(value, str) or value is None:
            turns.append(Message(role, _text(value, column)))  # type: ignore[arg-type]
        else:
            turns.extend(_turns(value, column, _message))
    return Conversation(tuple(turns), tools=_tools(row.get("tools")), thinking=_thinking(row))


@_shape("alpaca", "instruction", "output")
def alpaca(row: Row) -> Conversation:
    """`instruction`, `input` (may be missing or empty) and `output`; `history` holds earlier [user, model] pairs."""
    turns: list[Message] = [*_system(row)]
    for index, pair in enumerate(_list(row.get("history") or [], "history", empty=True)):
        where = f"history[{index}]"
        asked, answered = _pair(pair, where)
        turns += [Message("user", _text(asked, f"{where}[0]")), Message("model", _text(answered, f"{where}[1]"))]
    instruction = _text(row["instruction"], "instruction")
    extra = row.get("input")
    extra = "" if extra is None else _text(extra, "input")
    turns.append(Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction))
    turns.append(Message("model", _text(row["output"], "output")))
    return Conversation(tuple(turns))


@_shape("quotes", "quote", "author")
def quotes(row: Row) -> Conversation:
    """`quote` and `author`: the user gives the beginning of a quote, the model the whole of it and its author.

    The text form of the 2024 notebook (`Quote: ...` newline `Author: ...`) as a conversation. Every row is one example.
    Surrounding quotation marks go, an author loses a trailing comma and the book behind a comma.
    """
    quote = _unquoted(_text(row["quote"], "quote"))
    if not quote:
        raise RowError("is empty", "quote", kind="empty quote")
    author = _author(_text(row["author"], "author"))
    words = quote.split()
    # At most half of the quote, so that something is left to say; four words name most quotes.
    beginning = " ".join(words[: max(1, min(4, len(words) // 2))])
    return Conversation((Message("user", f"Quote: {beginning}"), Message("model", f"Quote: {quote}\nAuthor: {author}")))


@_shape("string_list", "data")
def string_list(row: Row) -> Conversation:
    """`data`: a list of texts, user first, in turn. Every turn is used."""
    texts = _list(row["data"], "data")
    roles: tuple[Role, Role] = ("user", "model")
    return Conversation(tuple(Message(roles[i % 2], _text(text, f"data[{i}]")) for i, text in enumerate(texts)))


@_shape("text", "text")
def text(row: Row) -> Document:
    """`text`: plain text without turns."""
    value = _text(row["text"], "text")
    if not value.strip():
        raise RowError("is empty", "text", kind="empty text")
    return Document(value)


# -------------------------------------------------------------------------------------------------------- messages

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "model",
    "model": "model",
    "tool": "tool",
}
SHAREGPT_ROLES: dict[str, Role] = {
    **ROLES,
    "human": "user",
    "gpt": "model",
    "chatgpt": "model",
    "bot": "model",
    "observation": "tool",
    "function_call": "model",
}


def _message(item: Row, where: str) -> Message:
    if "role" not in item and "from" in item:
        raise RowError(
            "has 'from' and no 'role'", where, fix="set data.sources.format: sharegpt", kind="message without 'role'"
        )
    role = _role(item, "role", ROLES, where)
    _refuse_untrainable(item, where)
    calls = _tool_calls(item.get("tool_calls"), f"{where}.tool_calls")
    content, response = item.get("content"), None
    if role == "tool" and isinstance(content, Mapping):
        # A structured answer: Gemma 4 writes its fields, other readers see JSON.
        response, content = dict(content), _json(content, f"{where}.content")
    elif content is None and calls:
        content = ""  # OpenAI's form of a message that only calls tools
    elif "content" not in item:
        raise RowError("has no 'content'", where, kind="message without 'content'")
    return Message(
        role,
        _text(content, f"{where}.content"),
        thinking=_reasoning(item, where),
        tool_calls=calls,
        name=_optional_text(item, "name", where),
        tool_call_id=_optional_text(item, "tool_call_id", where),
        response=response,
    )


def _sharegpt_message(item: Row, where: str) -> Message:
    if "from" not in item and "role" in item:
        return _message(item, where)
    role = _role(item, "from", SHAREGPT_ROLES, where)
    _refuse_untrainable(item, where)
    if "value" not in item:
        raise RowError("has no 'value'", where, kind="message without 'value'")
    value = _text(item["value"], f"{where}.value")
    if item["from"] == "function_call":
        return Message(role, "", tool_calls=_tool_calls([_parsed(value, f"{where}.value")], f"{where}.value"))
    return Message(role, value, thinking=_reasoning(item, where), name=_optional_text(item, "name", where))


def _role(item: Row, key: str, roles: Mapping[str, Role], where: str) -> Role:
    value = item.get(key)
    if value is None:
        raise RowError(f"has no {key!r}", where, kind=f"message without {key!r}")
    if isinstance(value, str) and value in roles:
        return roles[value]
    if not isinstance(value, str):
        raise RowError(f"is {_kind(value)}, not a role", f"{where}.{key}", kind="role is not text")
    close = difflib.get_close_matches(value.lower(), roles, 1)
    if value in SHAREGPT_ROLES:
        fix = "set data.sources.format: sharegpt"
    elif value.lower() in roles or close:
        fix = f"did you mean {close[0] if close else value.lower()!r}?"
    else:
        fix = f"rename the role to one of: {', '.join(roles)}"
    raise RowError(f"unknown role {_cut(value)}", f"{where}.{key}", fix=fix, kind=f"unknown role {_cut(value, 20)}")


def _refuse_untrainable(item: Row, where: str) -> None:
    """What other tools read from a message and we do not have: losing it silently would change what is trained."""
    if item.get("tool_responses"):
        raise RowError(
            "'tool_responses' inside a message is not read",
            where,
            fix="write each response as a message of role 'tool'",
            kind="tool_responses inside a message",
        )
    if item.get("train") is False or (isinstance(item.get("weight"), (int, float)) and item["weight"] == 0):
        raise RowError(
            "is marked as not to be trained; a single turn cannot be left out",
            where,
            fix="set data.train_on: last_model_turn, or remove the mark",
            kind="turn with its own weight",
        )


def _reasoning(item: Row, where: str) -> str | None:
    for key in ("reasoning", "reasoning_content", "thinking"):
        if item.get(key) is not None:
            return _text(item[key], f"{where}.{key}") or None
    return None


def _tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    calls = []
    for index, item in enumerate(_list(value, where, empty=True)):
        place = f"{where}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(f"is {_kind(item)}, not an object", place, kind="tool call is not an object")
        function = item.get("function") if isinstance(item.get("function"), Mapping) else item
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise RowError("has no function name", place, kind="tool call without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"{place}.arguments") if arguments.strip() else {}
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise RowError(
                f"is {_kind(arguments)}, not a JSON object", f"{place}.arguments", kind="tool arguments are not an object"
            )
        # Arrow gives every struct of a column the same keys and fills the missing ones with null.
        given = {key: argument for key, argument in arguments.items() if argument is not None}
        _json(given, f"{place}.arguments")
        calls.append(ToolCall(_text(name, place), given, _optional_text(item, "id", place)))
    return tuple(calls)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The `tools` column: a list of OpenAI function schemas, or its JSON text."""
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _parsed(value, "tools")
    tools = []
    for index, item in enumerate(_list(value, "tools", empty=True)):
        if isinstance(item, str):
            item = _parsed(item, f"tools[{index}]")
        if not isinstance(item, Mapping):
            raise RowError(f"is {_kind(item)}, not an object", f"tools[{index}]", kind="tool is not an object")
        tool = _without_nulls(item)
        if not isinstance(tool.get("function"), Mapping):
            tool = {"type": "function", "function": tool}
        if not isinstance(tool["function"].get("name"), str):
            raise RowError("has no function name", f"tools[{index}]", kind="tool without a name")
        _json(tool, f"tools[{index}]")
        tools.append(tool)
    return tuple(tools)


def _thinking(row: Row) -> bool:
    """Gemma 4's thinking mode is opened by `enable_thinking`, as a column or among `chat_template_kwargs`."""
    keywords = row.get("chat_template_kwargs")
    value = row.get("enable_thinking")
    if value is None and isinstance(keywords, Mapping):
        value = keywords.get("enable_thinking")
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RowError(f"is {_kind(value)}, not true or false", "enable_thinking", kind="enable_thinking is not true or false")
    return value


def _system(row: Row) -> Iterable[Message]:
    value = row.get("system")
    if value is None or value == "":
        return ()
    return (Message("system", _text(value, "system")),)


# ------------------------------------------------------------------------------------------------------ small parts


def _turns(value: Any, where: str, read: Callable[[Row, str], Message]) -> list[Message]:
    turns = []
    for index, item in enumerate(_list(value, where)):
        place = f"{where}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(f"is {_kind(item)}, not an object", place, kind="message is not an object")
        turns.append(read(item, place))
    return turns


def _list(value: Any, where: str, *, empty: bool = False) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"is {_kind(value)}, not a list", where, kind=f"{_column(where)} is not a list")
    if not value and not empty:
        raise RowError("is an empty list", where, kind=f"{_column(where)} is empty")
    return list(value)


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    items = _list(value, where)
    if len(items) != 2:
        raise RowError(f"has {len(items)} items, not [user, model]", where, kind="history is not pairs")
    return items[0], items[1]


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"holds a lone surrogate (U+{ord(value[error.start]):04X}) at character {error.start}, which is no text",
                where,
                fix="repair the row, or set data.on_bad_row: drop",
                kind="lone surrogate",
            ) from None
        return value
    if value is None:
        raise RowError("is null", where, kind=f"{_column(where)} is null")
    if isinstance(value, (list, tuple)):
        return _blocks(value, where)
    raise RowError(f"is {_kind(value)}, not text", where, kind=f"{_column(where)} is not text")


def _blocks(blocks: Collection[Any], where: str) -> str:
    """Content as a list of blocks: text only. The official templates trim each block and join them without a blank."""
    texts = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if not isinstance(block, Mapping):
            raise RowError(f"is {_kind(block)}, not a content block", place, kind="content is not text")
        kind = block.get("type")
        if kind not in ("text", None):
            raise RowError(
                f"is a block of type {_cut(str(kind))}; only text can be trained here",
                place,
                fix="remove the block, or set data.on_bad_row: drop",
                kind="content that is not text",
            )
        if isinstance(block.get("text"), (list, tuple)):
            raise RowError("is a list, not text", f"{place}.text", kind="content is not text")
        texts.append(_text(block.get("text"), f"{place}.text"))
    return texts[0] if len(texts) == 1 else "".join(part.strip() for part in texts)


def _optional_text(item: Row, key: str, where: str) -> str | None:
    value = item.get(key)
    return None if value is None else _text(value, f"{where}.{key}")


def _parsed(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not JSON: {_cut(value)}", where, kind="broken JSON inside a row") from error


def _json(value: Any, where: str) -> str:
    """Proof that `value` can be written as JSON; what cannot would fail later, far from its row."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode("utf-8").decode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("cannot be written as JSON", where, kind="value that is not JSON") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    if not columns:
        return row
    absent = [theirs for theirs in columns.values() if theirs not in row]
    if absent:
        near = difflib.get_close_matches(absent[0], [str(name) for name in row], 1)
        raise RowError(
            f"no column {absent[0]!r}; columns found: {_listed(row)}",
            fix=f"did you mean {near[0]!r}?" if near else "correct data.sources.columns",
            kind=f"no column {absent[0]!r}",
        )
    kept = {name: value for name, value in row.items() if name not in columns.values()}
    return {**kept, **{ours: row[theirs] for ours, theirs in columns.items()}}


def _suggest_columns(missing: Iterable[str], found: Collection[str]) -> str:
    pairs = []
    for column in missing:
        candidates = [name for name in SYNONYMS.get(column, ()) if name in found]
        candidates += difflib.get_close_matches(column, [str(name) for name in found], 1)
        if not candidates:
            return ""
        pairs.append(f"{column}: {candidates[0]}")
    return f"set data.sources.columns: {{{', '.join(pairs)}}}"


def _suggest_rename(found: Collection[str]) -> str:
    for shape in SHAPES.values():
        missing = [column for column in shape.required if column not in found]
        suggestion = _suggest_columns(missing, found)
        if suggestion:
            return suggestion
    return ""


def _column(where: str) -> str:
    """`messages[2].content` -> `content`: what rows with the same fault have in common."""
    return re.sub(r"\[\d+\]", "", where).rsplit(".", 1)[-1]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "text", list: "a list", tuple: "a list", dict: "an object"}
    name = names.get(type(value), f"a {type(value).__name__}")
    if isinstance(value, str):
        return f"{name} ({_cut(value, 40)})"
    # A number of many digits cannot be printed (sys.set_int_max_str_digits).
    return f"{name} ({value})" if isinstance(value, (int, float)) and abs(value) < 1e15 else name


def _listed(names: Iterable[Any], most: int = 12) -> str:
    listed = [_cut(str(name), 40) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more


def _cut(text: str, width: int = 80) -> str:
    """Shown to a person: at most `width` characters, control characters escaped, in quotes."""
    shown = text if len(text) <= width else text[: width - 3] + "..."
    return ascii(shown) if not shown.isprintable() else f"'{shown}'"
