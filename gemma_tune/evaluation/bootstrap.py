"""Intervals for the difference of two models on the same rows: paired bootstrap and McNemar's exact test. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
CONFIDENCE = 0.95
_AT_ONCE = 2_000_000
"""Numbers that are drawn together: 16 MB."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A figure of two models on the same rows.

    Attributes:
        a, b: the figure of each.
        difference: b - a.
        low, high: the percentile interval of the difference; None where there are fewer than two rows.
        rows: how many; they are what is drawn again.
    """

    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    rows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Difference:
    """The difference of two ratios of sums, sum(b) / sum(weights) - sum(a) / sum(weights), with its interval.

    Rows are drawn with replacement, both models' values together (Efron and Tibshirani, "An Introduction to the
    Bootstrap", 1993, chapters 8 and 13). With the nats and the tokens of each row this is the token-weighted loss; the
    tokens of one row depend on each other, so they are drawn together. With 0 and 1 and no weights it is a rate.

    Args:
        a, b: sums of each row, shape [rows].
        weights: what they are sums over, shape [rows], positive; 1 each if left out.

    Raises:
        ValueError: no rows, shapes that differ, or a weight that is not positive.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = np.ones(len(first)) if weights is None else np.asarray(weights, dtype=np.float64)
    if first.ndim != 1 or not len(first) or first.shape != second.shape or first.shape != size.shape:
        raise ValueError(f"shapes {first.shape}, {second.shape} and {size.shape}")
    if not (size > 0).all():
        raise ValueError("a row without weight")
    gain = second - first
    whole = size.sum()
    low = high = None
    if len(gain) > 1:
        tail = 100 * (1 - confidence) / 2
        drawn = _resampled(gain, size, resamples, np.random.default_rng(seed))
        low, high = (float(value) for value in np.percentile(drawn, [tail, 100 - tail]))
    a_whole, b_whole = float(first.sum() / whole), float(second.sum() / whole)
    return Difference(a_whole, b_whole, float(gain.sum() / whole), low, high, len(gain))


def _resampled(gain: np.ndarray, size: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    rows = len(gain)
    found = np.empty(resamples)
    step = max(1, _AT_ONCE // rows)
    for start in range(0, resamples, step):
        chosen = random.integers(rows, size=(min(step, resamples - start), rows))
        found[start : start + len(chosen)] = gain[chosen].sum(1) / size[chosen].sum(1)
    return found


def mcnemar(a: ArrayLike, b: ArrayLike) -> tuple[int, int, float]:
    """McNemar's exact test of two models on the same items (McNemar 1947; binomial, two-sided).

    Args:
        a, b: whether each item was right, shape [items].

    Returns:
        Items that `a` alone had right, items that `b` alone had right, and how likely such a split, or one that is more
        one-sided, would be if both were equally good.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(f"shapes {first.shape} and {second.shape}")
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    count, fewer = lost + won, min(lost, won)
    tail, ways = 0, 1  # whole numbers of any size: exact for any number of items
    for k in range(fewer + 1):
        tail += ways
        ways = ways * (count - k) // (k + 1)
    return lost, won, min(1.0, 2 * tail / 2**count)


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's correlation; None where one of both does not vary."""
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(first) < 2:
        return None
    first, second = first - first.mean(), second - second.mean()
    spread = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / spread if spread > 1e-12 else None


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's: Pearson's of the ranks, where equal values share the mean of their ranks."""
    return pearson(ranks(x), ranks(y))


def ranks(values: ArrayLike) -> np.ndarray:
    """The rank of each value from 1, equal ones sharing the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
