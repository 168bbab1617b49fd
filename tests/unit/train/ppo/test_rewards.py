"""Rewards against loops, the facts about the two estimators of the KL, and the controller against a table."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.train.ppo.rewards import KlController, k1, k3, shape_scores, token_rewards
from tests.unit.train.ppo.ragged import Ragged, close, many, ragged


@many
@given(batch=ragged(), coefficient=st.sampled_from([0.0, 0.05, 0.2, 3.0]))
def test_token_rewards_are_the_penalty_and_the_score_at_the_last_token(batch: Ragged, coefficient: float) -> None:
    scores, log_probs, reference = batch.responses(4.0), batch.tokens(), batch.tokens()
    expected = []
    for score, own, theirs in zip(scores.tolist(), batch.rows(log_probs), batch.rows(reference), strict=True):
        row = []
        for t in range(len(own)):
            reward = -coefficient * (own[t] - theirs[t])
            if t == len(own) - 1:
                reward += score
            row.append(reward)
        expected.append(row)
    rewards = token_rewards(scores, log_probs, reference, batch.mask, coefficient=coefficient)
    close(rewards, batch.padded(expected))


def test_token_rewards_by_hand() -> None:
    mask = torch.tensor([[True, False, False], [True, True, True]])
    log_probs = torch.tensor([[-1.0, 9.0, 9.0], [-1.0, -2.0, -3.0]])
    reference = torch.tensor([[-3.0, 5.0, 5.0], [-1.0, -1.0, -5.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), log_probs, reference, mask, coefficient=0.5)
    assert rewards.tolist() == [[9.0, 0.0, 0.0], [0.0, 0.5, 19.0]]


def test_token_rewards_are_constants() -> None:
    log_probs = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not token_rewards(torch.ones(1), log_probs, log_probs, mask, coefficient=1.0).requires_grad


@pytest.mark.parametrize(
    ("score", "stopped", "clip", "penalty", "expected"),
    [
        (0.5, True, 10.0, 1.0, 0.5),
        (0.5, False, 10.0, 1.0, -0.5),
        (50.0, True, 10.0, 1.0, 10.0),
        (-50.0, True, 10.0, 1.0, -10.0),
        (50.0, False, 10.0, 1.0, 9.0),  # the clip comes first
        (-50.0, False, 10.0, 1.0, -11.0),
        (50.0, True, None, 1.0, 50.0),
        (50.0, False, None, 2.5, 47.5),
        (0.5, False, 10.0, 0.0, 0.5),
    ],
)
def test_scores_are_clipped_and_then_penalised(
    score: float, stopped: bool, clip: float | None, penalty: float, expected: float
) -> None:
    shaped = shape_scores(torch.tensor([score]), torch.tensor([stopped]), clip=clip, missing_stop_penalty=penalty)
    assert shaped.tolist() == [expected]


@many
@given(batch=ragged(), clip=st.sampled_from([None, 0.5, 2.0]), penalty=st.sampled_from([0.0, 1.0]))
def test_scores_of_a_batch_are_those_of_each_response(batch: Ragged, clip: float | None, penalty: float) -> None:
    scores, stopped = batch.responses(2.0), batch.flags()
    expected = []
    for score, stops in zip(scores.tolist(), stopped.tolist(), strict=True):
        if clip is not None:
            score = min(max(score, -clip), clip)
        expected.append(score if stops else score - penalty)
    shaped = shape_scores(scores, stopped, clip=clip, missing_stop_penalty=penalty)
    close(shaped, torch.tensor(expected, dtype=torch.float64))


# --- the two estimators


@many
@given(batch=ragged())
def test_k1_and_k3_are_their_formulas(batch: Ragged) -> None:
    log_probs, reference = batch.tokens(), batch.tokens()
    differences = [
        [ours - theirs for ours, theirs in zip(*rows, strict=True)]
        for rows in zip(batch.rows(log_probs), batch.rows(reference), strict=True)
    ]
    close(k1(log_probs, reference).masked_fill(~batch.mask, 0), batch.padded(differences))
    expected = [[math.exp(-d) - 1 + d for d in row] for row in differences]
    close(k3(log_probs, reference).masked_fill(~batch.mask, 0), batch.padded(expected))


@many
@given(log_prob=st.floats(-30, 0), difference=st.floats(-20, 20) | st.floats(-1e-6, 1e-6) | st.floats(-1e-15, 1e-15))
def test_k3_is_never_below_zero(log_prob: float, difference: float) -> None:
    for dtype in (torch.float64, torch.float32):
        ours = torch.tensor(log_prob, dtype=dtype)
        assert k3(ours, ours + difference) >= 0
        assert k3(torch.zeros((), dtype=dtype), torch.tensor(difference, dtype=dtype)) >= 0
    assert k3(ours, ours) == 0


@pytest.mark.parametrize("difference", [1e-2, 1e-3, -1e-3])
def test_k3_keeps_its_digits_where_the_policy_is_still_near_the_reference(difference: float) -> None:
    """exp(x) - 1 - x in fp32 is off by a tenth at 1e-3."""
    difference32 = torch.tensor(difference)
    exact = math.expm1(float(difference32)) - float(difference32)
    assert float(k3(torch.zeros(()), difference32)) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("difference", [50.0, -50.0, 1e4, -1e4])
def test_one_impossible_token_leaves_k3_finite(difference: float) -> None:
    nearest = math.copysign(20, difference)
    found = k3(torch.zeros(()), torch.tensor(difference))
    assert found.item() == pytest.approx(math.expm1(nearest) - nearest, rel=1e-5)


def two_softmaxes(seed: int, words: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each word under a policy and a reference, some nats apart."""
    logits = torch.randn(2, words, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy, reference = (1.5 * logits).log_softmax(-1)
    return policy, reference


@pytest.mark.parametrize("seed", range(5))
def test_both_have_the_kl_as_their_mean_under_the_policy(seed: int) -> None:
    policy, reference = two_softmaxes(seed)
    kl = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    assert kl > 0.5
    close((policy.exp() * k1(policy, reference)).sum(), kl)
    close((policy.exp() * k3(policy, reference)).sum(), kl)


@pytest.mark.parametrize("seed", range(5))
def test_k3_varies_less(seed: int) -> None:
    """Near the reference, where it is looked at: there k1 has both signs."""
    policy, reference = two_softmaxes(seed)
    near = (0.9 * policy + 0.1 * reference).log_softmax(-1)

    def variance(estimates: torch.Tensor) -> torch.Tensor:
        mean = (policy.exp() * estimates).sum()
        return (policy.exp() * (estimates - mean) ** 2).sum()

    assert k1(policy, near).min() < 0
    assert variance(k3(policy, near)) < 0.1 * variance(k1(policy, near))


@pytest.mark.parametrize("seed", range(5))
def test_rewarded_by_k1_the_policy_gradient_is_that_of_the_kl_and_by_k3_that_of_a_difference(seed: int) -> None:
    """What the docstring of `k1` says, for one token."""
    _, reference = two_softmaxes(seed)
    logits = two_softmaxes(seed + 100)[0].clone().requires_grad_()
    policy = logits.log_softmax(-1)

    def gradient(of: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    def policy_gradient(rewards: torch.Tensor) -> torch.Tensor:
        return gradient((policy.exp().detach() * rewards.detach() * policy).sum())

    forward = gradient((policy.exp() * (policy - reference)).sum())
    backward = gradient((reference.exp() * (reference - policy)).sum())
    close(policy_gradient(k1(policy, reference)), forward)
    close(policy_gradient(k3(policy, reference)), forward - backward)


# --- the controller


@pytest.mark.parametrize(
    ("kl", "episodes", "expected"),
    [
        (6.0, 64, 0.2),  # on target
        (6.6, 64, 0.200128),  # 10 % above: 0.2 (1 + 0.1 * 0.0064)
        (5.4, 64, 0.199872),  # 10 % below
        (7.2, 64, 0.200256),  # 20 %: the largest error
        (12.0, 64, 0.200256),  # more counts as much
        (1e9, 64, 0.200256),
        (4.8, 64, 0.199744),
        (0.0, 64, 0.199744),
        (-3.0, 64, 0.199744),  # a sample's k1 may be below 0
        (12.0, 512, 0.202048),  # 0.2 (1 + 0.2 * 0.0512)
        (12.0, 10_000, 0.24),  # a horizon: a fifth
        (12.0, 80_000, 0.24),  # and never more
        (0.0, 80_000, 0.16),  # nor below 0
    ],
)
def test_one_step_of_the_controller(kl: float, episodes: int, expected: float) -> None:
    controller = KlController(0.2, 6.0, 10_000)
    controller.update(kl, episodes)
    assert controller.coefficient == pytest.approx(expected, rel=1e-12)


def test_steps_of_the_controller_multiply() -> None:
    controller = KlController(0.2, 6.0, 10_000)
    for kl in (12.0, 5.4, 6.0):
        controller.update(kl, 64)
    assert controller.coefficient == pytest.approx(0.2 * 1.00128 * 0.99936, rel=1e-12)


def test_without_a_target_the_coefficient_stays() -> None:
    controller = KlController(0.05, None, 10_000)
    for kl in (0.0, 100.0, -1.0):
        controller.update(kl, 64)
    assert controller.coefficient == 0.05


@pytest.mark.parametrize("target", [6.0, None])
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_no_number_is_an_error(kl: float, target: float | None) -> None:
    controller = KlController(0.2, target, 10_000)
    with pytest.raises(ValueError, match="KL of a step"):
        controller.update(kl, 64)
    assert controller.coefficient == 0.2


def test_a_controller_goes_on_from_its_state_to_the_bit() -> None:
    straight, first = KlController(0.2, 6.0, 777), KlController(0.2, 6.0, 777)
    kls = [9.1, 2.3, 6.05, 6.4, 31.0]
    for kl in kls:
        straight.update(kl, 48)
    for kl in kls[:2]:
        first.update(kl, 48)
    resumed = KlController(0.2, 6.0, 777)
    resumed.load(json.loads(json.dumps(first.state())))
    for kl in kls[2:]:
        resumed.update(kl, 48)
    assert resumed.coefficient == straight.coefficient
