"""TRL's SFTTrainer, with what Gemma and we need changed. Rows come in tokenised and labelled, and stay so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.trainer_utils import has_length
from trl import SFTConfig, SFTTrainer

from gemma_tune.data.collate import IGNORED, Collator
from gemma_tune.train.evaluate import HeldOut, held_out_loss
from gemma_tune.train.loss_head import use_frozen_head
from gemma_tune.train.trainer import RunTrainer, Surroundings, sheltered


class SftTrainer(RunTrainer, SFTTrainer):
    """Trains `model` on rows that carry their own labels.

    Args:
        model: a PeftModel, or a plain model for a full fine-tune.
        tokenizer: only its special tokens are used.
        collator: rows -> batch.
        train: rows of `input_ids`, `labels` and, where packed, `position_ids`.
        config: keywords of the plan, as an SFTConfig.
        around: what the run gives it; its held-out rows are not packed.
    """

    def __init__(
        self, *, model: Any, tokenizer: Any, collator: Collator, train: Any, config: SFTConfig, around: Surroundings
    ) -> None:
        with sheltered(model):
            super().__init__(
                model=model, args=config, data_collator=collator, train_dataset=train, processing_class=tokenizer
            )
        self.settle(around)
        # The classes of Gemma 3n and 4 carry accepts_loss_kwargs = False, and the Trainer then withholds the number of
        # trained tokens of the whole accumulated batch: each micro batch would weigh the same, however many it has.
        # TRL's loss divides by that number itself, whatever the model class accepts.
        self.model_accepts_loss_kwargs = True
        use_frozen_head(self.plain_model())

    def batch_tokens(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Non-padding tokens, and those with a label."""
        trained = batch["labels"][:, 1:].ne(IGNORED).sum()
        return self.data_collator.tokens(batch) * trained.gt(0), trained  # a repeated row stands in for none

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Leave out the rows with which accelerate fills up the last batches of a pass.

        Of several processes each gets as many batches; what is missing at the end of a pass is repeated from its
        beginning (`BatchSamplerShard`), and would count again in its last step. Packed rows that were laid end to end
        (FlashAttention) are left out only where a batch is nothing but repetition.
        """
        end = batch_samples and self.accelerator.gradient_state.end_of_dataloader and has_length(self.train_dataset)
        if self.args.world_size > 1 and end:
            micro, last = self.args.per_device_train_batch_size, batch_samples[-1]
            rest = len(self.train_dataset) % (micro * self.args.world_size)
            own = min(max(rest - micro * self.args.process_index, 0), micro) if rest else micro
            # One row stays where there is none of its own: every process takes part in the backward pass.
            batch_samples[-1] = {key: value[: max(own, 1)] for key, value in last.items()}
            if not own:
                batch_samples[-1]["labels"] = torch.full_like(batch_samples[-1]["labels"], IGNORED)
        return super()._get_num_items_in_batch(batch_samples, device)

    def score_held_out(self, rows: Sequence[Mapping[str, Any]]) -> HeldOut | None:
        """Loss, perplexity and token accuracy over the trained tokens."""
        return held_out_loss(
            self.model,
            rows,
            self.data_collator,
            batch_size=self.args.per_device_eval_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            total=self._total,
            stop=self._stop_alone,
        )
