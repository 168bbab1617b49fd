"""Losses against scalar loops; their branches and gradients against tables."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.train.ppo.losses import PolicyTerms, ValueTerms, explained_variance, policy_terms, value_terms
from tests.unit.train.ppo.ragged import Ragged, close, many, ragged


def numbers(terms: PolicyTerms | ValueTerms) -> dict[str, float]:
    return {name: getattr(terms, name).item() for name in terms.__slots__}


# --- the policy


def policy_loop(new: list[list[float]], old: list[list[float]], advantages: list[list[float]], clip: float) -> dict:
    sums = dict.fromkeys(("loss", "clipped", "approx_kl", "ratio", "ratio_max", "tokens"), 0.0)
    for new_row, old_row, advantage_row in zip(new, old, advantages, strict=True):
        for log_prob, old_log_prob, advantage in zip(new_row, old_row, advantage_row, strict=True):
            ratio = math.exp(log_prob - old_log_prob)
            inside = min(max(ratio, 1 - clip), 1 + clip)
            sums["loss"] += max(-advantage * ratio, -advantage * inside)
            sums["clipped"] += -advantage * inside > -advantage * ratio
            sums["approx_kl"] += ratio - 1 - math.log(ratio)
            sums["ratio"] += ratio
            sums["ratio_max"] = max(sums["ratio_max"], ratio)
            sums["tokens"] += 1
    return sums


@many
@given(batch=ragged(), clip=st.sampled_from([0.05, 0.2, 0.5]))
def test_the_policy_loss_is_that_of_a_loop(batch: Ragged, clip: float) -> None:
    old, advantages = batch.tokens(), batch.tokens()
    new = old + batch.tokens(0.3)
    terms = numbers(policy_terms(new, old, advantages, batch.mask, clip=clip))
    expected = policy_loop(batch.rows(new), batch.rows(old), batch.rows(advantages), clip)
    assert terms == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        # slope: of the loss in log p, which is -A ratio where it is not clipped
        (1.0, 2.0, -2.0, -2.0, False),
        (1.0, -2.0, 2.0, 2.0, False),
        (1.1, 2.0, -2.2, -2.2, False),
        (0.9, -2.0, 1.8, 1.8, False),
        (1.5, 2.0, -2.4, 0.0, True),  # good, and pushed far enough
        (0.5, -2.0, 1.6, 0.0, True),  # bad, and pushed far enough
        (0.5, 2.0, -1.0, -1.0, False),  # good, but went the wrong way: called back
        (1.5, -2.0, 3.0, 3.0, False),  # bad, but went the wrong way: called back
        (1.5, 0.0, 0.0, 0.0, False),
        (0.5, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_branches_of_the_policy_loss(
    ratio: float, advantage: float, loss: float, slope: float, clipped: bool
) -> None:
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    terms = policy_terms(new, old, torch.tensor([[advantage]], dtype=torch.float64), torch.tensor([[True]]), clip=0.2)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(loss, abs=1e-12)
    assert new.grad.item() == pytest.approx(slope, abs=1e-12)
    assert terms.clipped.item() == clipped


@many
@given(batch=ragged())
def test_at_the_first_step_the_ratio_is_exactly_one(batch: Ragged) -> None:
    log_probs, advantages = batch.tokens().requires_grad_(), batch.tokens()
    terms = policy_terms(log_probs, log_probs.detach(), advantages, batch.mask, clip=0.2)
    terms.loss.backward()
    tokens = sum(batch.lengths)
    assert (terms.clipped, terms.approx_kl, terms.ratio, terms.ratio_max) == (0, 0, tokens, 1)
    assert torch.equal(log_probs.grad, -advantages.masked_fill(~batch.mask, 0)), "the plain policy gradient"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("difference", [50.0, -50.0, 1e4, -1e4])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_that_became_impossible_or_certain_keeps_the_loss_finite(
    dtype: torch.dtype, difference: float, advantage: float
) -> None:
    new = torch.full((1, 2), difference, dtype=dtype, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    terms = policy_terms(new, torch.zeros_like(new), torch.full_like(new, advantage), mask, clip=0.2)
    terms.loss.backward()
    assert all(math.isfinite(value) for value in numbers(terms).values())
    assert terms.ratio_max.item() == pytest.approx(math.exp(math.copysign(20, difference)), rel=1e-5)
    assert new.grad.abs().max() == 0


# --- the critic


def value_loop(
    values: list[list[float]], old: list[list[float]], returns: list[list[float]], clip: float | None
) -> dict:
    sums = dict.fromkeys(("loss", "clipped", "squared_error", "tokens"), 0.0)
    for value_row, old_row, return_row in zip(values, old, returns, strict=True):
        for value, old_value, target in zip(value_row, old_row, return_row, strict=True):
            inside = value if clip is None else min(max(value, old_value - clip), old_value + clip)
            sums["loss"] += 0.5 * max((value - target) ** 2, (inside - target) ** 2)
            sums["clipped"] += (inside - target) ** 2 > (value - target) ** 2
            sums["squared_error"] += (value - target) ** 2
            sums["tokens"] += 1
    return sums


@many
@given(batch=ragged(), clip=st.sampled_from([None, 0.05, 0.2, 1.0]))
def test_the_value_loss_is_that_of_a_loop(batch: Ragged, clip: float | None) -> None:
    old, returns = batch.tokens(), batch.tokens()
    values = old + batch.tokens(0.5)
    terms = numbers(value_terms(values, old, returns, batch.mask, clip=clip))
    expected = value_loop(batch.rows(values), batch.rows(old), batch.rows(returns), clip)
    assert terms == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "target", "clip", "loss", "slope", "clipped"),
    [
        # the old value is 0; slope: of the loss in V, which is V - R where it is not clipped
        (0.1, 1.0, 0.2, 0.405, -0.9, False),
        (-0.1, -1.0, 0.2, 0.405, 0.9, False),
        (0.5, 1.0, 0.2, 0.32, 0.0, True),  # towards the return, and far enough for a step
        (-0.5, -1.0, 0.2, 0.32, 0.0, True),
        (0.5, 0.0, 0.2, 0.125, 0.5, False),  # away from it: called back
        (-0.5, 0.0, 0.2, 0.125, -0.5, False),
        (0.5, 0.3, 0.2, 0.02, 0.2, False),  # beyond it: called back
        (0.5, 1.0, None, 0.125, -0.5, False),
        (9.0, 1.0, None, 32.0, 8.0, False),
    ],
)
def test_the_branches_of_the_value_loss(
    value: float, target: float, clip: float | None, loss: float, slope: float, clipped: bool
) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    returns, mask = torch.tensor([[target]], dtype=torch.float64), torch.tensor([[True]])
    terms = value_terms(values, torch.zeros_like(values), returns, mask, clip=clip)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(loss, abs=1e-12)
    assert values.grad.item() == pytest.approx(slope, abs=1e-12)
    assert terms.clipped.item() == clipped
    assert terms.squared_error.item() == pytest.approx((value - target) ** 2, abs=1e-12)


def test_the_rounding_of_a_value_is_no_clip() -> None:
    """None of 10,000 values has moved by 0.2; V_old + (V - V_old) would be another number than V for some."""
    generator = torch.Generator().manual_seed(0)
    old, returns = torch.randn(2, 100, 100, generator=generator)
    values = old + 0.38 * torch.rand(100, 100, generator=generator) - 0.19
    terms = value_terms(values, old, returns, torch.ones(100, 100, dtype=torch.bool), clip=0.2)
    assert terms.clipped == 0
    assert terms.loss == 0.5 * terms.squared_error


def test_only_the_loss_has_a_gradient() -> None:
    log_probs, mask = torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2, dtype=torch.bool)
    for terms in (
        policy_terms(log_probs, log_probs.detach(), torch.ones(1, 2), mask, clip=0.2),
        value_terms(log_probs, log_probs.detach(), torch.ones(1, 2), mask, clip=0.2),
    ):
        assert [name for name in terms.__slots__ if getattr(terms, name).requires_grad] == ["loss"]


# --- explained variance


@many
@given(batch=ragged(least_rows=2))
def test_explained_variance_is_that_of_the_tokens(batch: Ragged) -> None:
    values, returns = batch.tokens(), batch.tokens(2.0)
    foreseen = [value for row in batch.rows(values) for value in row]
    came = [value for row in batch.rows(returns) for value in row]
    missed = [came_one - foreseen_one for came_one, foreseen_one in zip(came, foreseen, strict=True)]
    expected = 1 - statistics.pvariance(missed) / statistics.pvariance(came)
    assert explained_variance(values, returns, batch.mask) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0], 1.0),
        ([11.0, 12.0, 13.0, 14.0], 1.0),  # an offset is no variance
        ([7.0, 7.0, 7.0, 7.0], 0.0),
        ([4.0, 3.0, 2.0, 1.0], -3.0),
    ],
)
def test_explained_variance_by_hand(values: list[float], expected: float) -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert explained_variance(torch.tensor([values]), returns, mask) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e6, 1e-6])
def test_returns_that_do_not_vary_explain_nothing(dtype: torch.dtype, constant: float) -> None:
    returns, mask = torch.full((3, 5), constant, dtype=dtype), torch.ones(3, 5, dtype=torch.bool)
    assert math.isnan(explained_variance(torch.randn(3, 5, dtype=dtype), returns, mask))


def test_returns_that_hardly_vary_still_count() -> None:
    returns = torch.tensor([[1.0, 1.0 + 2**-20]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert explained_variance(returns, returns, mask) == 1.0


def test_the_losses_add_up_over_micro_batches() -> None:
    """Sums, so that it does not matter how a minibatch is cut."""
    batch = Ragged([1, 5, 3, 4, 2], 6, math.nan, 3)
    old, advantages, returns = batch.tokens(), batch.tokens(), batch.tokens()
    new = old + batch.tokens(0.3)
    for function in (
        lambda part: policy_terms(new[part], old[part], advantages[part], batch.mask[part], clip=0.2),
        lambda part: value_terms(new[part], old[part], returns[part], batch.mask[part], clip=0.2),
    ):
        whole, parts = function(slice(None)), [function(slice(0, 1)), function(slice(1, 4)), function(slice(4, 5))]
        for name in set(whole.__slots__) - {"ratio_max"}:
            close(sum(getattr(part, name) for part in parts), getattr(whole, name))
