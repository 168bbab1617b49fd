"""Figures of a reward model that counts tokens, of one that does not, and of probabilities that are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_tune.evaluation.rewards import PairScores, calibration_error, describe, render
from gemma_tune.train.reward_trainer import figures_of, pair_sums


def scores(chosen: np.ndarray, rejected: np.ndarray, longer: np.ndarray, shorter: np.ndarray) -> PairScores:
    import torch

    sums = pair_sums(
        torch.tensor(np.concatenate([chosen, rejected])), torch.tensor(np.concatenate([longer, shorter])), None
    )
    whole = figures_of(sums.tolist())
    assert whole is not None
    return PairScores(whole, chosen, rejected, longer.astype(int), shorter.astype(int))


def test_a_model_that_counts_tokens_shows() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(5, 80, 200), random.integers(5, 80, 200)
    found = describe(scores(first / 8, second / 8, first, second))
    assert found["length_correlation"] == pytest.approx(1.0) and found["difference_rank_correlation"] == pytest.approx(
        1
    )
    assert found["by_length"]["chosen_longer"]["accuracy"] == 1.0
    assert found["by_length"]["chosen_shorter"]["accuracy"] == 0.0
    assert found["accuracy"] == pytest.approx((first > second).mean())


def test_a_model_that_does_not_count_them() -> None:
    random = np.random.default_rng(0)
    first, second = random.integers(5, 80, 400), random.integers(5, 80, 400)
    found = describe(scores(random.normal(1, 1, 400), random.normal(0, 1, 400), first, second))
    assert abs(found["difference_correlation"]) < 0.15
    sides = found["by_length"]
    assert abs(sides["chosen_longer"]["accuracy"] - sides["chosen_shorter"]["accuracy"]) < 0.1


def test_the_difference_of_a_prompt_does_not_count() -> None:
    """Rewards and lengths that go together from prompt to prompt only: within a pair they do not."""
    random = np.random.default_rng(1)
    level = random.integers(10, 100, 300)
    found = describe(
        scores(level + random.normal(0, 1, 300), level + random.normal(0, 1, 300),
               level + random.integers(-3, 4, 300), level + random.integers(-3, 4, 300))
    )  # fmt: skip
    assert found["length_correlation"] > 0.95 and abs(found["difference_correlation"]) < 0.2


def test_calibration() -> None:
    random = np.random.default_rng(2)
    gap = np.abs(random.normal(0, 2, 20_000))
    right = random.random(20_000) < 1 / (1 + np.exp(-gap))
    assert calibration_error(np.where(right, gap, -gap)) < 0.02
    assert calibration_error(-np.full(10, 20.0)) == pytest.approx(1.0)  # sure, and always wrong
    assert calibration_error(np.full(10, 20.0)) == pytest.approx(0.0, abs=1e-6)


def test_no_spread_has_no_correlation_and_lines_say_so() -> None:
    same = np.full(4, 7)
    found = describe(scores(np.array([1.0, 2, 3, 4]), np.zeros(4), same, same))
    assert found["length_correlation"] is None and found["by_length"]["chosen_longer"]["accuracy"] is None
    lines = render(found)
    assert "none (no spread)" in lines[1] and lines[2] == "rated right: 100.0% of 4 where the chosen answer is as long"
