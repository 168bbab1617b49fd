"""What a policy is like on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gemma_tune.train.ppo.rewards import k1, k3
from gemma_tune.train.ppo.scores import Scores
from gemma_tune.train.ppo.types import Experience


@dataclass(frozen=True, slots=True)
class PpoFigures:
    """One sampled response to each held-out prompt.

    Attributes:
        score, score_std: mean and standard deviation of the recipe's reward, before clipping and penalties.
        kl, kl_k3: nats a response from the reference, by both estimators (k1 may be negative in a sample).
        entropy: nats a token.
        response_length: tokens.
        stopped: share of responses that ended by a stop token.
        prompts: how many.
        sources: source -> mean and standard deviation of what it says by itself, where there are several. One of weight
            0 has no part in `score`: a second reward model that watches whether the first one is outwitted.
    """

    score: float
    score_std: float
    kl: float
    kl_k3: float
    entropy: float
    response_length: float
    stopped: float
    prompts: int
    sources: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def sums(scores: Scores, seen: Experience, stopped: torch.Tensor) -> torch.Tensor:
        """fp64 on the CPU, to be added up over processes: [8], and 2 for each source."""
        mask, total = seen.mask, scores.total.double()
        found = [
            torch.tensor(float(len(total))),
            total.sum(),
            total.square().sum(),
            (k1(seen.log_probs, seen.reference) * mask).double().sum(),
            (k3(seen.log_probs, seen.reference) * mask).double().sum(),
            seen.entropy.double().sum(),
            mask.double().sum(),
            stopped.double().sum(),
        ]
        for part in scores.parts.values():
            found += [part.double().sum(), part.double().square().sum()]
        return torch.stack([value.double().cpu() for value in found])

    @classmethod
    def of(cls, sums: torch.Tensor, names: Sequence[str]) -> PpoFigures:
        """From `sums`, of one response at least. `names`: the sources."""
        count, score, squares, kl, kl_k3, entropy, tokens, stopped, *parts = sums.tolist()
        mean, deviation = mean_and_std(score, squares, count)
        each = {
            name: dict(zip(("mean", "std"), mean_and_std(total, square, count), strict=True))
            for name, total, square in zip(names, parts[::2], parts[1::2], strict=True)
        }
        return cls(
            score=mean,
            score_std=deviation,
            kl=kl / count,
            kl_k3=kl_k3 / count,
            entropy=entropy / tokens,
            response_length=tokens / count,
            stopped=stopped / count,
            prompts=int(count),
            sources=each if len(each) > 1 else {},
        )

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        plain = {key: value for key, value in asdict(self).items() if key not in ("prompts", "sources")}
        return plain | {f"scores/{name}": found["mean"] for name, found in self.sources.items()}

    def to_json(self) -> dict[str, Any]:
        """What stands in run.json."""
        return {key: value for key, value in asdict(self).items() if key != "sources" or value}


def mean_and_std(total: float, squares: float, count: float) -> tuple[float, float]:
    """(mean, standard deviation) from sums."""
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean**2, 0.0))
