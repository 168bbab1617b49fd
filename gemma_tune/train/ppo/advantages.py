"""How much better than expected each token of a response was, from its rewards. Three estimators, one scale.

B responses, T tokens, padded on the right. mask [B, T] bool: True at a token of the response, its stop token included.
What stands outside the mask is never read, NaN neither, and results are 0 there. Rewards, values and advantages are in
units of the reward.

Advantages are constants to the losses: no function that makes them keeps a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Total = Callable[[torch.Tensor], torch.Tensor]
"""Adds a tensor up over all processes. Each process must call it as often as the others."""


def identity(sums: torch.Tensor) -> torch.Tensor:
    """The `Total` of a single process."""
    return sums


def masked_mean(values: torch.Tensor, mask: torch.Tensor, total: Total = identity) -> torch.Tensor:
    """Mean over the tokens of all processes: values [B, T] -> scalar fp64; NaN without a token.

    The sums are taken in fp64, so that neither the order of rows nor the number of processes shows in fp32.
    """
    count = mask.sum(dtype=torch.float64)
    value_sum = values.masked_fill(~mask, 0).sum(dtype=torch.float64)
    value_sum, count = total(torch.stack([value_sum, count]))
    return value_sum / count


def masked_variance(values: torch.Tensor, mask: torch.Tensor, total: Total = identity) -> torch.Tensor:
    """Population variance over the tokens of all processes: values [B, T] -> scalar fp64.

    In two passes: the mean of the squares minus the square of the mean loses everything where the mean is large.
    """
    return masked_mean((values - masked_mean(values, mask, total)).square(), mask, total)


@torch.no_grad()
def whiten(
    values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True, total: Total = identity
) -> torch.Tensor:
    """values [B, T] scaled to variance 1 over the tokens of all processes, and with `shift_mean` to mean 0.

    Advantages are whitened with the shift. Rewards are without it, and keep their mean m: every token is given
    m (1 - 1 / deviation) then, so that with `ppo.whiten_rewards` length is paid for, or fined, by the sign of m. That
    is OpenAI's formula and TRL's, and the recipe's default is off.

    1e-8 is added to the variance, as in Ziegler et al.'s code (openai/lm-human-preferences, `utils/core.py`, `whiten`)
    and in details 24 and 25 of the N+ implementation details (arXiv 2403.17031): equal values become 0 instead of
    their rounding.
    """
    mean = masked_mean(values, mask, total)
    whitened = (values - mean) * torch.rsqrt(masked_variance(values, mask, total) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0)


@torch.no_grad()
def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation: (advantages [B, T], returns [B, T]).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}
        R_t     = A_t + V_t

    lam = 1 is unbiased whatever the values are; a smaller one has less variance, and the bias of the values. The
    returns are what the critic is trained on.

    Args:
        rewards: [B, T], r_t: what the token at t earned.
        values: [B, T], V_t: what the critic expected before it saw the token at t. After a response's last token
            nothing more is expected, also where the response was cut at its longest.
        mask: [B, T].
        gamma: discount of a token; 1 is none.
        lam: lambda.

    Source: Schulman et al., arXiv 1506.02438, equation 16, as a recursion; R as in openai/lm-human-preferences,
    `train_policy.py`, `loss`.
    """
    # Zeros behind the response are its end: V is 0 there, and every delta.
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values

    advantages = torch.zeros_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages, advantages + values


def rewards_to_go(rewards: torch.Tensor, mask: torch.Tensor, *, gamma: float) -> torch.Tensor:
    """sum over k >= 0 of gamma^k r_{t+k}: rewards [B, T] -> [B, T]. No critic.

    With the KL penalty in the rewards and whitened over the batch, these are the advantages of REINFORCE++ (Hu, arXiv
    2501.03262). It is GAE with lam = 1 and a critic that expects nothing.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)
    return advantages


@torch.no_grad()
def rloo(totals: torch.Tensor, group: int) -> torch.Tensor:
    """Each response's reward minus the mean of the others to the same prompt: totals [B] -> [B]. No critic.

    The others say what could be expected, and do not depend on the response: leaving it out of its own baseline keeps
    the gradient unbiased. All tokens of a response share its advantage.

    Args:
        totals: [B], the rewards of each response summed over its tokens, the KL penalty among them. The responses to a
            prompt are consecutive.
        group: responses to each prompt, at least 2.

    Raises:
        ValueError: `group` is below 2 or does not divide B.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; for language models Ahmadian et al.,
    arXiv 2402.14740.
    """
    if group < 2 or len(totals) % group:
        raise ValueError(f"{len(totals)} responses cannot be compared in groups of {group}")
    grouped = totals.view(-1, group)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).view(-1)
