"""The plan of a run with its reasons, and its memory: what was estimated against what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.plan.report import SECTIONS
from gemma_tune.plan.stages import CONFIGS
from gemma_tune.report.read import RunFiles
from gemma_tune.report.words import count, cut, is_number, share, size, value

DRAWN = 4
"""Terms of the estimate that have a part of the bar of their own."""
CUDA = "CUDA and allocator"
"""The term of `plan/memory.py` for what is on a GPU beside torch's tensors."""
VALUE, REASON = 400, 300
"""Characters of a value and of a reason that are shown."""


@dataclass(frozen=True, slots=True)
class Row:
    """One keyword. `origin`: `recipe` (its user wrote it), `default`, or `decided` (the plan did, for a reason)."""

    key: str
    value: str
    reason: str
    origin: str


@dataclass(frozen=True, slots=True)
class Group:
    """A section of the plan; `counts` says how many rows have which origin."""

    title: str
    rows: tuple[Row, ...]

    @property
    def counts(self) -> str:
        numbers = {name: sum(row.origin == name for row in self.rows) for name in ("recipe", "decided", "default")}
        words = {"recipe": "from the recipe", "decided": "decided", "default": "by default"}
        return ", ".join(f"{number} {words[name]}" for name, number in numbers.items() if number)


@dataclass(frozen=True, slots=True)
class Term:
    """A term of the memory estimate; `width` in percent of the bar; `shade` counts through its tones."""

    name: str
    size: str
    formula: str
    width: float
    shade: int


@dataclass(frozen=True, slots=True)
class Memory:
    """The estimate against the measurement.

    Attributes:
        terms: largest first.
        drawn: the largest, and the sum of the others.
        estimate, measured, room: as text; empty where unknown.
        measured_width, room_width: percent of the bar's width, where the lines stand; None where unknown.
        verdict: one sentence.
    """

    terms: tuple[Term, ...]
    drawn: tuple[Term, ...]
    estimate: str
    measured: str
    room: str
    measured_width: float | None
    room_width: float | None
    verdict: str


def groups(plan: Mapping[str, Any]) -> list[Group]:
    """The sections of plan.json, in the order of `gemma-tune check`."""
    config = CONFIGS.get(str(plan.get("stage")), "TRL")
    found = []
    for section, title in SECTIONS.items():
        choices = plan.get(section)
        if isinstance(choices, Mapping) and choices:
            rows = tuple(_row(key, choice) for key, choice in choices.items() if isinstance(choice, Mapping))
            found.append(Group(title.format(config=config), rows))
    return found


def _row(key: str, choice: Mapping[str, Any]) -> Row:
    reason = str(choice.get("reason", ""))
    first = reason.split(";")[0].split(":")[0].strip()
    origin = first if first in ("recipe", "default") else "decided"
    return Row(key, cut(value(choice.get("value")), VALUE), cut(reason, REASON), origin)


def estimated(plan: Mapping[str, Any]) -> int | None:
    """Bytes of one process that the plan counts on."""
    terms = [term.get("bytes") for term in plan.get("memory") or () if isinstance(term, Mapping)]
    known = [number for number in terms if is_number(number)]
    return round(sum(known)) if known else None


def peak(files: RunFiles) -> int | None:
    """The measured peak of the memory that the plan estimates: a GPU's, or the process's on a CPU."""
    measured = (files.record.get("results") or {}).get("peak_memory") or {}
    on_gpu = (files.plan.get("machine") or {}).get("device") == "cuda"
    name = "cuda" if on_gpu else "rss"
    if is_number(measured.get(name)):
        return int(measured[name])
    seen = [row[f"peak_{name}"] for row in files.metrics if is_number(row.get(f"peak_{name}"))]
    return int(max(seen)) if seen else None


def make_memory(files: RunFiles) -> Memory | None:
    """The terms of the estimate and how they met the measured peak; None without an estimate."""
    estimate = estimated(files.plan)
    if not estimate:
        return None
    measured, room = peak(files), (files.plan.get("machine") or {}).get("memory_bytes")
    room = room if is_number(room) else None
    # A device many times as large would squeeze the terms into a line: then its size is said, not drawn.
    drawn = room if room and room <= 2.5 * max(estimate, measured or 0) else None
    widest = max(estimate, measured or 0, drawn or 0)
    terms = sorted(
        (term for term in files.plan["memory"] if is_number(term.get("bytes"))), key=lambda one: -one["bytes"]
    )
    return Memory(
        terms=tuple(_term(term, widest) for term in terms),
        drawn=tuple(_drawn(terms, widest)),
        estimate=size(estimate),
        measured=size(measured) if measured else "",
        room=size(room) if room else "",
        measured_width=100 * measured / widest if measured else None,
        room_width=100 * drawn / widest if drawn else None,
        verdict=_verdict(estimate, measured) + _uncounted(terms, measured),
    )


def _term(term: Mapping[str, Any], widest: float, shade: int = 0) -> Term:
    width = 100 * term["bytes"] / widest
    return Term(str(term.get("name")), size(term["bytes"]), cut(term.get("formula", ""), REASON), width, shade)


def _drawn(terms: list[Mapping[str, Any]], widest: float) -> Iterator[Term]:
    """The largest terms, each in its tone, and the others as one."""
    for number, term in enumerate(terms[:DRAWN]):
        yield _term(term, widest, number)
    if rest := terms[DRAWN:]:
        yield _term({"name": f"{len(rest)} others", "bytes": sum(term["bytes"] for term in rest)}, widest, DRAWN)


def _verdict(estimate: int, measured: int | None) -> str:
    if measured is None:
        return "No peak was measured."
    off = measured / estimate - 1
    if abs(off) < 0.01:
        return "The measured peak is what was estimated."
    return f"The measured peak is {share(abs(off))} {'above' if off > 0 else 'below'} the estimate."


def _uncounted(terms: list[Mapping[str, Any]], measured: int | None) -> str:
    """torch's peak is what torch has allocated: the estimate's term of CUDA is nowhere in it."""
    own = next((term["bytes"] for term in terms if term.get("name") == CUDA), None)
    if measured is None or own is None:
        return ""
    return f" {size(own)} of the estimate is for CUDA and the allocator, which torch's peak hardly counts."


def notes(plan: Mapping[str, Any]) -> list[str]:
    """What the plan says beside its values."""
    return [str(note) for note in plan.get("notes") or ()]


def keyword_count(found: list[Group]) -> str:
    """`74`, of all groups."""
    return count(sum(len(group.rows) for group in found))
