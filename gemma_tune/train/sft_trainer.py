"""TRL's SFTTrainer, with what Gemma and we need changed. Each override says why; `tests/seams` holds each to TRL.

TRL keeps the loop, the data order, the loss and the optimizer. Rows come in tokenised and labelled, and stay so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_model
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import has_length
from trl import SFTConfig, SFTTrainer

from gemma_tune.data.collate import IGNORED, Collator
from gemma_tune.errors import TrainingError, UserError
from gemma_tune.models.lora import keep_fp32
from gemma_tune.train import checkpoint
from gemma_tune.train.callbacks import Clock
from gemma_tune.train.evaluate import HeldOut, held_out_loss
from gemma_tune.train.loss_head import use_frozen_head
from gemma_tune.train.session import RunFolder
from gemma_tune.train.signals import Signals

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"


class SftTrainer(SFTTrainer):
    """Trains `model` on rows that carry their own labels.

    Args:
        model: a PeftModel, or a plain model for a full fine-tune.
        tokenizer: only its special tokens are used.
        collator: rows -> batch.
        train: rows of `input_ids`, `labels` and, where packed, `position_ids`.
        held_out: rows for `evaluate`, not packed; may be empty.
        config: keywords of the plan, as an SFTConfig.
        folder: where checkpoints go; opened.
        keep: checkpoints that are kept.
        identity: written into each checkpoint (`train.identity`).
        signals: asked during an evaluation, which a stop cuts short.
        progress: counters of the checkpoint that the run continues from.
    """

    model: Any
    data_collator: Any
    train_dataset: Any

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        collator: Collator,
        train: Any,
        held_out: Sequence[Mapping[str, Any]],
        config: SFTConfig,
        folder: RunFolder,
        keep: int,
        identity: Mapping[str, Any],
        signals: Signals,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        # A NaN must be seen: the filter logs the average of earlier losses in its place.
        config.logging_nan_inf_filter = False
        super().__init__(
            model=model, args=config, data_collator=collator, train_dataset=train, processing_class=tokenizer
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError(
                "FSDP and DeepSpeed are not supported: each process would save its own shard as if it were the whole",
                where="accelerate launch",
                fix="start with torchrun, or with accelerate launch --multi_gpu: every process holds the whole model",
            )
        # The classes of Gemma 3n and 4 carry accepts_loss_kwargs = False, and the Trainer then withholds the number of
        # trained tokens of the whole accumulated batch: each micro batch would weigh the same, however many it has.
        # TRL's loss divides by that number itself, whatever the model class accepts.
        self.model_accepts_loss_kwargs = True
        # TRL casts the adapters of a quantised base to bf16, which cannot hold small updates of A.
        if isinstance(self.model, PeftModel):
            keep_fp32(self.model)
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        use_frozen_head(base)
        self.remove_callback(PrinterCallback)
        progress = progress or {}
        self.clock = Clock(progress.get("train_seconds", 0.0))
        self._tokens_before = (progress.get("tokens_seen", 0), progress.get("tokens_trained", 0))
        self._tokens = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        self.counters: dict[str, Any] = {}
        self._rows: list[Mapping[str, torch.Tensor]] = []
        self._held_out = held_out
        self._folder = folder
        self._keep = keep
        self._identity = identity
        self._signals = signals
        self.last_evaluation: HeldOut | None = None
        self.evaluated_at = -1

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    # --- counting -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Count the tokens of the coming step, and keep its rows for the report of a non-finite loss."""
        rows, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in rows:
            trained = batch["labels"][:, 1:].ne(IGNORED).sum()
            seen = self.data_collator.tokens(batch) * trained.gt(0)  # a repeated row stands in for none
            self._tokens += torch.stack([seen, trained]).to(self._tokens.device)
        self._rows = rows
        return rows, items

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

    def count(self) -> dict[str, Any]:
        """Bring `counters` up to date. Every process must call this together.

        `tokens_seen`, `tokens_trained` (those of them with loss), `train_seconds`, `tokens_per_second`: of the whole
        run, a resumed one included.
        """
        here = self.accelerator.reduce(self._tokens, "sum") if self.args.world_size > 1 else self._tokens
        seen, trained = (before + int(now) for before, now in zip(self._tokens_before, here.tolist(), strict=True))
        seconds = self.clock.seconds
        self.counters = {
            "tokens_seen": seen,
            "tokens_trained": trained,
            "train_seconds": round(seconds, 3),
            "tokens_per_second": round(seen / seconds, 1) if seconds > 0 else None,
        }
        return self.counters

    # --- the finite guard ---------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: Any) -> Any:
        """Stop before the optimizer takes a non-finite step: the weights stay as they were."""
        norm = super()._clip_grad_norm(model)
        # Under fp16 a GradScaler skips a step with an infinite gradient by itself; there only the loss counts.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if not torch.isfinite(self._tr_loss):
            self._report_non_finite("the loss")
        if not scaled and not math.isfinite(float(norm)):
            self._report_non_finite("the gradient norm")
        return norm

    def _report_non_finite(self, what: str) -> None:
        step = self.state.global_step + 1
        rows = [ids for batch in self._rows for ids in batch["input_ids"].tolist()]
        if self.is_world_process_zero():
            text = json.dumps({"step": step, "what": what, "input_ids": rows})
            checkpoint.write_atomically(self._folder.path / "non_finite.json", text)
        raise TrainingError(
            f"{what} of step {step:,} is not finite; nothing was updated by it",
            where=str(self._folder.path / "non_finite.json"),
            fix="lower optim.learning_rate or change model.precision; look at the rows of that step, in this file",
        )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """`eval_loss`, `eval_perplexity` and `eval_token_accuracy` over the trained tokens of the held-out rows.

        The Trainer's own takes the mean of batch means, in which a token of a short row weighs more.
        """
        with self.clock.paused():
            found = held_out_loss(
                self.model,
                self._held_out if eval_dataset is None else eval_dataset,
                self.data_collator,
                batch_size=self.args.per_device_eval_batch_size,
                rank=self.args.process_index,
                world_size=self.args.world_size,
                total=self._total,
                stop=self._stop_alone,
            )
        self.count()
        metrics: dict[str, float] = {}
        if found is not None:
            self.last_evaluation, self.evaluated_at = found, self.state.global_step
            metrics = {
                f"{metric_key_prefix}_loss": found.loss,
                f"{metric_key_prefix}_perplexity": found.perplexity,
                f"{metric_key_prefix}_token_accuracy": found.token_accuracy,
            }
            # Past SFTTrainer.log: it would mix in, and forget, the training metrics since the last line.
            Trainer.log(self, dict(metrics))
        if self._stop_alone():
            self.control.should_save = self.control.should_training_stop = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _stop_alone(self) -> bool:
        """Of several processes none may leave by itself: the others would wait for it. They agree after the step."""
        return self.args.world_size == 1 and self._signals.requested is not None

    def _total(self, sums: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.count()
        super().log(logs, start_time)
        # The whole history goes into every checkpoint; metrics.jsonl has it already.
        del self.state.log_history[:-1]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All that a bit-equal continuation needs, in one atomic folder; no model card, tokenizer or pickled args."""
        step = self.state.global_step
        self.store_flos()
        with self.clock.paused(), checkpoint.disk_errors(self._folder.path / f"checkpoint-{step}"):
            self._refuse_non_finite_weights()
            progress = self.count()
            staging = self._folder.path / f".staging-{step}"
            if self.args.should_save:
                checkpoint.open_staging(self._folder.path, step)
            self.accelerator.wait_for_everyone()
            self.write_weights(staging)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_scaler(str(staging))
            self._save_rng_state(str(staging))
            if self.args.should_save:
                self.state.save_to_json(str(staging / "trainer_state.json"))
            # Rename on one process, once every process has written its part.
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoint.commit(staging, self._folder.path, step, identity=self._identity, progress=progress)
                checkpoint.rotate(self._folder.path, self._keep)
            self.accelerator.wait_for_everyone()

    def write_weights(self, folder: Path) -> None:
        """The trainable weights: an adapter in PEFT's form, or the whole model under its own parameter names."""
        if not self.args.should_save:
            return
        if isinstance(self.model, PeftModel):
            self.model.save_pretrained(str(folder), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            save_model(self.model, str(folder / MODEL_FILE), metadata={"format": "pt"})
            self.model.config.save_pretrained(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load what `write_weights` wrote, every tensor of it and no other: the Trainer's own only warns."""
        load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _refuse_non_finite_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"{name} is not finite at step {self.state.global_step:,}; it is not saved",
                    where=str(self._folder.path),
                    fix="lower optim.learning_rate; the last checkpoint is intact",
                )


def load_weights(model: Any, folder: Path) -> None:
    """Put the trainable weights of a verified checkpoint into `model`, strictly.

    Raises:
        TrainingError: its tensors are not those of this model.
    """
    if not isinstance(model, PeftModel):
        load_model(model, str(folder / MODEL_FILE), strict=True)
        return
    state = load_file(str(folder / ADAPTER_FILE))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
        raise TrainingError(
            "the adapter in the checkpoint does not fit this model", where=str(folder), fix="start a new run"
        )
    set_peft_model_state_dict(model, state)


Agree = Callable[[bool], bool]


def agreement(trainer: SftTrainer) -> Agree:
    """A function that is True on every process as soon as it is True on one."""

    def agree(flag: bool) -> bool:
        if trainer.args.world_size == 1:
            return flag
        votes = torch.tensor(int(flag), device=trainer.args.device)
        return bool(trainer.accelerator.reduce(votes, "sum") > 0)

    return agree
