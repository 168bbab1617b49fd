"""PPO on one batch of responses by plain loops, one token after the other: what the trainer's numbers have to equal.

Written from the papers, before its author saw the trainer, and it shares no line with it. PPO: arXiv 1707.06347. GAE:
1506.02438. Rewards, whitening and the clipped value loss of RLHF: 1909.08593 and 2403.17031. RLOO: 2402.14740.
REINFORCE++: 2501.03262. Everything is float64; nothing is padded, so nothing can be masked wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Ragged = list[np.ndarray]
"""One array per response, one number per token of it."""

EPSILON = 1e-8
"""Added to a standard deviation before it divides."""

LOG_RATIO_LIMIT = 20.0
"""A log-ratio is clamped to plus or minus this before `exp`."""


@dataclass(frozen=True, eq=False)
class Response:
    """One sampled response: arrays of its own length, prompt not included. `old` is the policy that sampled it."""

    old_log_probs: np.ndarray
    reference_log_probs: np.ndarray
    new_log_probs: np.ndarray
    old_values: np.ndarray
    new_values: np.ndarray
    score: float
    stopped: bool

    def __post_init__(self) -> None:
        arrays = (
            self.old_log_probs,
            self.reference_log_probs,
            self.new_log_probs,
            self.old_values,
            self.new_values,
        )
        if {array.shape for array in arrays} != {(len(self),)} or not len(self):
            raise ValueError(f"a response needs five arrays of one length, at least 1: {[a.shape for a in arrays]}")

    def __len__(self) -> int:
        return len(self.old_log_probs)


@dataclass(frozen=True)
class Settings:
    """What a run fixes. `group_size` is RLOO's k: that many consecutive responses answer the same prompt."""

    kl: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    score_clip: float | None = None
    missing_stop_penalty: float = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    estimator: Literal["gae", "rloo", "reinforce_pp"] = "gae"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.estimator == "gae" and not self.whiten_advantages:
            raise ValueError("GAE's advantages are always whitened")


@dataclass(frozen=True)
class Losses:
    """Means over tokens. The value head's numbers are None where the estimator has no value head.

    A clip fraction counts the tokens whose loss is the clipped one and larger than the other (2403.17031); an outside
    fraction counts those that lie beyond the clip range on either side, whether or not that changes the loss.
    """

    policy: float
    policy_clip_fraction: float
    policy_outside_fraction: float
    value: float | None
    value_clip_fraction: float | None
    value_outside_fraction: float | None
    approx_kl: float
    mean_ratio: float


@dataclass(frozen=True, eq=False)
class Result:
    """Everything that one batch gives.

    `rewards` are those before reward whitening, `used_rewards` those that the estimator saw: the same ones without it.
    """

    scores: list[float]
    rewards: Ragged
    used_rewards: Ragged
    raw_advantages: Ragged
    advantages: Ragged
    returns: Ragged
    losses: Losses
    explained_variance: float | None
    reference_k1: float
    reference_k3: float


def reference(batch: Sequence[Response], settings: Settings) -> Result:
    """The whole batch in one go: rewards, advantages, losses and the numbers worth logging."""
    scores = [shaped_score(response, settings) for response in batch]
    rewards = token_rewards(batch, settings)
    used = scaled(rewards) if settings.whiten_rewards else rewards
    raw, returns = estimate(batch, used, settings)
    advantages = whitened(raw) if settings.whiten_advantages else raw
    return Result(
        scores=scores,
        rewards=rewards,
        used_rewards=used,
        raw_advantages=raw,
        advantages=advantages,
        returns=returns,
        losses=losses(batch, advantages, returns, settings),
        explained_variance=explained_variance(batch, returns) if settings.estimator == "gae" else None,
        reference_k1=_mean(math.fsum(k1(response)) for response in batch),
        reference_k3=_mean(math.fsum(k3(response)) for response in batch),
    )


# --- rewards


def shaped_score(response: Response, settings: Settings) -> float:
    """The score within its limits, then less the penalty if the response ran into the length limit."""
    score = float(response.score)
    if settings.score_clip is not None:
        score = _clamp(score, -settings.score_clip, settings.score_clip)
    if not response.stopped:
        score -= settings.missing_stop_penalty
    return score


def k1(response: Response) -> np.ndarray:
    """log(old / reference) of each token: its mean over samples is the KL divergence, one of them may be negative."""
    return np.array(
        [old - reference for old, reference in zip(response.old_log_probs, response.reference_log_probs, strict=True)]
    )


