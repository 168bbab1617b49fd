"""Curves of metrics.jsonl: (step, value) pairs, and few enough of them to draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from gemma_tune.report.words import is_number

DRAWN = 240
"""Buckets of a curve that has more points: a chart is a few hundred pixels wide."""


Value = tuple[int, float | None]
"""A step and what was measured there; None where that was not finite."""


@dataclass(frozen=True, slots=True)
class Point:
    """A part of a curve: its last step, the mean of its values, and the smallest and largest of them."""

    step: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """One curve.

    Attributes:
        name: what its label says.
        points: in the order of steps; at most `DRAWN`.
        first, last: (step, value) of its ends, exactly.
        lowest, highest: (step, value).
        count: values that it was made of.
        missing: steps without a finite value, the first few.
        missing_count: how many.
        role: `train`, `held_out`, `plain` or `second`: decides its colour.
        measured: whether its points are evaluations: few, exact, and each marked.
    """

    name: str
    points: tuple[Point, ...]
    first: tuple[float, float]
    last: tuple[float, float]
    lowest: tuple[float, float]
    highest: tuple[float, float]
    count: int
    missing: tuple[int, ...] = ()
    missing_count: int = 0
    role: str = "plain"
    measured: bool = False

    @property
    def gathered(self) -> bool:
        """Whether a point stands for several steps."""
        return self.count > len(self.points)


def columns(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Value]]:
    """Key -> (step, value) of the lines that have it; None where it was not finite (JSON null, or Python's NaN)."""
    found: dict[str, list[Value]] = {}
    for row in rows:
        if not is_number(row.get("step")):
            continue
        step = int(row["step"])
        for key, value in row.items():
            found.setdefault(key, []).append((step, value if is_number(value) else None))
    return found


def speeds(rows: Iterable[Mapping[str, Any]]) -> list[Value]:
    """Tokens a second between one line and the next: the counters of a run are sums from its beginning."""
    found: list[Value] = []
    tokens, seconds = 0.0, 0.0
    for row in rows:
        seen, spent, step = row.get("tokens_seen"), row.get("train_seconds"), row.get("step")
        if not (is_number(seen) and is_number(spent) and is_number(step)):
            continue
        if spent > seconds and seen > tokens:
            found.append((int(step), (seen - tokens) / (spent - seconds)))
        tokens, seconds = max(tokens, seen), max(seconds, spent)
    return found


def make_series(name: str, values: Sequence[Value], role: str = "plain", *, scale: float = 1.0) -> Series | None:
    """A curve of `values` times `scale`, gathered into at most `DRAWN` buckets; None where no value is finite."""
    good = [(step, value * scale) for step, value in values if value is not None]
    if not good:
        return None
    missing = [step for step, value in values if value is None]
    width = -(-len(good) // DRAWN)
    points = []
    for place in range(0, len(good), width):
        part = good[place : place + width]
        numbers = [value for _, value in part]
        points.append(Point(part[-1][0], sum(numbers) / len(numbers), min(numbers), max(numbers)))
    return Series(
        name=name,
        points=tuple(points),
        first=good[0],
        last=good[-1],
        lowest=min(good, key=lambda pair: pair[1]),
        highest=max(good, key=lambda pair: pair[1]),
        count=len(good),
        missing=tuple(missing[:5]),
        missing_count=len(missing),
        role=role,
    )


def trend(points: Sequence[Point], *, spiky: bool = False) -> list[float] | None:
    """Moving mean over a twentieth of the curve to either side; None where there are too few points to smooth.

    Args:
        points: of a curve.
        spiky: the median instead, which one step cannot move.
    """
    if len(points) < 30:
        return None
    reach, middle = max(2, len(points) // 20), median if spiky else fmean
    means = [point.mean for point in points]
    return [middle(means[max(0, place - reach) : place + reach + 1]) for place in range(len(means))]
