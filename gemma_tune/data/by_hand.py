"""What a user's function built by hand: Python does not enforce the types of its fields, so each is checked. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tune.data.cells import RowError, as_number, as_text, kind_of, written_json
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Judged, Message, ToolCall


def check_by_hand(example: Conversation | Document | Answered) -> None:
    """
    Raises:
        RowError: a field does not hold what its type says.
    """
    if isinstance(example, Document):
        if not isinstance(example.text, str):
            raise RowError("a Document's text is not text", kind="bad Document")
        as_text(example.text, "text")
        return
    if isinstance(example, Answered):
        _check_answered(example)
        return
    if not isinstance(example.messages, (tuple, list)) or not example.messages:
        raise RowError("a Conversation's messages are not a tuple with turns", kind="bad Conversation")
    for index, message in enumerate(example.messages):
        _check_message(message, f"messages[{index}]")
    _check_tools(example.tools)


def _check_answered(example: Answered) -> None:
    name = type(example).__name__
    if not isinstance(example.prompt, (tuple, list)) or not example.prompt:
        raise RowError(f"a {name}'s prompt is not a tuple with turns", kind=f"bad {name}")
    for index, message in enumerate(example.prompt):
        _check_message(message, f"prompt[{index}]")
    for where, message in example.answers.items():
        _check_message(message, where)
        if message.role != "model":
            raise RowError(f"is a '{message.role}' turn, not an answer of the model", where, kind=f"bad {name}")
    _check_tools(example.tools)
    if isinstance(example, Judged):
        if not isinstance(example.good, bool):
            raise RowError(f"is {kind_of(example.good)}, not true or false", "good", kind="bad Judged")
    elif example.margin is not None:
        as_number(example.margin, "margin")
    as_text(example.group, "group")


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Message) or not isinstance(message.content, str):
        raise RowError("is not a Message with text", where, kind="bad Message")
    if message.role not in ("system", "user", "model", "tool"):
        raise RowError(f"unknown role {message.role!r}", where, kind="unknown role")
    as_text(message.content, f"{where}.content")
    for key in ("thinking", "name", "tool_call_id"):
        if getattr(message, key) is not None:
            as_text(getattr(message, key), f"{where}.{key}")
    for call in message.tool_calls:
        if not isinstance(call, ToolCall) or not isinstance(call.name, str):
            raise RowError("has a tool call that is no ToolCall", where, kind="bad Message")
        if not isinstance(call.arguments, Mapping):
            raise RowError("calls a tool without an object of arguments", where, kind="bad Message")
        _check_json(call.arguments, f"{where}.tool_calls")
    if message.response is not None:
        _check_json(message.response, f"{where}.response")


def _check_tools(found: Sequence[Any]) -> None:
    for index, tool in enumerate(found):
        if not isinstance(tool, Mapping):
            raise RowError(f"is {kind_of(tool)}, not an object", f"tools[{index}]", kind="tool is not an object")
        _check_json(tool, f"tools[{index}]")


def _check_json(value: Any, where: str) -> None:
    written_json(value, where)
    _check_keys(value, where)


def _check_keys(value: Any, where: str) -> None:
    """`json` writes a number as a key; what sorts the keys later does not take one."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RowError("has a key that is not text", where, kind="value that is not JSON")
        value = list(value.values())
    for item in value if isinstance(value, (list, tuple)) else ():
        _check_keys(item, where)
