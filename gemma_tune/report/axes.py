"""Scales and ticks of a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemma_tune.report.words import minus


@dataclass(frozen=True, slots=True)
class Scale:
    """Values -> pixels, on a line or by powers of ten.

    Attributes:
        low, high: values at the ends.
        start, end: pixels there.
        logarithmic: `low` is positive then.
        ticks: (value, label).
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """The pixel of `value`; values beyond an end lie at it."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(max(value, self.low)), math.log10(low), math.log10(high)
        part = (value - low) / (high - low)
        return self.start + min(max(part, 0.0), 1.0) * (self.end - self.start)


def linear(low: float, high: float, start: float, end: float, *, wanted: int = 4, snug: bool = False) -> Scale:
    """A scale that begins and ends at ticks; `snug`: at the values themselves."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):  # one value: some room around it
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    step = nice_step((high - low) / wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if snug:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    else:
        low, high = first * step, last * step
    places = [number * step for number in range(first, last + 1)]
    return Scale(low, high, start, end, False, tuple(zip(places, labels(places), strict=True)))


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """A scale of powers of ten, of positive values."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // 5)
    places = [10.0**power for power in range(first, last + 1, every)]
    return Scale(10.0**first, 10.0**last, start, end, True, tuple((place, label(place)) for place in places))


def nice_step(rough: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    for factor in (1.0, 2.0, 2.5, 5.0, 10.0):
        if factor * power >= rough * (1 - 1e-9):
            return factor * power
    return 10.0 * power


def labels(places: Sequence[float]) -> list[str]:
    """Labels of evenly spaced ticks: all with as many decimals as tell them apart."""
    largest = max((abs(place) for place in places), default=0.0)
    step = abs(places[1] - places[0]) if len(places) > 1 else largest or 1.0
    if largest and (largest < 1e-3 or largest >= 1e6):
        return [label(place if abs(place) > step * 1e-6 else 0.0) for place in places]
    decimals = next(number for number in range(20) if abs(step * 10**number - round(step * 10**number)) < 1e-6)
    return [minus(f"{place if abs(place) > step * 1e-6 else 0.0:,.{decimals}f}") for place in places]


def label(value: float) -> str:
    """`0.05`, `2e-5`, `3 M`."""
    for size, name in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return minus(f"{value / size:g} {name}")
    if value and abs(value) < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return minus(f"{float(mantissa):g}e{int(power)}")
    return minus(f"{value:,g}")
