"""Examples on disk between reading and tokenising: a million dialogues need not fit the memory.

One JSON line an example, in a temporary file that is gone with its `Spool`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from gemma_tune.data.cells import RowError
from gemma_tune.gemma.conversation import Conversation, Document, Example, Message, ToolCall


def to_json(example: Example) -> str:
    """One line, the same for equal examples in every process.

    Raises:
        RowError: it holds what JSON cannot say (only examples of a user's function can).
    """
    if isinstance(example, Document):
        row: dict[str, Any] = {"text": example.text}
    else:
        row = {"messages": [_message(message) for message in example.messages]}
        if example.tools:
            row["tools"] = list(example.tools)
        if example.thinking:
            row["thinking"] = True
    try:
        return json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"holds what is not JSON: {error}", kind="value that is not JSON") from error


def _message(message: Message) -> dict[str, Any]:
    # Only what is there: nearly all messages have a role and a content.
    row = {f.name: value for f in fields(message) if (value := getattr(message, f.name)) is not None and value != ()}
    if message.tool_calls:
        row["tool_calls"] = [asdict(call) for call in message.tool_calls]
    return row


def from_json(line: str) -> Example:
    """The inverse of `to_json`."""
    row = json.loads(line)
    if "text" in row:
        return Document(row["text"])
    messages = []
    for item in row["messages"]:
        calls = tuple(ToolCall(**call) for call in item.pop("tool_calls", ()))
        messages.append(Message(**item, tool_calls=calls))
    return Conversation(tuple(messages), tuple(row.get("tools", ())), row.get("thinking", False))


class Spool:
    """Append examples, then read them back by number or in order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gemma-tune-")  # noqa: SIM115 (lives as long as the spool)
        self._starts: list[int] = []
        self._end = 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, example: Example) -> None:
        line = to_json(example).encode("utf-8") + b"\n"
        self._hash.update(line)
        self._file.write(line)
        self._starts.append(self._end)
        self._end += len(line)

    def __getitem__(self, index: int) -> Example:
        self._file.seek(self._starts[index])
        return from_json(self._file.readline().decode("utf-8"))

    def __iter__(self) -> Iterator[Example]:
        self._file.seek(0)
        for line in self._file:
            yield from_json(line.decode("utf-8"))

    def sha256(self) -> str:
        """Of all examples in order."""
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()
