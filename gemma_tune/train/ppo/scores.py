"""What a response is worth: reward models on the shared base, functions of the user, or a weighted sum of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gemma_tune.gemma.families import Family
from gemma_tune.models.actors import Actors
from gemma_tune.models.roles import speak_as
from gemma_tune.plan.starts import scale_of
from gemma_tune.train.evaluate import eval_mode, pad_left
from gemma_tune.train.ppo.functions import RewardFunction, load_function
from gemma_tune.train.ppo.rollout import body
from gemma_tune.train.ppo.types import Rollout


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a rollout: `total` [B] fp32 on the CPU, and `parts`, what each source gave, before its weight."""

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor]


class Scorer:
    """The recipe's `ppo.reward`.

    Args:
        actors: with the reward models among `sources`.
        sources: `{source, weight, kind}` each, kind `model` or `function`.
        family, tokenizer: to end a sequence, and to read a response.
        normalize: whether a reward model's reward is scaled to mean 0 and deviation 1 by its reward_stats.json.
        micro: responses that a reward model reads together.
    """

    def __init__(
        self,
        actors: Actors,
        sources: Sequence[Mapping[str, Any]],
        family: Family,
        tokenizer: Any,
        *,
        normalize: bool,
        micro: int,
    ) -> None:
        self._actors = actors
        self._family = family
        self._tokenizer = tokenizer
        self._micro = micro
        self._weights = {source["source"]: float(source["weight"]) for source in sources}
        self._functions: dict[str, RewardFunction] = {
            source["source"]: load_function(source["source"]) for source in sources if source["kind"] == "function"
        }
        self._scales = {
            name: scale_of(role.stats) if normalize else (0.0, 1.0) for name, role in actors.rewards.items()
        }

    @property
    def sources(self) -> list[str]:
        """Names of the sources, in the order of `Scores.parts`."""
        return list(self._weights)

    def __call__(self, rollout: Rollout) -> Scores:
        """
        Raises:
            TrainingError: a function failed, or gave no finite number for each response.
        """
        parts: dict[str, torch.Tensor] = {}
        texts = [
            self._tokenizer.decode(body(response, self._family), skip_special_tokens=True)
            for response in rollout.responses
        ]
        for source in self._weights:
            if source in self._functions:
                found = self._functions[source](list(rollout.conversations), texts)
                parts[source] = torch.tensor(found, dtype=torch.float32)
            else:
                mean, std = self._scales[source]
                parts[source] = (self._rate(source, rollout) - mean) / std
        total = sum(weight * parts[source] for source, weight in self._weights.items())
        assert isinstance(total, torch.Tensor)
        return Scores(total, parts)

    def _rate(self, source: str, rollout: Rollout) -> torch.Tensor:
        """A reward model's rewards [B]: of each response as if it ended there; it was trained to read nothing else.

        Whatever ended the response, nothing included, the reward is read at the turn end. That a response did not end
        costs `missing_stop_penalty`, which nobody has to learn.
        """
        rewards = torch.zeros(len(rollout))
        rows = [
            [*prompt, *body(response, self._family), self._family.turn_end_id]
            for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
        with eval_mode(self._actors.model):
            for start in range(0, len(order), self._micro):
                chosen = order[start : start + self._micro]
                ids, mask = pad_left([rows[row] for row in chosen], self._family.pad_id)
                device = self._actors.device
                rewards[chosen] = self._actors.rate(source, ids.to(device), mask.to(device)).cpu()
        speak_as(self._actors.model, self._actors.policy)
        return rewards
