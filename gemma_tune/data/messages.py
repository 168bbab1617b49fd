"""One message of a row, in the forms that public sets use: roles, content, reasoning, tool calls. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gemma_tune.data.cells import (
    Row,
    RowError,
    as_list,
    as_text,
    kind_of,
    optional_text,
    parsed_json,
    shown,
    without_nulls,
    written_json,
)
from gemma_tune.gemma.conversation import Message, Role, ToolCall

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "model",
    "model": "model",
    "tool": "tool",
    "function": "tool",  # OpenAI's first form of it
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


def openai_message(item: Row, where: str) -> Message:
    if "role" not in item and "from" in item:
        raise RowError(
            "has 'from' and no 'role'", where, fix="set data.sources.format: sharegpt", kind="message without 'role'"
        )
    role = _role(item, "role", ROLES, where)
    _refuse_untrainable(item, role, where)
    calls = _tool_calls(item.get("tool_calls"), f"{where}.tool_calls")
    if not calls and (call := without_nulls(item.get("function_call"))):  # OpenAI's first form: one call, without an id
        calls = _tool_calls([call], f"{where}.function_call")
    content, response = item.get("content"), None
    if role == "tool" and isinstance(content, Mapping):
        # A structured answer: Gemma 4 writes its fields, other readers see JSON.
        response, content = dict(content), written_json(content, f"{where}.content")
    elif content is None and calls:
        content = ""  # OpenAI's form of a message that only calls tools
    elif "content" not in item:
        raise RowError("has no 'content'", where, kind="message without 'content'")
    return Message(
        role,
        as_text(content, f"{where}.content", trim=role != "tool"),
        thinking=_reasoning(item, where),
        tool_calls=calls,
        name=optional_text(item, "name", where),
        tool_call_id=optional_text(item, "tool_call_id", where),
        response=response,
    )


def sharegpt_message(item: Row, where: str) -> Message:
    if "from" not in item and "role" in item:
        return openai_message(item, where)
    role = _role(item, "from", SHAREGPT_ROLES, where)
    _refuse_untrainable(item, role, where)
    if "value" not in item:
        raise RowError("has no 'value'", where, kind="message without 'value'")
    value = as_text(item["value"], f"{where}.value")
    if item["from"] == "function_call":
        calls = parsed_json(value, f"{where}.value")
        return Message(
            role, "", tool_calls=_tool_calls(calls if isinstance(calls, list) else [calls], f"{where}.value")
        )
    return Message(role, value, thinking=_reasoning(item, where), name=optional_text(item, "name", where))


def _role(item: Row, key: str, roles: Mapping[str, Role], where: str) -> Role:
    value = item.get(key)
    if value is None:
        raise RowError(f"has no {key!r}", where, kind=f"message without {key!r}")
    if isinstance(value, str) and value in roles:
        return roles[value]
    if not isinstance(value, str):
        raise RowError(f"is {kind_of(value)}, not a role", f"{where}.{key}", kind="role is not text")
    close = difflib.get_close_matches(value.lower(), roles, 1)
    if value in SHAREGPT_ROLES:
        fix = "set data.sources.format: sharegpt"
    elif close:
        fix = f"did you mean '{close[0]}'?"
    else:
        fix = f"rename the role to one of: {', '.join(roles)}"
    raise RowError(f"unknown role {shown(value)}", f"{where}.{key}", fix=fix, kind=f"unknown role {shown(value, 20)}")


def _refuse_untrainable(item: Row, role: Role, where: str) -> None:
    """What other tools read from a message and we do not have: losing it silently would change what is trained.

    A user's turn of weight 0 (SlimOrca marks them all) says only what `data.train_on` says anyway.
    """
    if item.get("tool_responses"):
        raise RowError(
            "'tool_responses' inside a message is not read",
            where,
            fix="write each response as a message of role 'tool'",
            kind="tool_responses inside a message",
        )
    weight = item.get("weight")
    if role == "model" and (item.get("train") is False or (isinstance(weight, (int, float)) and weight == 0)):
        raise RowError(
            "is marked as not to be trained; a single turn cannot be left out",
            where,
            fix="remove the mark, or the row",
            kind="turn with its own weight",
        )


def _reasoning(item: Row, where: str) -> str | None:
    for key in ("reasoning", "reasoning_content", "thinking"):
        if item.get(key) is not None and (text := as_text(item[key], f"{where}.{key}")):
            return text
    return None


def _tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    calls = []
    for index, item in enumerate(as_list(value, where, empty=True)):
        place = f"{where}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(f"is {kind_of(item)}, not an object", place, kind="tool call is not an object")
        function: Row = item["function"] if isinstance(item.get("function"), Mapping) else item
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise RowError("has no function name", place, kind="tool call without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed_json(arguments, f"{place}.arguments") if arguments.strip() else {}
        else:
            # Arrow gives every struct of a column the same keys, at every depth, and fills the missing ones with null.
            arguments = without_nulls(arguments)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, Mapping):
            raise RowError(
                f"is {kind_of(arguments)}, not a JSON object",
                f"{place}.arguments",
                kind="tool arguments are not an object",
            )
        written_json(arguments, f"{place}.arguments")
        calls.append(ToolCall(as_text(name, place), arguments, optional_text(item, "id", place)))
    return tuple(calls)


def tools_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The `tools` column: a list of OpenAI function schemas, or its JSON text."""
    if isinstance(value, str):
        value = parsed_json(value, "tools") if value.strip() else None
    if value is None:
        return ()
    tools = []
    for index, item in enumerate(as_list(value, "tools", empty=True)):
        if isinstance(item, str):
            item = parsed_json(item, f"tools[{index}]")
        if not isinstance(item, Mapping):
            raise RowError(f"is {kind_of(item)}, not an object", f"tools[{index}]", kind="tool is not an object")
        tool = without_nulls(item)  # Arrow's, see `_tool_calls`
        if not isinstance(tool.get("function"), Mapping):
            tool = {"type": "function", "function": tool}
        if not isinstance(tool["function"].get("name"), str):
            raise RowError("has no function name", f"tools[{index}]", kind="tool without a name")
        written_json(tool, f"tools[{index}]")
        tools.append(tool)
    return tuple(tools)


def thinking_of(row: Row) -> bool:
    """Gemma 4's thinking mode is opened by `enable_thinking`, as a column or among `chat_template_kwargs`."""
    keywords = row.get("chat_template_kwargs")
    value = row.get("enable_thinking")
    if value is None and isinstance(keywords, Mapping):
        value = keywords.get("enable_thinking")
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RowError(
            f"is {kind_of(value)}, not true or false", "enable_thinking", kind="enable_thinking is not true or false"
        )
    return value


def system_turn(row: Row) -> Iterable[Message]:
    value = row.get("system")
    if value is None or value == "":
        return ()
    return (Message("system", as_text(value, "system")),)


def turns_of(value: Any, where: str, read: Callable[[Row, str], Message]) -> list[Message]:
    turns = []
    for index, item in enumerate(as_list(value, where)):
        place = f"{where}[{index}]"
        if not isinstance(item, Mapping):
            raise RowError(f"is {kind_of(item)}, not an object", place, kind="message is not an object")
        turns.append(read(item, place))
    return turns
