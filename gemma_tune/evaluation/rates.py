"""A share of few trials, and how far it can be trusted."""

from __future__ import annotations

import math
from typing import Any

_Z = 1.959963984540054
"""Of a two-sided interval of 95 % of the normal distribution."""


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson (1927), which holds for few trials and for shares of 0 and 1 as well.

    Of no trials nothing is known: (0, 1).
    """
    if not trials:
        return 0.0, 1.0
    share, square = hits / trials, _Z * _Z
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = _Z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - half) if hits else 0.0, min(1.0, middle + half) if hits < trials else 1.0


def rate(hits: int, trials: int, of: str, what: str) -> dict[str, Any]:
    """`{of: trials, what: hits, "rate", "interval"}`, as JSON; the rate of no trials is None."""
    return {of: trials, what: hits, "rate": hits / trials if trials else None, "interval": list(wilson(hits, trials))}
