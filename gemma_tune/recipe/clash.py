"""Values of a recipe that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Place = Callable[[str], str]
"""A key path -> where its value comes from: `line 4`, `command line` or `default`."""


@dataclass(frozen=True, slots=True)
class Clash:
    """Values that contradict each other. `keys` are all that take part; the error is shown at the first one written."""

    keys: tuple[str, ...]
    what: str
    fix: str
