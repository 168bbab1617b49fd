"""Figures as people read them."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any, TypeGuard

NONE = "–"
"""Where there is no figure."""

GIB = 2**30
MIB = 2**20

LARGEST = 1e300
"""Beyond it no run measures anything, and the difference of two values could be infinite."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` can be reckoned with: JSON has null where a figure was none, and True is no figure."""
    kind = type(value)
    return (kind is float or kind is int) and -LARGEST < value < LARGEST


def count(value: Any) -> str:
    """`12,809`."""
    return f"{round(value):,}" if is_number(value) else NONE


def short_count(value: Any) -> str:
    """`41.4 k`, `1.20 M`, `3.1 G`; whole below ten thousand."""
    if not is_number(value):
        return NONE
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and abs(value) >= 1e4:
            scaled = value / size
            return f"{scaled:.{0 if scaled >= 100 else 1}f} {name}"
    return count(value)


def figure(value: Any, digits: int = 4) -> str:
    """A measured value to `digits` significant digits; powers of ten where it is very large or small."""
    if not is_number(value):
        return NONE
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        mantissa, _, power = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return minus(f"{mantissa}e{int(power)}")
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return minus(f"{value:,.{places}f}")


def signed(value: Any, digits: int = 3) -> str:
    """`+0.12`, `−3.4`."""
    text = figure(value, digits)
    return f"+{text}" if is_number(value) and value > 0 else text


def share(value: Any, places: int = 0) -> str:
    """`87 %` of a fraction."""
    return minus(f"{100 * value:.{places}f} %") if is_number(value) else NONE


def change(before: Any, after: Any) -> str:
    """`−39.6 %`; empty where there is nothing to compare with."""
    if not is_number(before) or not is_number(after) or before <= 0:
        return ""
    return minus(f"{100 * (after / before - 1):+.1f} %")


def size(value: Any) -> str:
    """`7.90 GiB`, or MiB below a tenth of one."""
    if not is_number(value):
        return NONE
    return f"{value / GIB:.2f} GiB" if value >= GIB / 10 else f"{value / MIB:.0f} MiB"


def duration(seconds: Any) -> str:
    """`2 h 05 min`, `3 min 23 s`, `4.2 s`."""
    if not is_number(seconds) or seconds < 0:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min"


def moment(text: Any) -> datetime | None:
    """The time that an ISO text of run.json names."""
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None


def when(text: Any) -> str:
    """`23 November 2026, 23:03 UTC`."""
    found = moment(text)
    if found is None:
        return NONE
    zone = " UTC" if found.utcoffset() is not None and not found.utcoffset() else found.strftime(" %z").rstrip()
    return f"{found.day} {_MONTHS[found.month - 1]} {found.year}, {found:%H:%M}{zone}"


_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def minus(text: str) -> str:
    """A true minus sign instead of each hyphen."""
    return text.replace("-", "−")


def value(item: Any) -> str:
    """A value of a plan as a recipe would write it."""
    if isinstance(item, str):
        return item
    if isinstance(item, float):
        return f"{item:g}"
    return json.dumps(item, ensure_ascii=False, default=str)


def cut(text: Any, limit: int) -> str:
    """At most `limit` characters, and how many follow."""
    whole = str(text)
    return whole if len(whole) <= limit else f"{whole[:limit]}… ({len(whole) - limit:,} characters more)"
