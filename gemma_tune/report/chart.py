"""A chart as inline SVG: axes, ticks, curves with their names at their ends. No colour is written here but by class."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from gemma_tune.report import axes
from gemma_tune.report.curves import Chart, Sheet
from gemma_tune.report.series import Point, Series, trend
from gemma_tune.report.words import count, figure, share

NARROW = (360, 196)
WIDE = (760, 250)
"""Pixels of a drawing at its natural size: half the page or a phone, and the whole page."""
_TOP, _BOTTOM = 12, 26
_LETTER = 6.3
"""Width of a letter of a label, about."""
_DOTS = 40
"""Points of a curve up to which each is marked: a held-out figure is a measurement, not a trend."""


def drawings(chart: Chart) -> list[tuple[str, Markup]]:
    """(class, SVG): one that fits half a page and a phone, or, where the chart is wide, one for each."""
    if not chart.sheet.wide:
        return [("any", svg(chart, *NARROW))]
    return [("wide", svg(chart, *WIDE)), ("narrow", svg(chart, *NARROW))]


def shown(sheet: Sheet, value: float) -> str:
    """A value of the chart as its read-out says it."""
    return share(value, 1) if sheet.share else figure(value, 4)


def named(chart: Chart, one: Series) -> bool:
    """Whether a read-out must name the curve: the title does, where there is only one that is of the whole run."""
    return len(chart.series) > 1 or one.role != "plain"


def summary(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    parts = []
    for one in chart.series:
        text = f"{one.name}: {shown(chart.sheet, one.first[1])} at step {count(one.first[0])}"
        if one.count > 1:
            text += (
                f" to {shown(chart.sheet, one.last[1])} at step {count(one.last[0])}, "
                f"lowest {shown(chart.sheet, one.lowest[1])} at step {count(one.lowest[0])}, "
                f"highest {shown(chart.sheet, one.highest[1])} at step {count(one.highest[0])}"
            )
        parts.append(text)
    unit = f", {chart.sheet.unit}" if chart.sheet.unit else ""
    return f"{chart.sheet.title}{unit}. " + "; ".join(parts) + "."


def data(chart: Chart) -> str:
    """What the read-out under the pointer needs, as JSON: numbers and our own names only."""
    series = [
        {
            "name": one.name,
            "named": named(chart, one),
            "role": one.role,
            "steps": [int(point.step) for point in one.points],
            "texts": [shown(chart.sheet, point.mean) for point in one.points],
        }
        for one in chart.series
    ]
    return json.dumps({"series": series}, ensure_ascii=False, separators=(",", ":"))


def svg(chart: Chart, width: int, height: int) -> Markup:
    """The drawing at `width` x `height` pixels; it shrinks and grows with the page."""
    names = [one.name for one in chart.series] if len(chart.series) > 1 else []
    right = width - 12 - max((len(name) for name in names), default=0) * _LETTER
    y = _value_scale(chart, height)
    left = 8 + max(map(_letters, (text for _, text in y.ticks))) * _LETTER
    x = _step_scale(chart, left, right, width)
    parts: list[str] = [*_grid(x, y, left, right, height)]
    parts += _marks(chart, y, left, right)
    parts += _events(chart, x, height)
    for one in chart.series:
        parts += _curve(one, x, y, spiky=chart.sheet.spiky)
    if names:
        parts += _names(chart, y, right, height)
    limits = f'data-left="{left:.1f}" data-right="{right:.1f}" data-first="{x.low:g}" data-last="{x.high:g}"'
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary(chart))}" '
        f"{limits}>{''.join(parts)}</svg>"
    )


def _letters(text: str) -> float:
    """Width of a label in letters: a percent sign and a minus are wider than a digit."""
    return len(text) + 0.8 * text.count("%") + 0.4 * text.count("−")


def _value_scale(chart: Chart, height: int) -> axes.Scale:
    bottom, top = height - _BOTTOM, _TOP
    low = min([one.lowest[1] for one in chart.series] + [value for value, _ in chart.marks])
    high = max([one.highest[1] for one in chart.series] + [value for value, _ in chart.marks])
    means = sorted(point.mean for one in chart.series for point in one.points)
    if chart.sheet.spiky and low > 0 and high > 30 * means[len(means) // 2]:
        return axes.logarithmic(low, high, bottom, top)
    if low > 0 and low < 0.6 * high:  # a curve that goes far has its zero
        low = 0.0
    if chart.sheet.share:
        scale = axes.linear(100 * low, min(100.0, 100 * high) if high <= 1 else 100 * high, bottom, top)
        ticks = tuple((value / 100, f"{text} %") for value, text in scale.ticks)
        return axes.Scale(scale.low / 100, scale.high / 100, bottom, top, False, ticks)
    return axes.linear(low, high, bottom, top, wanted=5 if height > NARROW[1] else 4)


def _step_scale(chart: Chart, left: float, right: float, width: int) -> axes.Scale:
    first = min(one.first[0] for one in chart.series)
    last = max(one.last[0] for one in chart.series)
    first = 0.0 if first <= 1 else first
    if last <= first:
        last = first + 1
    wanted = 4 if width < WIDE[0] else 8
    scale = axes.linear(first, last, left, right, wanted=min(wanted, int(last - first)) or 1, snug=True)
    ticks = tuple((value, text) for value, text in scale.ticks if value == int(value))
    if last >= 10_000:
        ticks = tuple((value, f"{value / 1000:g}k" if value else "0") for value, _ in ticks)
    return axes.Scale(first, last, left, right, False, ticks)


def _grid(x: axes.Scale, y: axes.Scale, left: float, right: float, height: int) -> Iterable[str]:
    for value, text in y.ticks:
        place = y.place(value)
        kind = "zero" if value == 0 else "grid"
        yield f'<path class="{kind}" d="M{left:.1f} {place:.1f}H{right:.1f}"/>'
        yield f'<text class="tick" text-anchor="end" x="{left - 6:.1f}" y="{place + 4:.1f}">{escape(text)}</text>'
    base = height - _BOTTOM
    yield f'<path class="axis" d="M{left:.1f} {base}H{right:.1f}"/>'
    for number, (value, text) in enumerate(x.ticks):
        place = x.place(value)
        last = number == len(x.ticks) - 1
        anchor = "end" if last and place > right - 14 else "middle"
        yield f'<path class="axis" d="M{place:.1f} {base}v4"/>'
        words = f"step {text}" if number == 0 else text
        anchor = "start" if number == 0 and place < left + 20 else anchor
        yield f'<text class="tick" text-anchor="{anchor}" x="{place:.1f}" y="{base + 18}">{escape(words)}</text>'


def _marks(chart: Chart, y: axes.Scale, left: float, right: float) -> Iterable[str]:
    taken: list[float] = []
    for value, text in sorted(chart.marks):
        place = y.place(value)
        above = place - 5 if all(abs(place - 5 - other) > 12 for other in taken) else place + 13
        taken.append(above)
        yield f'<path class="mark" d="M{left:.1f} {place:.1f}H{right:.1f}"/>'
        yield f'<text class="marked" text-anchor="end" x="{right:.1f}" y="{above:.1f}">{escape(text)}</text>'


def _events(chart: Chart, x: axes.Scale, height: int) -> Iterable[str]:
    """Where the run was resumed, and steps whose value was not finite."""
    base = height - _BOTTOM
    for step in chart.resumed:
        if x.low < step < x.high:
            place = x.place(step)
            title = f"<title>resumed after step {step:,}</title>"
            yield f'<path class="resumed" d="M{place:.1f} {_TOP}V{base}">{title}</path>'
    for step in sorted({step for one in chart.series for step in one.missing}):
        place = x.place(step)
        yield (
            f'<path class="missing" d="M{place - 4:.1f} {base - 8}l8 8m0 -8l-8 8">'
            f"<title>step {step:,}: not finite</title></path>"
        )


def _curve(one: Series, x: axes.Scale, y: axes.Scale, *, spiky: bool) -> Iterable[str]:
    places = [x.place(point.step) for point in one.points]
    if one.gathered:
        yield f'<path class="band {one.role}" d="{_band(one.points, places, y)}"/>'
    smooth = _smooth(one, spiky)
    heights = [y.place(point.mean) for point in one.points]
    line = _line(places, heights)
    if smooth is None:
        yield f'<path class="line {one.role}" d="{line}"/>'
    else:
        if not one.gathered:
            yield f'<path class="raw {one.role}" d="{line}"/>'
        yield f'<path class="line {one.role}" d="{_line(places, [y.place(value) for value in smooth])}"/>'
    if len(one.points) == 1 or (one.measured and len(one.points) <= _DOTS):
        for place, height in zip(places, heights, strict=True):
            yield f'<circle class="dot {one.role}" cx="{place:.1f}" cy="{height:.1f}" r="2.6"/>'


def _line(places: Sequence[float], heights: Sequence[float]) -> str:
    return "M" + "L".join(f"{place:.1f} {height:.1f}" for place, height in zip(places, heights, strict=True))


def _band(points: Sequence[Point], places: Sequence[float], y: axes.Scale) -> str:
    """Around a curve whose points stand for several steps: from their smallest to their largest value."""
    top = [y.place(point.high) for point in points]
    bottom = [y.place(point.low) for point in points]
    return _line(places, top) + "L" + _line(places[::-1], bottom[::-1])[1:] + "Z"


def _smooth(one: Series, spiky: bool) -> list[float] | None:
    """What is measured at each step is noisy; held-out figures are not smoothed, they are few and exact."""
    return trend(one.points, spiky=spiky) if one.role == "train" else None


def _names(chart: Chart, y: axes.Scale, right: float, height: int) -> Iterable[str]:
    """The name of each curve at its end; names that would lie on one another move apart."""
    ends = {one.name: (_smooth(one, chart.sheet.spiky) or [one.points[-1].mean])[-1] for one in chart.series}
    order = sorted(chart.series, key=lambda one: y.place(ends[one.name]))
    places = [y.place(ends[one.name]) for one in order]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + 14)
    spare = max(0.0, places[-1] - (height - _BOTTOM - 2))
    for place, one in zip(places, order, strict=True):
        yield f'<text class="name {one.role}" x="{right + 7:.1f}" y="{place - spare + 4:.1f}">{escape(one.name)}</text>'