def k3(response: Response) -> np.ndarray:
    """reference / old - 1 - log(reference / old) of each token: the same mean, and never negative."""
    return np.array(
        [
            _k3(reference - old)
            for old, reference in zip(response.old_log_probs, response.reference_log_probs, strict=True)
        ]
    )


def token_rewards(batch: Sequence[Response], settings: Settings) -> Ragged:
    """Each token pays for its distance from the reference; the last one also gets the score."""
    rewards = []
    for response in batch:
        row = [-settings.kl * distance for distance in k1(response)]
        row[-1] += shaped_score(response, settings)
        rewards.append(np.array(row))
    return rewards


def scaled(rows: Ragged) -> Ragged:
    """Over the standard deviation of all tokens; the mean moves only by that factor."""
    _, deviation = _moments(rows)
    return [np.array([x / (deviation + EPSILON) for x in row]) for row in rows]


def whitened(rows: Ragged) -> Ragged:
    """Mean 0 and standard deviation 1 over all tokens: a long response counts more than a short one."""
    mean, deviation = _moments(rows)
    return [np.array([(x - mean) / (deviation + EPSILON) for x in row]) for row in rows]


# --- advantages


def estimate(batch: Sequence[Response], rewards: Ragged, settings: Settings) -> tuple[Ragged, Ragged]:
    """Advantages before whitening, and returns.

    RLOO compares whole responses and takes its totals from the batch itself, so reward whitening does not reach it. Its
    return is the response's total, at each token; that of REINFORCE++ is the reward to go, which is its advantage too.
    """
    if settings.estimator == "gae":
        raw = [gae(row, r.old_values, settings.gamma, settings.lam) for row, r in zip(rewards, batch, strict=True)]
        return raw, [
            np.array([a + v for a, v in zip(row, r.old_values, strict=True)]) for row, r in zip(raw, batch, strict=True)
        ]
    if settings.estimator == "reinforce_pp":
        to_go = [rewards_to_go(row, settings.gamma) for row in rewards]
        return to_go, [row.copy() for row in to_go]
    totals = [shaped_score(r, settings) - settings.kl * math.fsum(k1(r)) for r in batch]
    lone = leave_one_out(totals, settings.group_size)
    return [np.full(len(r), a) for r, a in zip(batch, lone, strict=True)], [
        np.full(len(r), total) for r, total in zip(batch, totals, strict=True)
    ]


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Equation 16 of 1506.02438 as it is printed, a sum for each token. After the last token the value is 0, also
    where the response was cut off."""
    length = len(rewards)
    residuals = []
    for t in range(length):
        following = values[t + 1] if t + 1 < length else 0.0
        residuals.append(rewards[t] + gamma * following - values[t])
    return np.array(
        [math.fsum((gamma * lam) ** step * residuals[t + step] for step in range(length - t)) for t in range(length)]
    )


def rewards_to_go(rewards: np.ndarray, gamma: float) -> np.ndarray:
    """Discounted sum of this token's reward and all later ones."""
    length = len(rewards)
    return np.array([math.fsum(gamma**step * rewards[t + step] for step in range(length - t)) for t in range(length)])


def leave_one_out(totals: Sequence[float], group_size: int | None) -> list[float]:
    """Each total less the mean of the others in its group."""
    if group_size is None or group_size < 2 or len(totals) % group_size:
        raise ValueError(f"{len(totals)} responses do not make groups of {group_size}")
    advantages = []
    for i, total in enumerate(totals):
        start = i - i % group_size
        advantages.append(total - _mean(totals[j] for j in range(start, start + group_size) if j != i))
    return advantages


# --- losses


