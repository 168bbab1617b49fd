"""The clipped losses of PPO.

B responses, T tokens, padded on the right. mask [B, T] bool: True at a token of the response, its stop token included.
What stands outside the mask has no part in a loss, nor in its gradient, NaN neither.

Everything is a sum over tokens, not a mean: whoever calls divides by the tokens of the whole minibatch, over all its
micro-batches and processes. A token then weighs the same however the minibatch was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gemma_tune.train.ppo.advantages import Total, identity, masked_mean, masked_variance
from gemma_tune.train.ppo.rewards import LARGEST_LOG_RATIO, k3


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Sums over the tokens of a micro-batch; all scalar tensors, and only `loss` has a gradient.

    Attributes:
        loss: the loss, in units of the advantages.
        clipped: tokens whose loss is the clipped one, which have no gradient.
        approx_kl: of k3 of the old policy against the new one, nats: how far the update has moved.
        ratio: of p / p_old.
        ratio_max: the largest p / p_old (not a sum); 0 without a token.
        tokens: how many.
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    approx_kl: torch.Tensor
    ratio: torch.Tensor
    ratio_max: torch.Tensor
    tokens: torch.Tensor


def policy_terms(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
) -> PolicyTerms:
    """PPO's clipped surrogate, as a loss.

        ratio = p / p_old
        loss  = max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip))

    A token that has already moved by more than `clip` to where its advantage points gets no further push; one that
    moved the wrong way is always called back, unless it is further away than `LARGEST_LOG_RATIO`.

    Args:
        log_probs: [B, T], log p of each token under the policy that is trained. The only one with a gradient.
        old_log_probs: [B, T], of the policy that drew them.
        advantages: [B, T].
        mask: [B, T].
        clip: epsilon in the paper.

    Source: Schulman et al., arXiv 1707.06347, equation 7, with the sign of a loss.
    """
    advantages = advantages.masked_fill(~mask, 0)
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    ratio = log_ratio.exp()

    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = torch.maximum(free, clipped).sum()

    with torch.no_grad():
        return PolicyTerms(
            loss=loss,
            clipped=(clipped > free).sum(),
            approx_kl=k3(old_log_probs, log_probs).masked_fill(~mask, 0).sum(),
            ratio=ratio.masked_fill(~mask, 0).sum(),
            ratio_max=ratio.masked_fill(~mask, 0).amax(),
            tokens=mask.sum(),
        )


@dataclass(frozen=True, slots=True)
class ValueTerms:
    """Sums over the tokens of a micro-batch; all scalar tensors, and only `loss` has a gradient.

    Attributes:
        loss: the loss, in squared units of the reward.
        clipped: tokens whose loss is the clipped one, which have no gradient.
        squared_error: of (V - R)^2, before any clip.
        tokens: how many.
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    squared_error: torch.Tensor
    tokens: torch.Tensor


def value_terms(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None,
) -> ValueTerms:
    """The squared error of the critic, whose values may move by at most `clip` in a step.

        V_clipped = clip(V, V_old - clip, V_old + clip)
        loss      = 0.5 max((V - R)^2, (V_clipped - R)^2)

    Args:
        values: [B, T], of the critic that is trained. The only one with a gradient.
        old_values: [B, T], of the critic at the rollout.
        returns: [B, T], from `advantages.gae`.
        mask: [B, T].
        clip: in units of the reward; None: the plain squared error.

    Source: not in the paper of PPO but in OpenAI's code (openai/lm-human-preferences, `train_policy.py`, `loss`), and
    in the N+ implementation details (arXiv 2403.17031, "value clipping").
    """
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    free = (values - returns).square()
    clipped = free
    if clip is not None:
        # Not V_old + clip(V - V_old): the rounding of that would count tokens as clipped that are not.
        clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    loss = 0.5 * torch.maximum(free, clipped).sum()

    with torch.no_grad():
        return ValueTerms(loss=loss, clipped=(clipped > free).sum(), squared_error=free.sum(), tokens=mask.sum())


@torch.no_grad()
def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, total: Total = identity
) -> float:
    """1 - Var(R - V) / Var(R) over the tokens of all processes: the share of the returns that the critic foresaw.

    1: all of it; 0: no more than a constant would; below 0: less. NaN where the returns do not vary.

    Args:
        values: [B, T], of the critic at the rollout.
        returns: [B, T].
        mask: [B, T].
        total: adds up over all processes.
    """
    variance = masked_variance(returns, mask, total)
    mean_square = masked_mean(returns.square(), mask, total)
    missed = masked_variance(returns - values, mask, total)
    if variance <= 1e-24 * mean_square:  # nothing but the rounding of the mean
        return math.nan
    return float(1 - missed / variance)
