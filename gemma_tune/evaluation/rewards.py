"""A reward model on held-out pairs: whether it is right, what it likes, and whether it counts tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_tune.data.collate import PairCollator
from gemma_tune.evaluation.bootstrap import pearson, spearman
from gemma_tune.evaluation.target import autocast_of
from gemma_tune.models.reward import RewardModel
from gemma_tune.plan.types import Plan
from gemma_tune.train.evaluate import eval_mode, shares
from gemma_tune.train.reward_trainer import RewardFigures, figures_of, pair_sums

BINS = 10
"""Of the calibration error."""


@dataclass(frozen=True)
class PairScores:
    """The rewards of held-out pairs.

    Attributes:
        whole: the stage's own figures.
        chosen, rejected: rewards, [pairs]. `chosen_tokens`, `rejected_tokens`: lengths of the answers.
    """

    whole: RewardFigures
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Which pairs are rated right; equal rewards are not."""
        return self.chosen > self.rejected

    def rows(self) -> list[dict[str, Any]]:
        """Lines of evaluation.rows.jsonl."""
        columns = (self.chosen, self.rejected, self.chosen_tokens, self.rejected_tokens)
        names = ("chosen", "rejected", "chosen_tokens", "rejected_tokens")
        values = zip(*(column.tolist() for column in columns), strict=True)
        return [{"part": "reward", "row": row, **dict(zip(names, one, strict=True))} for row, one in enumerate(values)]


def score_pairs(
    model: RewardModel, rows: Sequence[Mapping[str, Any]], *, batch_size: int, pad_id: int, plan: Plan | None
) -> PairScores | None:
    """Rewards of `rows` in the passes in which `train.reward_trainer` takes them; None without a pair."""
    collate, device = PairCollator(pad_id), next(model.parameters()).device
    parts = np.zeros((len(rows), 4))
    sums: Any = 0.0
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
    with eval_mode(model), autocast_of(plan):
        for numbers, _ in shares(lengths, batch_size):
            batch = {key: value.to(device) for key, value in collate([rows[index] for index in numbers]).items()}
            rewards = model.rewards(batch["input_ids"], batch["attention_mask"])
            tokens = batch["completion_mask"].sum(1)
            sums = sums + pair_sums(rewards, tokens, batch.get("margin")).cpu()
            columns = (*rewards.double().chunk(2), *tokens.double().chunk(2))
            parts[numbers] = torch.stack([column.cpu() for column in columns], dim=1).numpy()
    whole = figures_of(sums.tolist()) if len(rows) else None
    if whole is None:
        return None
    chosen, rejected, chosen_tokens, rejected_tokens = parts.T
    return PairScores(whole, chosen, rejected, chosen_tokens.astype(int), rejected_tokens.astype(int))


def describe(scores: PairScores) -> dict[str, Any]:
    """`reward` of evaluation.json.

    `length_correlation` is of reward and tokens over all answers, Pearson's and Spearman's; `difference_correlation` is
    of the two differences within a pair, which no prompt can make. `by_length` is the accuracy where the chosen answer
    is the longer one, and where it is the shorter one: a reward model that counts tokens is good at the former alone.
    `calibration_error` compares sigmoid of the difference, which is what the loss takes for the probability that the
    chosen answer is the better one, with how often that is so (10 bins, weighted by their pairs).
    """
    gap = scores.chosen - scores.rejected
    longer = scores.chosen_tokens - scores.rejected_tokens
    rewards = np.concatenate([scores.chosen, scores.rejected])
    tokens = np.concatenate([scores.chosen_tokens, scores.rejected_tokens])
    return {
        "pairs": scores.whole.pairs,
        "accuracy": scores.whole.accuracy,
        "margin": scores.whole.margin,
        "length_correlation": pearson(rewards, tokens),
        "length_rank_correlation": spearman(rewards, tokens),
        "difference_correlation": pearson(gap, longer),
        "difference_rank_correlation": spearman(gap, longer),
        "by_length": {
            name: {"pairs": int(chosen.sum()), "accuracy": float(scores.right[chosen].mean()) if chosen.any() else None}
            for name, chosen in {
                "chosen_longer": longer > 0,
                "chosen_shorter": longer < 0,
                "equal": longer == 0,
            }.items()
        },
        "calibration_error": calibration_error(gap),
    }


def calibration_error(gap: np.ndarray) -> float:
    """Expected calibration error (Guo et al., arXiv 1706.04599) of sigmoid(|gap|) as the probability of being right.

    Args:
        gap: reward of the chosen answer less that of the rejected one, [pairs].
    """
    sure, right = 1 / (1 + np.exp(-np.abs(gap))), gap > 0
    bins = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    parts = (
        (bins == number).mean() * abs(float(sure[bins == number].mean()) - float(right[bins == number].mean()))
        for number in np.unique(bins)
    )
    return float(sum(parts))


def render(found: Mapping[str, Any]) -> list[str]:
    """`reward` of evaluation.json in a few lines."""

    def sign(value: float | None) -> str:
        return f"{value:+.2f}" if value is not None else "none (no spread)"

    lines = [
        f"pairs rated right: {found['accuracy']:.1%} of {found['pairs']:,}, margin {found['margin']:.3f}, "
        f"calibration error {found['calibration_error']:.3f}",
        f"correlation of reward and length: {sign(found['length_correlation'])} "
        f"(ranks {sign(found['length_rank_correlation'])}); of the differences in a pair: "
        f"{sign(found['difference_correlation'])} (ranks {sign(found['difference_rank_correlation'])})",
    ]
    names = {"chosen_longer": "the longer", "chosen_shorter": "the shorter", "equal": "as long"}
    by_length = [
        f"{part['accuracy']:.1%} of {part['pairs']:,} where the chosen answer is {names[name]}"
        for name, part in found["by_length"].items()
        if part["pairs"]
    ]
    return [*lines, f"rated right: {'; '.join(by_length)}"] if by_length else lines
