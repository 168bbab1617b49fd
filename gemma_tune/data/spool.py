"""Examples on disk between reading and tokenising: a million dialogues need not fit the memory.

One JSON line an example, in a temporary file that is gone with its `Spool`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, Generic, TypeVar, cast

from gemma_tune.data.cells import RowError
from gemma_tune.gemma.conversation import (
    Answered,
    Conversation,
    Document,
    Example,
    Judged,
    Message,
    Preference,
    ToolCall,
)

E = TypeVar("E", bound=Example | Answered)


def to_json(example: Example | Answered) -> str:
    """One line, the same for equal examples in every process.

    Raises:
        RowError: it holds what JSON cannot say (only examples of a user's function can).
    """
    if isinstance(example, Document):
        row: dict[str, Any] = {"text": example.text}
    else:
        row = _turns(example)
        if example.tools:
            row["tools"] = list(example.tools)
        if example.thinking:
            row["thinking"] = True
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"holds what is not JSON: {error}", kind="value that is not JSON") from error


def _turns(example: Conversation | Answered) -> dict[str, Any]:
    if isinstance(example, Conversation):
        return {"messages": [_message(message) for message in example.messages]}
    row: dict[str, Any] = {
        "prompt": [_message(message) for message in example.prompt],
        **{name: _message(answer) for name, answer in example.answers.items()},
    }
    if isinstance(example, Judged):
        row["good"] = example.good
    elif example.margin is not None:
        row["margin"] = example.margin
    if example.group:
        row["group"] = example.group
    return row


def _message(message: Message) -> dict[str, Any]:
    # Only what is there: nearly all messages have a role and a content.
    row = {f.name: value for f in fields(message) if (value := getattr(message, f.name)) is not None and value != ()}
    if message.tool_calls:
        row["tool_calls"] = [asdict(call) for call in message.tool_calls]
    return row


def from_json(line: str) -> Example | Answered:
    """The inverse of `to_json`."""
    row = json.loads(line)
    if "text" in row:
        return Document(row["text"])
    tools, thinking = tuple(row.get("tools", ())), row.get("thinking", False)
    if "messages" in row:
        return Conversation(tuple(map(_read_message, row["messages"])), tools, thinking)
    prompt = tuple(map(_read_message, row["prompt"]))
    if "good" in row:
        return Judged(prompt, _read_message(row["completion"]), row["good"], tools, thinking, row.get("group", ""))
    chosen, rejected = _read_message(row["chosen"]), _read_message(row["rejected"])
    return Preference(prompt, chosen, rejected, tools, thinking, row.get("margin"), row.get("group", ""))


def _read_message(item: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in item.pop("tool_calls", ()))
    return Message(**item, tool_calls=calls)


class Spool(Generic[E]):
    """Append examples of one kind, then read them back by number or in order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gemma-tune-")  # noqa: SIM115 (lives as long as the spool)
        self._starts: list[int] = []
        self._end = 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, example: E) -> None:
        line = to_json(example).encode("utf-8") + b"\n"
        self._hash.update(line)
        self._file.write(line)
        self._starts.append(self._end)
        self._end += len(line)

    def __getitem__(self, index: int) -> E:
        self._file.seek(self._starts[index])
        return cast(E, from_json(self._file.readline().decode("utf-8")))

    def __iter__(self) -> Iterator[E]:
        self._file.seek(0)
        for line in self._file:
            yield cast(E, from_json(line.decode("utf-8")))

    def sha256(self) -> str:
        """Of all examples in order."""
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
