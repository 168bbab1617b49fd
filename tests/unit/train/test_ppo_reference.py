"""The reference that PPO is held against, held itself against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.ppo_reference import (
    Response,
    Settings,
    gae,
    leave_one_out,
    losses,
    random_batch,
    reference,
    rewards_to_go,
)

PLAIN = Settings(kl=0.0, gamma=1.0, lam=1.0, clip=0.2, value_clip=None)


def response(
    score: float = 0.0,
    *,
    old: tuple[float, ...] = (-1.0,),
    ref: tuple[float, ...] | None = None,
    ratio: tuple[float, ...] | None = None,
    values: tuple[float, ...] | None = None,
    new_values: tuple[float, ...] | None = None,
    stopped: bool = True,
) -> Response:
    """What a case leaves out is neutral: the reference and the new policy are the old one, values are 0."""
    values = values or (0.0,) * len(old)
    return Response(
        old_log_probs=np.array(old),
        reference_log_probs=np.array(ref or old),
        new_log_probs=np.array(old) + np.log(ratio or (1.0,) * len(old)),
        old_values=np.array(values),
        new_values=np.array(new_values or values),
        score=score,
        stopped=stopped,
    )


def flat(rows: list[np.ndarray]) -> list[float]:
    return [float(x) for row in rows for x in row]


# --- rewards


@pytest.mark.parametrize(
    ("score", "stopped", "limit", "shaped"),
    [(5, True, 3, 3), (5, False, 3, 2), (-5, True, 3, -3), (-5, False, 3, -4), (5, False, None, 4), (2, True, 3, 2)],
)
def test_the_score_is_clipped_first_and_punished_second(score, stopped, limit, shaped) -> None:
    settings = replace(PLAIN, score_clip=limit, missing_stop_penalty=1.0)
    result = reference([response(score, stopped=stopped)], settings)
    assert result.scores == [shaped]
    assert flat(result.rewards) == [shaped]


def test_each_token_pays_for_its_distance_and_the_last_one_gets_the_score() -> None:
    # old - reference: 0.5 and -1. A tenth of it, negative: -0.05 and 0.1; 2 on top of the last.
    batch = [response(2.0, old=(-1.0, -2.0), ref=(-1.5, -1.0)), response(7.0)]
    result = reference(batch, replace(PLAIN, kl=0.1))
    assert [len(row) for row in result.rewards] == [2, 1]
    assert flat(result.rewards) == pytest.approx([-0.05, 2.1, 7.0])
    assert flat(result.used_rewards) == flat(result.rewards)


def test_reward_whitening_divides_by_the_deviation_and_keeps_the_mean() -> None:
    # 2 and 6: mean 4, standard deviation 2 (of a sample it would be 2.83).
    result = reference([response(2.0), response(6.0)], replace(PLAIN, whiten_rewards=True))
    assert flat(result.rewards) == [2.0, 6.0]
    assert flat(result.used_rewards) == pytest.approx([1.0, 3.0])
    assert flat(result.returns) == pytest.approx([1.0, 3.0]), "values are taught the whitened rewards"


def test_distances_from_the_reference_are_summed_over_tokens_and_averaged_over_responses() -> None:
    # k1: 0.5 - 1 = -0.5. log(reference / old): -0.5 and 1, so k3 is (e^-0.5 - 0.5) + (e - 2). The second response: 0.
    result = reference([response(old=(-1.0, -2.0), ref=(-1.5, -1.0)), response()], PLAIN)
    assert result.reference_k1 == pytest.approx(-0.25)
    assert result.reference_k3 == pytest.approx((math.exp(-0.5) - 0.5 + math.e - 2) / 2)
    assert result.reference_k3 == pytest.approx(0.4124, abs=1e-4)


# --- advantages


def test_gae_by_hand() -> None:
    # Residuals: 0 + 2/2 - 1 = 0, 0 + 3/2 - 2 = -1/2, 4 + 0 - 3 = 1. gamma * lam = 1/4:
    # 1; -1/2 + 1/4 = -1/4; 0 - 1/16.
    batch = [response(4.0, old=(-1.0, -1.0, -1.0), values=(1.0, 2.0, 3.0))]
    result = reference(batch, replace(PLAIN, gamma=0.5, lam=0.5))
    assert flat(result.raw_advantages) == pytest.approx([-1 / 16, -1 / 4, 1.0])
    assert flat(result.returns) == pytest.approx([15 / 16, 7 / 4, 4.0])


def test_gae_at_its_two_ends() -> None:
    rewards, values = np.array([1.0, 0.0, 2.0]), np.array([5.0, -1.0, 4.0])
    # lam 0, one step: 1 - 1/2 - 5, 0 + 4/2 + 1, 2 - 4. lam 1, all steps: 1 + 2/4 - 5, 2/2 + 1, 2 - 4.
    assert gae(rewards, values, 0.5, 0.0) == pytest.approx([-4.5, 3.0, -2.0])
    assert gae(rewards, values, 0.5, 1.0) == pytest.approx([-3.5, 2.0, -2.0])


def test_a_response_that_was_cut_off_has_no_value_after_its_end_either() -> None:
    one, other = (reference([response(4.0, values=(3.0,), stopped=stop)], PLAIN) for stop in (True, False))
    assert flat(one.raw_advantages) == flat(other.raw_advantages) == [1.0]


def test_advantages_are_whitened_over_tokens_not_responses() -> None:
    # 0, 0 | 3: mean 1, variance (1 + 1 + 4) / 3 = 2. Over responses, 0 and 3 would give -1 and 1.
    result = reference([response(0.0, old=(-1.0, -1.0)), response(3.0)], PLAIN)
    assert flat(result.raw_advantages) == [0.0, 0.0, 3.0]
    assert flat(result.advantages) == pytest.approx([-(0.5**0.5), -(0.5**0.5), 2**0.5])
    assert flat(result.returns) == [0.0, 0.0, 3.0], "returns come from those before whitening"


def test_equal_advantages_whiten_to_zero() -> None:
    assert flat(reference([response(2.0), response(2.0)], PLAIN).advantages) == [0.0, 0.0]


def test_rewards_to_go_by_hand() -> None:
    # 3; 2 + 3/2; 1 + 3.5/2.
    assert rewards_to_go(np.array([1.0, 2.0, 3.0]), 0.5) == pytest.approx([2.75, 3.5, 3.0])


def test_reinforce_pp_whitens_rewards_to_go() -> None:
    # old - reference: -1 and -2, so rewards 1 and 2 + 4. To go: 1 + 6/2 = 4, and 6. The values are not looked at.
    batch = [response(4.0, old=(-2.0, -3.0), ref=(-1.0, -1.0), values=(9.0, -9.0))]
    result = reference(batch, replace(PLAIN, kl=1.0, gamma=0.5, estimator="reinforce_pp"))
    assert flat(result.raw_advantages) == flat(result.returns) == pytest.approx([4.0, 6.0])
    assert flat(result.advantages) == pytest.approx([-1.0, 1.0])
    assert result.explained_variance is result.losses.value is result.losses.value_clip_fraction is None


def test_leave_one_out_by_hand() -> None:
    # The others' means of 0, 3, 6: 4.5, 3, 1.5. A second group does not mix with the first.
    assert leave_one_out([0.0, 3.0, 6.0], 3) == [-4.5, 0.0, 4.5]
    assert leave_one_out([1.0, 3.0, 5.0, 5.0], 2) == [-2.0, 2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="3 responses do not make groups of 2"):
        leave_one_out([0.0, 3.0, 6.0], 2)


def test_rloo_gives_each_token_of_a_response_the_same() -> None:
    # The second: old - reference sums to 2, so 3.2 - 2/10 = 3. Totals 1, 3 | 5, 5 + 1 - 1 (cut off).
    batch = [
        response(1.0),
        response(3.2, old=(-1.0, -1.0), ref=(-1.5, -2.5)),
        response(5.0),
        response(6.0, stopped=False),
    ]
    settings = replace(PLAIN, kl=0.1, missing_stop_penalty=1.0, estimator="rloo", group_size=2)
    result = reference(batch, settings)
    assert flat(result.returns) == pytest.approx([1.0, 3.0, 3.0, 5.0, 5.0])
    assert flat(result.raw_advantages) == pytest.approx([-2.0, 2.0, 2.0, 0.0, 0.0])
    # Mean 2/5; mean square 12/5; variance 12/5 - 4/25 = 56/25.
    spread = math.sqrt(2.24)
    assert flat(result.advantages) == pytest.approx([x / spread for x in (-2.4, 1.6, 1.6, -0.4, -0.4)])


# --- losses


@pytest.mark.parametrize(
    ("ratio", "loss", "clipped"),
    [
        ((1.5, 1.5), 0.15, 0.5),  # -(min(1.5, 1.2) + min(-1.5, -1.2)) / 2: only the better one is held back
        ((0.5, 0.5), 0.15, 0.5),  # -(min(0.5, 0.8) + min(-0.5, -0.8)) / 2: only the worse one is
        ((1.5, 0.5), -0.2, 1.0),  # -(1.2 - 0.8) / 2
        ((0.5, 1.5), 0.5, 0.0),  # -(0.5 - 1.5) / 2: both went the wrong way, and nothing holds them there
        ((1.1, 0.9), -0.1, 0.0),
    ],
)
def test_policy_loss_by_hand(ratio, loss, clipped) -> None:
    # Scores 3 and 1 whiten to 1 and -1.
    result = reference([response(3.0, ratio=ratio[:1]), response(1.0, ratio=ratio[1:])], PLAIN)
    assert flat(result.advantages) == pytest.approx([1.0, -1.0])
    assert result.losses.policy == pytest.approx(loss)
    assert result.losses.policy_clip_fraction == clipped
    assert result.losses.policy_outside_fraction == (0.0 if ratio == (1.1, 0.9) else 1.0)
    assert result.losses.mean_ratio == pytest.approx(sum(ratio) / 2)
    assert result.losses.approx_kl == pytest.approx(sum(r - 1 - math.log(r) for r in ratio) / 2)


def test_losses_are_means_over_tokens() -> None:
    # One token with loss -1 * 2, three with -1 * 1 (ratio 1). Over responses it would be -1.5.
    batch = [response(), response(old=(-1.0, -1.0, -1.0), new_values=(2.0, 2.0, 2.0))]
    targets = [np.array([2.0]), np.array([1.0, 1.0, 1.0])]
    found = losses(batch, targets, [np.array([4.0]), np.zeros(3)], PLAIN)
    assert found.policy == pytest.approx(-5 / 4)
    assert found.value == pytest.approx((8.0 + 3 * 2.0) / 4)


@pytest.mark.parametrize(
    ("value_clip", "loss", "clipped", "outside"), [(0.2, 0.7225, 0.5, 1.0), (None, 0.625, 0.0, 0.0)]
)
def test_value_loss_by_hand(value_clip, loss, clipped, outside) -> None:
    # Both should be 1 and were 0. 0.5 is closer than 0.2, which counts: 0.64 / 2. -0.5 is further than -0.2: 2.25 / 2.
    batch = [response(1.0, new_values=(0.5,)), response(1.0, new_values=(-0.5,))]
    found = reference(batch, replace(PLAIN, value_clip=value_clip)).losses
    assert found.value == pytest.approx(loss)
    assert (found.value_clip_fraction, found.value_outside_fraction) == (clipped, outside)


def test_explained_variance_by_hand() -> None:
    # Returns 1 and 3, variance 1; off by 1 and 2, variance 1/4.
    assert reference([response(1.0), response(3.0, values=(1.0,))], PLAIN).explained_variance == pytest.approx(0.75)
    assert math.isnan(reference([response(1.0), response(1.0)], PLAIN).explained_variance)


def test_a_log_ratio_is_clamped_before_exp() -> None:
    batch = [replace(response(old=(-30.0, -1.0)), new_log_probs=np.array([-1.0, -30.0]))]
    found = reference(batch, PLAIN).losses
    assert found.mean_ratio == pytest.approx((math.exp(20) + math.exp(-20)) / 2)
    assert found.approx_kl == pytest.approx((math.exp(20) - 21 + math.exp(-20) + 19) / 2)


# --- batches


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="five arrays of one length"):
        replace(response(), old_values=np.zeros(2))
    with pytest.raises(ValueError, match="always whitened"):
        replace(PLAIN, whiten_advantages=False)


@pytest.mark.parametrize("seed", range(5))
def test_random_batches_reach_every_branch(seed) -> None:
    batch, again = random_batch(seed), random_batch(seed)
    assert all(np.array_equal(a.new_values, b.new_values) for a, b in zip(batch, again, strict=True))
    assert {1, 12} <= {len(r) for r in batch} <= set(range(1, 13))
    assert {r.stopped for r in batch} == {True, False}
    assert all((x <= 0).all() for r in batch for x in (r.old_log_probs, r.reference_log_probs, r.new_log_probs))
    settings = Settings(score_clip=2.0, missing_stop_penalty=1.0)
    found = reference(batch, settings)
    assert any(abs(r.score) > 2 for r in batch)
    assert any(abs(r.score) < 2 for r in batch)
    assert 0 < found.losses.policy_clip_fraction < found.losses.policy_outside_fraction < 1
    assert 0 < found.losses.value_clip_fraction < found.losses.value_outside_fraction < 1
    assert np.mean(flat(found.advantages)) == pytest.approx(0, abs=1e-12)
    assert np.std(flat(found.advantages)) == pytest.approx(1)


def test_without_drift_nothing_is_clipped_and_the_policy_loss_is_zero() -> None:
    found = reference(random_batch(0, drift=0.0), Settings()).losses
    assert (found.mean_ratio, found.approx_kl, found.policy_outside_fraction) == (1.0, 0.0, 0.0)
    assert found.policy == pytest.approx(0, abs=1e-12), "the mean of whitened advantages"


def test_wild_batches_pass_the_clamp_on_both_sides() -> None:
    batch = random_batch(0, wild=True)
    for other in ("new_log_probs", "reference_log_probs"):
        steps = np.concatenate([getattr(r, other) - r.old_log_probs for r in batch])
        assert steps.max() > 20
        assert steps.min() < -20
    assert reference(batch, Settings()).losses.mean_ratio < math.exp(20)
