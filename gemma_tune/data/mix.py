"""Rows of all sources as one stream of examples: normalised, repaired, without repetitions, mixed by weight."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from gemma_tune.data.cells import RowError, SourceRow, as_text, kind_of, written_json
from gemma_tune.data.policies import Drop, Policies, apply_policies
from gemma_tune.data.report import Tally
from gemma_tune.data.sources import Opened, open_source
from gemma_tune.data.spool import to_json
from gemma_tune.errors import Problem, UserError
from gemma_tune.gemma.conversation import Conversation, Document, Example, Message, ToolCall
from gemma_tune.gemma.families import Family

LOOK_AHEAD = 1000
"""Rows that are looked at after a bad one, to say how many more there are."""


class Kept(NamedTuple):
    """An example that can be trained, where it came from, and the key that keeps it on one side of the holdout."""

    example: Example
    where: str
    group: bytes


def read_examples(
    sources: Sequence[Mapping[str, Any]],
    family: Family,
    policies: Policies,
    tally: Tally,
    *,
    deduplicate: bool = True,
    streaming: bool = False,
    seed: int = 0,
) -> Iterator[Kept]:
    """Every usable example, once.

    Several sources are drawn from by weight, without repetition, until one runs out; the draws depend on `seed` alone.

    Raises:
        UserError: a row is bad and `policies` say `error`; a source cannot be read.
    """
    seen: set[bytes] | None = set() if deduplicate else None
    opened = [open_source(source, streaming=streaming) for source in sources]
    streams = [_usable(one, family, policies, tally, seen) for one in opened]
    if len(streams) == 1:
        yield from streams[0]
        return
    weights = [float(source.get("weight") or 1.0) for source in sources]
    draw = random.Random(f"mix {seed}")
    while True:
        index = draw.choices(range(len(streams)), weights)[0]
        kept = next(streams[index], None)
        if kept is None:
            tally.remarks.append(f"the mix ends where {opened[index].label} ran out of rows")
            return
        yield kept


def _usable(
    source: Opened, family: Family, policies: Policies, tally: Tally, seen: set[bytes] | None
) -> Iterator[Kept]:
    rows = iter(source)
    for row in rows:
        tally.row(source.label)
        try:
            example = _example(row.value, source)
            repaired = apply_policies(example, family, policies)
            key = b"" if isinstance(repaired, Drop) else _key(repaired.example)
        except RowError as error:
            if policies.on_bad_row == "error":
                raise _bad_rows(error, row, rows, source, family, policies) from error
            tally.drop(error.kind, row.where)
            continue
        if isinstance(repaired, Drop):
            tally.drop(repaired.reason, row.where)
            continue
        if seen is not None:
            if key in seen:
                tally.drop("repetition", row.where)
                continue
            seen.add(key)
        for name in repaired.repairs:
            tally.repair(name, row.where)
        _note_oddities(repaired.example, family, tally, row.where)
        yield Kept(repaired.example, row.where, _group(repaired.example))


def _example(value: Any, source: Opened) -> Example:
    if isinstance(value, RowError):
        raise value
    if isinstance(value, (Conversation, Document)):
        return _checked(value)
    return source.to_example(value)


def _checked(example: Example) -> Example:
    """What a user's function built by hand: the types are not enforced by Python."""
    if isinstance(example, Document):
        if not isinstance(example.text, str):
            raise RowError("a Document's text is not text", kind="bad Document")
        as_text(example.text, "text")
        return example
    if not isinstance(example.messages, (tuple, list)) or not example.messages:
        raise RowError("a Conversation's messages are not a tuple with turns", kind="bad Conversation")
    for index, message in enumerate(example.messages):
        if not isinstance(message, Message) or not isinstance(message.content, str):
            raise RowError("is not a Message with text", f"messages[{index}]", kind="bad Message")
        if message.role not in ("system", "user", "model", "tool"):
            raise RowError(f"unknown role {message.role!r}", f"messages[{index}]", kind="unknown role")
        as_text(message.content, f"messages[{index}].content")
        for key in ("thinking", "name", "tool_call_id"):
            if getattr(message, key) is not None:
                as_text(getattr(message, key), f"messages[{index}].{key}")
        for call in message.tool_calls:
            if not isinstance(call, ToolCall) or not isinstance(call.name, str):
                raise RowError("has a tool call that is no ToolCall", f"messages[{index}]", kind="bad Message")
            if not isinstance(call.arguments, Mapping):
                raise RowError("calls a tool without an object of arguments", f"messages[{index}]", kind="bad Message")
            _check_json(call.arguments, f"messages[{index}].tool_calls")
        if message.response is not None:
            _check_json(message.response, f"messages[{index}].response")
    for index, tool in enumerate(example.tools):
        if not isinstance(tool, Mapping):
            raise RowError(f"is {kind_of(tool)}, not an object", f"tools[{index}]", kind="tool is not an object")
        _check_json(tool, f"tools[{index}]")
    return example


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


def _bad_rows(
    error: RowError, row: SourceRow, rest: Iterable[SourceRow], source: Opened, family: Family, policies: Policies
) -> UserError:
    """The first bad row, and how many of the next ones are bad as well: one by one would be a long evening."""
    found: dict[str, tuple[RowError, SourceRow]] = {error.kind: (error, row)}
    counts = Counter({error.kind: 1})
    try:
        for other in islice(rest, LOOK_AHEAD):
            try:
                apply_policies(_example(other.value, source), family, policies)
            except RowError as another:
                found.setdefault(another.kind, (another, other))
                counts[another.kind] += 1
    except UserError:
        pass  # the file itself breaks further on; the first bad row is what has to be mended now
    problems = []
    for kind, (first, place) in list(found.items())[:20]:
        more = f" (and {counts[kind] - 1:,} more rows like it)" if counts[kind] > 1 else ""
        problems.append(Problem(f"{first}{more}", place.where, first.fix or "correct it, or set data.on_bad_row: drop"))
    return UserError(problems[0].what, problems=problems)


def _note_oddities(example: Example, family: Family, tally: Tally, where: str) -> None:
    texts = [example.text] if isinstance(example, Document) else [message.content for message in example.messages]
    spelled = _spellings(family)
    if any(spelled.search(text) for text in texts):
        tally.note("text that looks like a control token, trained as plain text", where)
    if any("\0" in text for text in texts):
        tally.note("NUL character", where)


def _spellings(family: Family) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, family.tokens)))  # re caches compiled patterns


def _group(example: Example) -> bytes:
    """Rows that share it stay together when the data is split: the first thing the user says, or the whole text."""
    if isinstance(example, Document):
        return _digest(_normal(example.text))
    first = next((message.content for message in example.messages if message.role == "user"), "")
    return _digest(_normal(first).casefold())


def _key(example: Example) -> bytes:
    """Two examples that differ in blanks alone are repetitions of each other."""
    if isinstance(example, Document):
        return _digest(to_json(Document(_normal(example.text))))
    messages = tuple(replace(message, content=_normal(message.content)) for message in example.messages)
    return _digest(to_json(replace(example, messages=messages)))


def _normal(text: str) -> str:
    return " ".join(text.split())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