def losses(batch: Sequence[Response], advantages: Ragged, returns: Ragged, settings: Settings) -> Losses:
    """Losses of these responses with the given targets. A part of a batch goes in with its part of the targets."""
    policy, clipped, outside, ratios, kls = [], [], [], [], []
    for response, row in zip(batch, advantages, strict=True):
        for old, new, advantage in zip(response.old_log_probs, response.new_log_probs, row, strict=True):
            ratio = math.exp(_clamp(new - old, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
            free = ratio * advantage
            held = _clamp(ratio, 1 - settings.clip, 1 + settings.clip) * advantage
            policy.append(-min(free, held))
            clipped.append(float(held < free))
            outside.append(float(not 1 - settings.clip <= ratio <= 1 + settings.clip))
            ratios.append(ratio)
            kls.append(_k3(new - old))
    has_values = settings.estimator == "gae"
    value, value_clipped, value_outside = _value_losses(batch, returns, settings) if has_values else (None, None, None)
    return Losses(
        policy=_mean(policy),
        policy_clip_fraction=_mean(clipped),
        policy_outside_fraction=_mean(outside),
        value=value,
        value_clip_fraction=value_clipped,
        value_outside_fraction=value_outside,
        approx_kl=_mean(kls),
        mean_ratio=_mean(ratios),
    )


def _value_losses(batch: Sequence[Response], returns: Ragged, settings: Settings) -> tuple[float, float, float]:
    reach = math.inf if settings.value_clip is None else settings.value_clip
    errors, clipped, outside = [], [], []
    for response, row in zip(batch, returns, strict=True):
        for old, new, target in zip(response.old_values, response.new_values, row, strict=True):
            free = (new - target) ** 2
            held = (_clamp(new, old - reach, old + reach) - target) ** 2
            errors.append(0.5 * max(free, held))
            clipped.append(float(held > free))
            outside.append(float(not old - reach <= new <= old + reach))
    return _mean(errors), _mean(clipped), _mean(outside)


def explained_variance(batch: Sequence[Response], returns: Ragged) -> float:
    """1 - var(returns - old values) / var(returns) over all tokens: a constant offset of the values costs nothing. NaN
    where all returns are the same."""
    errors = [
        np.array([target - value for target, value in zip(row, response.old_values, strict=True)])
        for row, response in zip(returns, batch, strict=True)
    ]
    total = _moments(returns)[1] ** 2
    return 1 - _moments(errors)[1] ** 2 / total if total else math.nan


def _k3(log_ratio: float) -> float:
    log_ratio = _clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return math.exp(log_ratio) - 1 - log_ratio


def _clamp(x: float, low: float, high: float) -> float:
    return float(min(max(x, low), high))


def _mean(numbers: Iterable[float]) -> float:
    found = [float(x) for x in numbers]
    return math.fsum(found) / len(found)


def _moments(rows: Ragged) -> tuple[float, float]:
    """Mean and population standard deviation over all tokens of all rows."""
    tokens = [float(x) for row in rows for x in row]
    mean = _mean(tokens)
    return mean, math.sqrt(_mean((x - mean) ** 2 for x in tokens))


# --- batches


def random_batch(
    seed: int,
    *,
    responses: int = 8,
    longest: int = 12,
    drift: float = 0.3,
    score_spread: float = 3.0,
    stopped_share: float = 0.6,
    wild: bool = False,
) -> list[Response]:
    """Responses of 1 to `longest` tokens: one of exactly 1, one of exactly `longest`, one that stopped and one that did
    not, at random places. `drift` spreads the new log-probs and values around the old ones: 0 gives ratios of 1.

    `wild` pulls a first and a last token's log-ratios, old to new and old to reference, past the clamp, up and down.
    """
    if responses < 2 or longest < 2:
        raise ValueError("two responses and two tokens at least")
    rng = np.random.default_rng(seed)
    lengths = rng.permutation([1, longest, *rng.integers(1, longest + 1, responses - 2)])
    stopped = rng.permutation([True, False, *(rng.random(responses - 2) < stopped_share)])
    batch = []
    for length, stop in zip(lengths, stopped, strict=True):
        old = -rng.exponential(1.5, length)
        values = rng.normal(0.5, 1.0, length)
        batch.append(
            Response(
                old_log_probs=old,
                reference_log_probs=np.minimum(old + rng.normal(-0.1, 0.5, length), 0.0),
                new_log_probs=np.minimum(old + rng.normal(0.0, drift, length), 0.0) if drift else old.copy(),
                old_values=values,
                new_values=values + (rng.normal(0.0, drift, length) if drift else 0.0),
                score=float(rng.normal(0.5, score_spread)),
                stopped=bool(stop),
            )
        )
    if wild:
        at = int(np.argmax(lengths))
        batch[at] = _wild(batch[at])
    return batch


def _wild(response: Response) -> Response:
    old, near, new = (
        array.copy() for array in (response.old_log_probs, response.reference_log_probs, response.new_log_probs)
    )
    old[0], near[0], new[0] = -30.0, -0.5, -0.25
    old[-1], near[-1], new[-1] = -0.5, -31.0, -32.0
    return replace(response, old_log_probs=old, reference_log_probs=near, new_log_probs=new)
