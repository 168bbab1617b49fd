"""TRL's RewardTrainer, with what Gemma and we need changed. Pairs come in tokenised; the model is `models.reward`'s."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import RewardConfig
from trl import RewardTrainer as TrlRewardTrainer

from gemma_tune.data.collate import PairCollator
from gemma_tune.models.reward import RewardModel
from gemma_tune.train.evaluate import eval_mode, shares
from gemma_tune.train.trainer import RunTrainer, Surroundings, sheltered


@dataclass(frozen=True, slots=True)
class RewardFigures:
    """Held-out pairs under a reward model. Each pair weighs the same.

    Attributes:
        loss: mean of -log sigmoid(r_chosen - r_rejected - margin of the row, 0 without one).
        accuracy: share of pairs whose chosen answer has the larger reward.
        margin: mean of r_chosen - r_rejected.
        mean, std: of the rewards of all answers, chosen and rejected.
        chosen_mean, rejected_mean: of either side.
        length_correlation: Pearson's, of reward and tokens of the answer; None where one of them does not vary. It
            shows a reward model that mostly counts tokens.
        pairs: how many.
    """

    loss: float
    accuracy: float
    margin: float
    mean: float
    std: float
    chosen_mean: float
    rejected_mean: float
    length_correlation: float | None
    pairs: int

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        return {key: value for key, value in asdict(self).items() if key != "pairs" and value is not None}

    def to_json(self) -> dict[str, Any]:
        """What stands in run.json."""
        return asdict(self)


class RewardTrainer(RunTrainer, TrlRewardTrainer):
    """Trains adapter and head of `model` on pairs, by the loss of Bradley and Terry.

    Args:
        model: adapter and head.
        tokenizer: only its special tokens are used.
        collator: pairs -> batch.
        train: rows of `prompt_ids`, `chosen_ids`, `rejected_ids` and, where the loss has one, `margin`.
        config: keywords of the plan, as a RewardConfig.
        around: what the run gives it.
    """

    passes = ("rewards",)

    def __init__(
        self,
        *,
        model: RewardModel,
        tokenizer: Any,
        collator: PairCollator,
        train: Any,
        config: RewardConfig,
        around: Surroundings,
    ) -> None:
        model.config.num_labels = 1  # TRL looks for it before it takes a model
        with sheltered(model):
            super().__init__(
                model=model,  # type: ignore[arg-type]  # all that it asks of a model, ours has
                args=config,
                data_collator=collator,
                train_dataset=train,
                processing_class=tokenizer,
            )
        self.settle(around)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are token ids already. Those that are too long were dropped, and counted, before."""
        return dataset

    def batch_tokens(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Non-padding tokens of both sequences; the tokens with loss are the last ones, one a sequence."""
        seen = batch["attention_mask"].sum()
        return seen, torch.full_like(seen, len(batch["attention_mask"]))

    def score_held_out(self, rows: Sequence[Mapping[str, Any]]) -> RewardFigures | None:
        """`RewardFigures` over the rows."""
        sums = torch.zeros(len(_SUMS), dtype=torch.float64)
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
        size, rank, world = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        # Only the model's own forward pass is wrapped for autocast (fp16), and `rewards` is not it.
        with eval_mode(self.model), self.accelerator.autocast():
            for chosen, counts in shares(lengths, size, rank, world):
                if self._stop_alone():
                    return None
                batch = self._prepare_inputs(self.data_collator([rows[index] for index in chosen]))
                rewards = self.model.rewards(batch["input_ids"], batch["attention_mask"])
                if counts:
                    sums += pair_sums(rewards, batch["completion_mask"].sum(1), batch.get("margin")).cpu()
        return figures_of(self._total(sums).tolist())


_SUMS = ("pairs", "loss", "right", "chosen", "rejected", "squares", "lengths", "length squares", "reward x length")


def pair_sums(rewards: torch.Tensor, lengths: torch.Tensor, margin: torch.Tensor | None) -> torch.Tensor:
    """What `figures_of` needs of one batch: rewards [2B] (chosen first), tokens of the answers [2B], margins [B]."""
    rewards, lengths = rewards.double(), lengths.double()
    chosen, rejected = rewards.chunk(2)
    gap = chosen - rejected
    loss = -logsigmoid(gap if margin is None else gap - margin)
    sums = (
        torch.tensor(float(len(gap))),
        loss.sum(),
        (gap > 0).sum(),
        chosen.sum(),
        rejected.sum(),
        (rewards**2).sum(),
        lengths.sum(),
        (lengths**2).sum(),
        (rewards * lengths).sum(),
    )
    return torch.stack([value.double().cpu() for value in sums])


def figures_of(sums: Sequence[float]) -> RewardFigures | None:
    """Figures from the sums of all batches; None without a pair."""
    pairs, loss, right, chosen, rejected, squares, lengths, length_squares, product = sums
    if not pairs:
        return None
    answers = 2 * pairs
    mean, length = (chosen + rejected) / answers, lengths / answers
    variance = max(squares / answers - mean**2, 0.0)
    length_variance = max(length_squares / answers - length**2, 0.0)
    spread = math.sqrt(variance * length_variance)
    return RewardFigures(
        loss=loss / pairs,
        accuracy=right / pairs,
        margin=(chosen - rejected) / pairs,
        mean=mean,
        std=math.sqrt(variance),
        chosen_mean=chosen / pairs,
        rejected_mean=rejected / pairs,
        length_correlation=(product / answers - mean * length) / spread if spread > 1e-12 else None,
        pairs=int(pairs),
    )
