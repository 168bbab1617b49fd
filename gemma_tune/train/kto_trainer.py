"""TRL's KTOTrainer, with what Gemma and we need changed. Answers come in tokenised; the reference is ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from trl import KTOConfig, KTOTrainer

from gemma_tune.data.collate import JudgedCollator, answers_to_others
from gemma_tune.models.roles import policy_adapters, speak_as
from gemma_tune.train.evaluate import eval_mode, shares
from gemma_tune.train.loss_head import use_frozen_head
from gemma_tune.train.reference import drop_copy_of_trl, judged_log_probs, judged_reference
from gemma_tune.train.trainer import RunTrainer, Surroundings, sheltered


@dataclass(frozen=True, slots=True)
class KtoFigures:
    """Held-out judged answers under the policy. Each answer weighs the same.

    The implicit reward of an answer is beta (log p - log p_reference), and all are compared with one KL point: beta
    times `kl`.

    Attributes:
        loss: KTO's, with the recipe's weights (arXiv 2402.01306, equation 7).
        accuracy: share of answers whose reward is above the KL point where they are good, and below it where they are
            bad. One that is exactly there is not right: before the first step all are.
        good_reward, bad_reward: mean implicit rewards; None where there is no such answer.
        kl: the KL estimate in nats, from answers to other prompts: the mean of log p - log p_reference over them, or 0
            where that is below 0.
        rows: how many answers.
    """

    loss: float
    accuracy: float
    good_reward: float | None
    bad_reward: float | None
    kl: float
    rows: int

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        return {key: value for key, value in asdict(self).items() if key != "rows" and value is not None}

    def to_json(self) -> dict[str, Any]:
        """What stands in run.json."""
        return asdict(self)


class KtoTrainer(RunTrainer, KTOTrainer):
    """Trains the adapter of `model` on judged answers.

    Args:
        model: from `attach` or `begin_with`; a frozen adapter `roles.REFERENCE` is the reference, without one the plain
            base is.
        tokenizer: only its special tokens are used.
        collator: answers -> batch, with the KL rows.
        train: rows of `prompt_ids`, `completion_ids`, `label`.
        config: keywords of the plan, as a KTOConfig.
        around: what the run gives it.
        mode: how the model's start adapter is used, `continue` or `stack`.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        collator: JudgedCollator,
        train: Any,
        config: KTOConfig,
        around: Surroundings,
        mode: str = "continue",
    ) -> None:
        with sheltered(model):
            super().__init__(
                model=model, args=config, data_collator=collator, train_dataset=train, processing_class=tokenizer
            )
            drop_copy_of_trl(self.model)
        speak_as(self.model, policy_adapters(self.model, mode))
        self.settle(around)
        use_frozen_head(self.plain_model())
        # From here on TRL reads the reference's log-probabilities from the batch.
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are token ids already, and the collator makes the KL rows of each pass."""
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. The reference is asked first: what it keeps is gone before the policy keeps anything."""
        reference = dict(zip(("ref_logps", "ref_KL_logps"), judged_reference(self.model, inputs), strict=True))
        return super().compute_loss(model, inputs | reference, return_outputs, num_items_in_batch)

    def _compute_kl_logps(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """Without KL rows the policy is given what the reference has, so that the KL point is 0.

        The last pass of an epoch may hold one answer alone. TRL would compare it with itself, and its reward would be
        its own KL point.
        """
        if "KL_input_ids" not in batch:
            return batch["ref_KL_logps"]
        return super()._compute_kl_logps(model, batch)

    def batch_tokens(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Non-padding tokens of the sequences, and those of the answers. KL rows are not trained and do not count."""
        return batch["attention_mask"].sum(), batch["completion_mask"].sum()

    # --- held-out answers ---------------------------------------------------------------------------------------------

    def score_held_out(self, rows: Sequence[Mapping[str, Any]]) -> KtoFigures | None:
        """`KtoFigures` over the rows. Their KL rows are the same whatever the size of a pass."""
        rows = list(rows)
        if rows and (found := answers_to_others(rows)) is not None:
            rows = [{**row, "KL_completion_ids": other} for row, other in zip(rows, found, strict=True)]
        lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
        size, rank, world = self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size
        ratios, labels, distant = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)], [torch.zeros(0)]
        with eval_mode(self.model):
            for chosen, counts in shares(lengths, size, rank, world):
                if self._stop_alone():
                    return None
                batch = self._prepare_inputs(self.data_collator([rows[index] for index in chosen]))
                policy, reference = judged_log_probs(self.model, batch), judged_reference(self.model, batch)
                if counts:
                    ratios.append((policy[0] - reference[0]).cpu())
                    distant.append((policy[1] - reference[1]).cpu())
                    labels.append(batch["label"].cpu())
        others = torch.cat(distant).double()
        total, count = self._total(torch.tensor([float(others.sum()), len(others)], dtype=torch.float64)).tolist()
        kl = max(total / count, 0.0) if count else 0.0
        weights = (self.desirable_weight, self.undesirable_weight)
        sums = answer_sums(torch.cat(ratios), torch.cat(labels), kl, beta=self.beta, weights=weights)
        return figures_of(self._total(sums).tolist(), kl)


def answer_sums(
    ratios: torch.Tensor, good: torch.Tensor, kl: float, *, beta: float, weights: tuple[float, float]
) -> torch.Tensor:
    """What `figures_of` needs: sums of loss, right answers, rewards of good and of bad ones, and counts of both; fp64.

    Args:
        ratios: log p - log p_reference of each answer, [N].
        good: its label, bool [N].
        kl: the KL estimate, nats.
        beta: the loss's.
        weights: of good and of bad answers.
    """
    rewards = beta * ratios.double()
    # Above the KL point for a good answer, below it for a bad one.
    won = torch.where(good, rewards - beta * kl, beta * kl - rewards)
    desirable, undesirable = weights
    weight = desirable * good.double() + undesirable * (~good).double()
    loss = weight * (1 - won.sigmoid())
    sums = (loss.sum(), (won > 0).sum(), rewards[good].sum(), rewards[~good].sum(), good.sum(), (~good).sum())
    return torch.stack([value.double() for value in sums])


def figures_of(sums: Sequence[float], kl: float) -> KtoFigures | None:
    """Figures from the sums of all answers; None without an answer."""
    loss, right, good_rewards, bad_rewards, good, bad = sums
    rows = good + bad
    if not rows:
        return None
    return KtoFigures(
        loss=loss / rows,
        accuracy=right / rows,
        good_reward=good_rewards / good if good else None,
        bad_reward=bad_rewards / bad if bad else None,
        kl=kl,
        rows=int(rows),
    )
