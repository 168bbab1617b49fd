"""Tables of a model card, and how values stand in them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def words(key: str) -> str:
    return str(key).replace("_", " ")


def value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(value_text, value))
    return str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_group(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and any(map(is_group, value)))


def flat(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    items = group.items() if isinstance(group, Mapping) else ((str(at), each) for at, each in enumerate(group, 1))
    for key, value in items:
        name = f"{above}{key}"
        if is_group(value):
            yield from flat(value, f"{name}, ")
        elif value is not None:
            yield name, value
