"""Intervals and tests for pairs: against the truth by simulation, against scipy, and on cases known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma_tune.evaluation.bootstrap import mcnemar, paired_difference, pearson, ranks, spearman


def test_a_model_and_itself_differ_by_exactly_nothing() -> None:
    nats = np.random.default_rng(0).gamma(2.0, 30.0, 40)
    found = paired_difference(nats, nats, np.arange(1, 41))
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)
    assert found.a == found.b


def test_the_loss_weighs_tokens_and_not_rows() -> None:
    # 10 tokens at 1 nat and 90 tokens at 2 nats, against 1 nat everywhere.
    found = paired_difference([10.0, 180.0], [10.0, 90.0], [10, 90])
    assert found.a == pytest.approx(1.9) and found.b == pytest.approx(1.0)
    assert found.difference == pytest.approx(-0.9)
    assert found.low == pytest.approx(-1.0) and found.high == pytest.approx(0.0)  # only one of both rows drawn


def test_one_row_has_no_interval() -> None:
    found = paired_difference([1.0], [2.0])
    assert found.difference == 1.0 and found.low is None and found.high is None


def test_the_interval_is_reproducible_and_blocks_of_draws_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=50), random.normal(size=50)
    first = paired_difference(a, b, seed=7)
    monkeypatch.setattr("gemma_tune.evaluation.bootstrap._AT_ONCE", 50 * 1250)
    assert paired_difference(a, b, seed=7) == first
    assert paired_difference(a, b, seed=8) != first


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """300 worlds of 80 rows whose tokens and losses go together; the true difference is known."""
    truth, inside, signs = 0.3, 0, 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        tokens = random.integers(5, 100, 80)
        level = random.normal(2.0, 0.5, 80)  # of the row, in both models: what pairing takes out
        a = tokens * (level + random.normal(0, 0.4, 80))
        b = tokens * (level + truth + random.normal(0, 0.4, 80))
        found = paired_difference(a, b, tokens, resamples=1000, seed=seed)
        assert found.low is not None and found.high is not None
        inside += found.low <= truth <= found.high
        signs += found.low > 0
    assert 0.91 <= inside / 300 <= 0.98  # 0.95 with a standard error of 0.013
    assert signs / 300 > 0.9  # and it is narrow enough to see such a difference


def test_without_pairing_the_interval_would_be_wider() -> None:
    random = np.random.default_rng(3)
    level = random.normal(0, 5.0, 100)
    a, b = level + random.normal(0, 0.1, 100), level + random.normal(0, 0.1, 100)
    paired, shuffled = paired_difference(a, b), paired_difference(a, random.permutation(b))
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("a", "b", "weights"), [([], [], None), ([1], [1, 2], None), ([1, 2], [1, 2], [1, 0]), ([[1]], [[1]], None)]
)
def test_what_cannot_be_compared_is_refused(a: list, b: list, weights: list | None) -> None:
    with pytest.raises(ValueError):
        paired_difference(a, b, weights)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 1), (0, 6), (5, 5), (3, 12), (40, 20)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    both = [1] * 7 + [0] * 4  # items on which they agree say nothing
    a, b = [1] * lost + [0] * won + both, [0] * lost + [1] * won + both
    found = mcnemar(a, b)
    assert found[:2] == (lost, won)
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert found[2] == pytest.approx(expected)
    assert mcnemar(b, a) == (won, lost, found[2])


def test_mcnemar_of_six_to_none_by_hand() -> None:
    assert mcnemar([0] * 6, [1] * 6) == (0, 6, 2 / 2**6)


def test_mcnemar_of_many_items_does_not_overflow() -> None:
    a, b = np.zeros(20_000, dtype=bool), np.zeros(20_000, dtype=bool)
    a[:9_900], b[9_900:] = True, True
    assert 0.1 < mcnemar(a, b)[2] < 0.2


def test_correlations_agree_with_scipy_also_where_values_are_equal() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(5)
    x, y = random.integers(0, 6, 60), random.integers(0, 6, 60) + 0.0
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_what_does_not_vary_correlates_with_nothing() -> None:
    assert pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert spearman([1.0], [1.0]) is None
    assert math.isclose(spearman([1, 2, 3], [1, 10, 1000]) or 0, 1.0)
