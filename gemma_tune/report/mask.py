"""Rows of `data.preview` as a page shows them: pieces of text, which of them carry loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """A token's text; `control`: it is one of the tokens that steer the model."""

    text: str
    control: bool


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens that all carry loss, or all do not; `begins`: a further document of a packed row begins."""

    trained: bool
    begins: bool
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A row, or the prompt or an answer of it."""

    name: str
    tokens: int
    trained: int
    more: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A training row, or a held-out one of a stream. `label`: `good` or `bad`, of a judged answer."""

    held_out: bool
    label: str
    parts: tuple[Part, ...]


def rows(record: Mapping[str, Any]) -> list[Row]:
    """The rows that run.json keeps; none of a run that was made before it kept any."""
    found = (record.get("data") or {}).get("preview") or ()
    return [
        Row(bool(row.get("held_out")), str(row.get("label") or ""), tuple(map(_part, row.get("parts") or ())))
        for row in found
    ]


def _part(part: Mapping[str, Any]) -> Part:
    kinds, begins = part["kinds"], {int(place) for place in part["begins"].split()}
    pieces, place = [], 0
    for length in map(int, part["lengths"].split()):
        pieces.append(part["text"][place : place + length])
        place += length
    document, marked = 0, []
    for number, (text, kind) in enumerate(zip(pieces, kinds, strict=True)):
        document += number in begins
        marked.append((document, kind in "tT", Piece(text, kind in "TP")))
    stretches, before = [], 0
    for (document, trained), group in groupby(marked, key=lambda item: item[:2]):
        stretches.append(Stretch(trained, document != before, tuple(piece for *_, piece in group)))
        before = document
    return Part(part["name"], part["tokens"], sum(kind in "tT" for kind in kinds), part["more"], tuple(stretches))
