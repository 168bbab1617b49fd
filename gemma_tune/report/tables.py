"""A table, and what is not known by name as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.report.words import NONE, count, cut, figure

SHOWN = 200
"""Rows of a table at most."""
COLUMNS = 8


@dataclass(frozen=True, slots=True)
class Table:
    """A table: `title`, the heads of its columns, rows whose first cell names them, and a sentence below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str = ""


def any_tables(title: str, found: Any) -> Iterator[Table]:
    """Any mapping as a table of its leaves; lists of mappings in it as tables of their own."""
    if not isinstance(found, Mapping):
        return
    rows = tuple((name, leaf(item)) for name, item in leaves(found))
    if rows:
        yield Table(title, ("", "value"), rows[:SHOWN])
    for name, items in found.items():
        if isinstance(items, Sequence) and not isinstance(items, str):
            lines = [item for item in items if isinstance(item, Mapping)]
            keys = list(dict.fromkeys(key for line in lines for key in line))[:COLUMNS]
            if keys:
                cells = tuple(tuple(leaf(line.get(key)) for key in keys) for line in lines[:SHOWN])
                yield Table(f"{title}, {plain(name)}", tuple(map(plain, keys)), cells)


def leaves(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all that is text or a number, however deep."""
    for key, item in found.items():
        name = f"{before}{plain(key)}"
        if isinstance(item, Mapping):
            yield from leaves(item, f"{name}, ")
        elif isinstance(item, str | int | float) or item is None:
            yield cut(name, 120), item


def leaf(item: Any) -> str:
    """A value of a JSON document in a cell."""
    if item is None:
        return NONE
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return count(item)
    return figure(item) if isinstance(item, float) else cut(item, 120)


def plain(key: str) -> str:
    """A key of a JSON document in words."""
    return str(key).replace("_", " ")
