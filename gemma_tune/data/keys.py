"""When two rows are the same, and when they must stay on one side of the holdout. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from gemma_tune.data.spool import to_json
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Example, Judged, Message


def group_of(example: Example | Answered, named: str = "") -> bytes:
    """Rows that share it stay together when the data is split: the first thing the user says, or the whole text.

    Args:
        named: the group that the row of the example names. A preference and a judged answer bring it themselves.
    """
    if isinstance(example, Answered):
        named = named or example.group
    if named:
        return _digest(f"group\0{named}")  # NUL: no first user turn is taken for the name of a group
    if isinstance(example, Document):
        return _digest(_normal(example.text))
    turns = example.prompt if isinstance(example, Answered) else example.messages
    first = next((message.content for message in turns if message.role == "user"), "")
    return _digest(_normal(first).casefold())


def key_of(example: Example | Answered) -> bytes:
    """Two examples that differ in blanks alone are repetitions of each other, whatever their ratings and groups."""
    if isinstance(example, Document):
        return _digest(to_json(Document(_normal(example.text))))
    if isinstance(example, Conversation):
        return _digest(to_json(replace(example, messages=_plain(example.messages))))
    if isinstance(example, Judged):
        (answer,) = _plain([example.answer])
        return _digest(to_json(replace(example, prompt=_plain(example.prompt), answer=answer, group="")))
    chosen, rejected = _plain([example.chosen, example.rejected])
    plain = replace(example, prompt=_plain(example.prompt), chosen=chosen, rejected=rejected, margin=None, group="")
    return _digest(to_json(plain))


def texts_of(example: Example | Answered) -> list[str]:
    """What is said in it."""
    if isinstance(example, Document):
        return [example.text]
    if isinstance(example, Conversation):
        return [message.content for message in example.messages]
    return [message.content for message in (*example.prompt, *example.answers.values())]


def _plain(messages: Iterable[Message]) -> tuple[Message, ...]:
    return tuple(replace(message, content=_normal(message.content)) for message in messages)


def _normal(text: str) -> str:
    return " ".join(text.split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
