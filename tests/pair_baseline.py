"""How far length and shared words alone get with preference pairs: the number that a reward model has to beat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
"""`prompt`, `chosen` and `rejected` as lists of messages."""


def features(row: Row) -> np.ndarray:
    """Chosen minus rejected, (4,): log words, and the shares of an answer's words that the context, its last turn, and
    its last turn's rarer (longer) words hold."""
    chosen, rejected = (_of_answer(row, row[side][0]["content"]) for side in ("chosen", "rejected"))
    return chosen - rejected


def fit(differences: np.ndarray, *, penalty: float = 1.0, steps: int = 50) -> np.ndarray:
    """Weights of a logistic regression without intercept, by Newton's method: P(chosen wins) = sigmoid(w . x)."""
    weights = np.zeros(differences.shape[1])
    for _ in range(steps):
        probability = 1 / (1 + np.exp(-differences @ weights))
        gradient = differences.T @ (1 - probability) - penalty * weights
        curvature = (differences * (probability * (1 - probability))[:, None]).T @ differences
        weights += np.linalg.solve(curvature + penalty * np.eye(len(weights)), gradient)
    return weights


def held_out_accuracy(train: Sequence[Row], held_out: Sequence[Row], columns: Sequence[int] = (0, 1, 2, 3)) -> float:
    """Share of the held-out pairs whose chosen answer gets the higher score; an equal score counts one half."""
    x, y = (np.stack([features(row) for row in rows])[:, list(columns)] for rows in (train, held_out))
    scale = x.std(0) + 1e-9
    scores = (y / scale) @ fit(x / scale)
    return float(((scores > 0) + (scores == 0) / 2).mean())


def _of_answer(row: Row, answer: str) -> np.ndarray:
    words = _words(answer)
    context = set(_words(" ".join(message["content"] for message in row["prompt"])))
    last = set(_words(row["prompt"][-1]["content"]))
    long = {word for word in last if len(word) > 4}
    shares = [len(set(words) & seen) / max(1, len(set(words))) for seen in (context, last, long)]
    return np.array([np.log1p(len(words)), *shares])


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())
