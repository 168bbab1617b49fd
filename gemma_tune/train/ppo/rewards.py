"""What each token of a response earned: a share of the distance from the reference, and the score at the end.

B responses, T tokens, padded on the right. mask [B, T] bool: True at a token of the response, its stop token included.
log_probs, reference [B, T]: log p of each token that was drawn, under the policy that drew it and under the reference,
in nats and at the same temperature. Scores and rewards are in units of the reward.
"""

from __future__ import annotations

import math
from typing import Any

import torch

LARGEST_LOG_RATIO = 20.0
"""Where exp(log p - log p') is taken, a token further away counts as this far. e^20 is far outside every clip range and
far inside fp32: one token that a policy finds impossible must not make a loss or a figure infinite."""


def k1(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log p - log p_reference of each token, [B, T], nats. Its mean under the policy is KL(policy || reference).

    This is the estimator that belongs into a reward: the expected policy gradient is then that of the KL. With `k3` in
    the reward it would be, for one token, that of KL(policy || reference) - KL(reference || policy), though k1 and k3
    have the same mean.

    Source: Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html, 2020), k1.
    """
    return log_probs - reference


def k3(log_probs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r with r = p_reference / p, [B, T], nats: never below 0.

    It has the mean of k1, and less variance near the reference: the estimator to look at, and not to be rewarded by.

    Source: Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html, 2020), k3.
    """
    log_ratio = (reference - log_probs).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    # expm1 keeps the digits that exp(x) - 1 loses near 0, where a policy is at first.
    return torch.expm1(log_ratio) - log_ratio


def shape_scores(
    scores: torch.Tensor, stopped: torch.Tensor, *, clip: float | None, missing_stop_penalty: float
) -> torch.Tensor:
    """Scores [B] clipped to +-`clip` (None: not), then `missing_stop_penalty` less where a response did not stop.

    Without a penalty a policy may learn to talk until it is cut. It comes after the clip, so that no score can hide it.

    Args:
        scores: [B], the weighted sum of all sources.
        stopped: [B] bool: the response ends with a stop token.

    Source: the "EOS trick" of the N+ implementation details (arXiv 2403.17031, detail 23), which puts -1 in place of
    the score; taking the penalty off instead, as TRL's PPO did (`missing_eos_penalty`), leaves the better of two cut
    responses the better one.
    """
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return torch.where(stopped, scores, scores - missing_stop_penalty)


@torch.no_grad()
def token_rewards(
    scores: torch.Tensor,
    log_probs: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor,
    *,
    coefficient: float,
) -> torch.Tensor:
    """-coefficient * k1 at each token, and the score on top at the last one: [B, T], 0 outside the mask. No gradient.

    Summed over a response: score - coefficient * (log p - log p_reference), equation 2 of Ziegler et al. (arXiv
    1909.08593), whose mean is E[score] - coefficient * KL(policy || reference).

    Args:
        scores: [B], from `shape_scores`.
        log_probs, reference: [B, T].
        mask: [B, T]. The score stands at the last token inside it, which is the stop token where there is one.
        coefficient: reward for a nat, at least 0 (beta in the papers).
    """
    position = torch.arange(mask.shape[1], device=mask.device)
    is_last = position == mask.sum(dim=1, keepdim=True) - 1
    penalty = coefficient * k1(log_probs, reference).masked_fill(~mask, 0)
    return torch.where(is_last, scores[:, None], 0.0) - penalty


class KlController:
    """The coefficient of the KL penalty: fixed, or moved until a response is `target` nats from the reference.

    With a target, after each step:

        error       = clip(kl / target - 1, -0.2, 0.2)
        coefficient = coefficient * (1 + error * episodes / horizon)

    Args:
        coefficient: what it begins with. It is only ever multiplied: with a target it must not be 0.
        target: nats a response (KL summed over its tokens); None: the coefficient stays.
        horizon: episodes (responses) in which the coefficient moves by a fifth where the KL is far off.

    Source: Ziegler et al., arXiv 1909.08593, section 2.2, as in their code (openai/lm-human-preferences,
    `train_policy.py`, `AdaptiveKLController`).
    """

    LARGEST_ERROR = 0.2

    def __init__(self, coefficient: float, target: float | None, horizon: int) -> None:
        self.coefficient = coefficient
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, episodes: int) -> None:
        """Learn what a step saw.

        Args:
            kl: nats, the mean over the responses of k1 summed over their tokens. A sample's can be below 0.
            episodes: responses of the step, over all processes.

        Raises:
            ValueError: `kl` is no finite number.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL of a step is {kl}")
        if self.target is None:
            return
        error = min(max(kl / self.target - 1, -self.LARGEST_ERROR), self.LARGEST_ERROR)
        # A step longer than the horizon counts as one horizon: otherwise its factor could be below 0.
        self.coefficient *= 1 + error * min(episodes / self.horizon, 1.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.coefficient = state["coefficient"]
