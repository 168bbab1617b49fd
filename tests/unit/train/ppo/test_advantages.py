"""Advantages against loops that spell out their definitions."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.train.ppo.advantages import gae, masked_mean, masked_variance, rewards_to_go, rloo, whiten
from tests.unit.train.ppo.ragged import Ragged, close, many, ragged

fractions = st.sampled_from([0.0, 0.3, 0.5, 0.95, 0.99, 1.0])


def gae_of_one(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over k of (gamma lam)^k delta_{t+k}: the definition, not the recursion."""
    values = [*values, 0.0]
    deltas = [reward + gamma * values[t + 1] - values[t] for t, reward in enumerate(rewards)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@many
@given(batch=ragged(), gamma=fractions, lam=fractions)
def test_gae_is_the_sum_of_its_definition(batch: Ragged, gamma: float, lam: float) -> None:
    rewards, values = batch.tokens(), batch.tokens(3.0)
    advantages, returns = gae(rewards, values, batch.mask, gamma=gamma, lam=lam)
    expected = [gae_of_one(*row, gamma, lam) for row in zip(batch.rows(rewards), batch.rows(values), strict=True)]
    close(advantages, batch.padded(expected))
    plus_values = [[a + v for a, v in zip(*row, strict=True)] for row in zip(expected, batch.rows(values), strict=True)]
    close(returns, batch.padded(plus_values))


@many
@given(batch=ragged(), gamma=fractions)
def test_rewards_to_go_is_the_discounted_sum_of_what_follows(batch: Ragged, gamma: float) -> None:
    rewards = batch.tokens()
    expected = [
        [sum(gamma**k * reward for k, reward in enumerate(row[t:])) for t in range(len(row))]
        for row in batch.rows(rewards)
    ]
    close(rewards_to_go(rewards, batch.mask, gamma=gamma), batch.padded(expected))


def test_gae_by_hand() -> None:
    """Two responses of one and three tokens; gamma 1, lambda 0.5."""
    rewards = torch.tensor([[2.0, math.nan, math.nan], [0.0, 0.0, 4.0]])
    values = torch.tensor([[0.5, math.nan, math.nan], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # deltas of the second: 0 + 2 - 1, 0 + 3 - 2, 4 + 0 - 3
    assert advantages.tolist() == [[1.5, 0.0, 0.0], [1.0 + 0.5 * 1.5, 1.0 + 0.5 * 1.0, 1.0]]
    assert returns.tolist() == [[2.0, 0.0, 0.0], [2.75, 3.5, 4.0]]


@many
@given(batch=ragged())
def test_means_and_variances_are_those_of_the_tokens(batch: Ragged) -> None:
    values = batch.tokens(5.0)
    tokens = [value for row in batch.rows(values) for value in row]
    assert float(masked_mean(values, batch.mask)) == pytest.approx(statistics.fmean(tokens), rel=1e-12, abs=1e-12)
    variance = float(masked_variance(values, batch.mask))
    assert variance == pytest.approx(statistics.pvariance(tokens), rel=1e-12, abs=1e-12)


@many
@given(batch=ragged(), shift_mean=st.booleans())
def test_whitening_is_by_the_mean_and_spread_of_the_tokens(batch: Ragged, shift_mean: bool) -> None:
    values = batch.tokens(5.0) + 3.0
    tokens = [value for row in batch.rows(values) for value in row]
    mean, variance = statistics.fmean(tokens), statistics.pvariance(tokens)
    back = 0.0 if shift_mean else mean
    expected = [[(value - mean) / math.sqrt(variance + 1e-8) + back for value in row] for row in batch.rows(values)]
    # A single token has variance 0 and 1 / sqrt(1e-8) in front of the rounding of its mean.
    close(whiten(values, batch.mask, shift_mean=shift_mean), batch.padded(expected), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_values_are_whitened_to_zero_and_not_to_their_rounding(dtype: torch.dtype) -> None:
    values = torch.full((3, 7), 0.1, dtype=dtype)
    assert whiten(values, torch.ones(3, 7, dtype=torch.bool)).abs().max() < 1e-10


def test_the_mean_of_many_large_numbers_keeps_its_digits_in_fp32() -> None:
    """100,000 tokens around 1000: what a naive fp32 sum of squares gets wrong in the first digit."""
    values = 1000 + torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(100, 1000, dtype=torch.bool)
    exact = values.double()
    assert float(masked_mean(values, mask)) == pytest.approx(float(exact.mean()), rel=1e-12)
    assert float(masked_variance(values, mask)) == pytest.approx(float(exact.var(correction=0)), rel=1e-4)


@many
@given(prompts=st.integers(1, 5), group=st.integers(2, 5), seed=st.integers(0, 2**32 - 1))
def test_rloo_takes_the_mean_of_the_others_off(prompts: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    totals = torch.randn(prompts * group, generator=generator, dtype=torch.float64)
    expected = []
    for first in range(0, prompts * group, group):
        of_prompt = totals[first : first + group].tolist()
        for index, own in enumerate(of_prompt):
            expected.append(own - statistics.fmean(of_prompt[:index] + of_prompt[index + 1 :]))
    close(rloo(totals, group), torch.tensor(expected, dtype=torch.float64))


def test_rloo_does_not_mix_prompts() -> None:
    assert rloo(torch.tensor([1.0, 3.0, 100.0, 100.0]), 2).tolist() == [-2.0, 2.0, 0.0, 0.0]


@pytest.mark.parametrize(("responses", "group"), [(4, 1), (4, 0), (5, 2), (2, 3)])
def test_a_group_that_cannot_be_compared_is_refused(responses: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"{responses} responses .* groups of {group}"):
        rloo(torch.zeros(responses), group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_advantages_are_constants_of_the_type_that_came_in(dtype: torch.dtype) -> None:
    rewards = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    made = [
        *gae(rewards, rewards, mask, gamma=1.0, lam=0.95),
        rewards_to_go(rewards, mask, gamma=1.0),
        rloo(rewards.sum(1), 2),
        whiten(rewards, mask),
        whiten(rewards, mask, shift_mean=False),
    ]
    assert not any(tensor.requires_grad for tensor in made)
    assert {tensor.dtype for tensor in made} == {dtype}
