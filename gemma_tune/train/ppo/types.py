"""What a step of PPO hands on from part to part.

B responses, T tokens of the longest of them, N response tokens in a pass, L tokens of its longest prompt with response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Rollout:
    """Responses of the policy.

    Attributes:
        prompts: B lists of token ids, each ending with the generation prompt.
        responses: B lists of token ids, at least one each: the stop token is the last one where there is one.
        stopped: [B] bool: whether the response ended by a stop token.
        conversations: B prompts as lists of `{"role", "content"}`, for reward functions.
    """

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    stopped: torch.Tensor
    conversations: Sequence[list[dict[str, str]]] = ()

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def mask(self) -> torch.Tensor:
        """[B, T] bool: where a response has a token. The responses stand at the left edge."""
        lengths = torch.tensor([len(response) for response in self.responses])
        return torch.arange(int(lengths.max())) < lengths[:, None]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with its response."""
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class Pass:
    """Some responses with their prompts, as the trunk reads them; padded on the right.

    Attributes:
        rows: [b] int64: which responses of the rollout.
        input_ids, attention_mask: [b, L] int64.
        places: [b, L] bool: the positions whose hidden state predicts a response token, N in all.
        labels: [N] int64: these tokens, row by row.
    """

    rows: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    places: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class Experience:
    """What is known of a rollout before it is learnt from; [B, T] fp32 each, and zero outside of `mask`.

    Attributes:
        mask: [B, T] bool.
        log_probs: of the policy that drew the responses, at the sampling temperature.
        entropy: of the same distributions, in nats.
        reference: log-probabilities of the reference, at the same temperature.
        values: the critic's before the update; zeros without a critic.
        rewards: a token: the KL penalty, and the score at the last one.
        advantages: whitened.
        returns: what the critic is trained towards; zeros without a critic.
    """

    mask: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def of(self, rows: torch.Tensor) -> Experience:
        """The rows of a pass."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def to(self, **changes: Any) -> Experience:
        """A copy with other contents."""
        return replace(self, **changes)
