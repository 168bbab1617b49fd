"""What every trainer of ours changes about the Trainer below it. Each override says why.

A stage's trainer is TRL's, with this class before it: `class DpoTrainer(RunTrainer, DPOTrainer)`. TRL keeps the loop,
the data order, the loss and the optimizer.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PrinterCallback, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from gemma_tune.errors import TrainingError
from gemma_tune.train import checkpoint, sharding
from gemma_tune.train.callbacks import Clock, counters_of
from gemma_tune.train.evaluate import Answer, Prompt
from gemma_tune.train.loss_scaling import LossScaler
from gemma_tune.train.session import RunFolder
from gemma_tune.train.sharded_checkpoint import has_parts, read_optimizer, write_parts
from gemma_tune.train.signals import Signals
from gemma_tune.train.weights import (
    ADAPTER_FILE,
    check_written,
    load_weights,
    own_weights,
    write_config,
    write_weights,
)


class Figures(Protocol):
    """Figures of the held-out rows: what is logged, and what stands in run.json."""

    def metrics(self) -> dict[str, float]: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run gives its trainer beside model, rows and configuration.

    Attributes:
        folder: where checkpoints go; opened.
        keep: checkpoints that are kept.
        identity: written into each checkpoint (`train.identity`).
        signals: asked during an evaluation, which a stop cuts short.
        held_out: rows for `evaluate`; may be empty.
        progress: counters of the checkpoint that the run continues from.
        distributed: how processes share the model (`plan.values("session")["distributed"]`).
        loss_scaling: whether gradients are in fp16, so that the loss is scaled (`train.loss_scaling`).
    """

    folder: RunFolder
    keep: int
    identity: Mapping[str, Any]
    signals: Signals
    held_out: Sequence[Mapping[str, Any]] = ()
    progress: Mapping[str, Any] | None = None
    distributed: Mapping[str, Any] = field(default_factory=lambda: {"strategy": "single"})
    loss_scaling: bool = False


@contextmanager
def sheltered(model: Any) -> Iterator[None]:
    """Let TRL's `__init__` see no trained parameter.

    TRL 1.16 casts those of a quantised model to bf16 (sft_trainer.py, dpo_trainer.py; it had decided against it in
    trl#1644). Updates of a weight below 1/256 of its size would be rounded away from then on, so that at small learning
    rates most of A never moves; and an adapter that the training begins with would lose its lower bits at once.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def check_engine(trainer: Trainer, distributed: Mapping[str, Any]) -> None:
    """The processes share the model as the plan says.

    Raises:
        TrainingError: accelerate fell back to something else, or is told more by its environment.
    """
    wanted = distributed["strategy"] in sharding.SHARDED
    if trainer.is_deepspeed_enabled or wanted != trainer.is_fsdp_enabled:
        found = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else "no FSDP"
        raise TrainingError(
            f"the plan says {distributed['strategy']}, but accelerate made it {found}",
            where="distributed.strategy",
            fix="unset ACCELERATE_* and FSDP_* in the environment, or start with a file of accelerate_configs/",
        )


class RunTrainer(Trainer):
    """Counting, evaluation, the finite guard and checkpoints, the same for every stage."""

    model: Any
    data_collator: Any
    train_dataset: Any
    lr_scheduler: Any
    passes: tuple[str, ...] = ()
    """Methods of the model, beside `forward` and `generate`, that run it: a sharded one gathers its parts for them."""

    def settle(self, around: Surroundings) -> None:
        """The rest of `__init__`, once TRL's is done.

        Raises:
            TrainingError: the processes share the model in another way than the plan says.
        """
        # A NaN must be seen: the filter logs the average of earlier losses in its place.
        self.args.logging_nan_inf_filter = False
        check_engine(self, around.distributed)
        self._distributed = around.distributed
        if self.is_fsdp_enabled:
            sharding.add_in_fp32(self.accelerator.state.fsdp_plugin)
        # Here, before the optimizer is prepared: it takes its steps through the scaler.
        self.scaler = LossScaler(self.args.device.type) if around.loss_scaling else None
        self.accelerator.scaler = self.scaler
        self.remove_callback(PrinterCallback)
        progress = around.progress or {}
        self.clock = Clock(progress.get("train_seconds", 0.0))
        self._tokens_before = (progress.get("tokens_seen", 0), progress.get("tokens_trained", 0))
        self._tokens = torch.zeros(2, dtype=torch.int64, device=self.args.device)
        self.counters: dict[str, Any] = {}
        self._rows: list[Mapping[str, torch.Tensor]] = []
        self._passes = 0  # of the step, that are done
        self._uneven = self._idle = False
        self._held_out = around.held_out
        self._folder = around.folder
        self._keep = around.keep
        self._identity = around.identity
        self._signals = around.signals
        self.last_evaluation: Figures | None = None
        self.evaluated_at = -1

    def plain_model(self) -> Any:
        """The base, without its adapter; the model itself in a full fine-tune."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def load_trained(self, folder: Path) -> None:
        """Take the weights of a checkpoint, where every step is done and only what comes after the last one is not."""
        load_weights(self.model, folder)
        if self.is_fsdp_enabled:  # accelerate shards no model without its optimizer
            self._prepare_for_training(self.state.max_steps or 1, None, None)
        else:
            self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast, as in the training

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Look at what accelerate made of the model before anything runs through it."""
        found = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            layers = self.plain_model().config.get_text_config().num_hidden_layers
            sharding.check_sharded(self.model, layers, self._distributed["shards"])
            for method in self.passes:
                register_fsdp_forward_method(self.model, method)
        return found

    # --- what a stage fills in ----------------------------------------------------------------------------------------

    def batch_tokens(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens seen, tokens with loss) of one batch, int64 scalars."""
        raise NotImplementedError

    def rate_answers(
        self, prompts: Sequence[Prompt], asked: Sequence[Sequence[int]], found: list[Answer]
    ) -> list[Answer]:
        """The answers with their scores, where the stage has any. `asked`: the token ids of the prompts."""
        return found

    def score_held_out(self, rows: Sequence[Mapping[str, Any]]) -> Figures | None:
        """Figures of the held-out rows; None where there are none, or a stop is asked for."""
        raise NotImplementedError

    # --- counting -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Count the tokens of the coming step, and keep its rows for the report of a non-finite loss."""
        rows, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._uneven, self._idle = self._leave_out_repetitions(rows)
        for batch in rows[: len(rows) - self._idle]:
            self._tokens += torch.stack(self.batch_tokens(batch)).to(self._tokens.device)
        self._rows, self._passes = rows, 0
        return rows, items

    def _leave_out_repetitions(self, rows: list) -> tuple[bool, bool]:
        """Cut the rows with which accelerate fills up the last passes of the data, where the collator knows how.

        Of several processes each gets as many passes; what is missing is repeated from the beginning
        (`BatchSamplerShard`), and would count again.

        Returns:
            Whether processes have different numbers of rows in this step, and whether the last pass of this one is
            nothing but repetition: a row of it stays, since all take part in the backward pass, and weighs nothing.
        """
        end = rows and self.accelerator.gradient_state.end_of_dataloader
        if self.args.world_size == 1 or not end or not hasattr(self.data_collator, "first"):
            return False, False
        micro = self.args.per_device_train_batch_size
        rest = len(self.train_dataset) % (micro * self.args.world_size)
        if not rest:
            return False, False
        own = min(max(rest - micro * self.args.process_index, 0), micro)
        rows[-1] = self.data_collator.first(rows[-1], max(own, 1))
        return True, own == 0

    def count(self) -> dict[str, Any]:
        """Bring `counters` up to date. Every process must call this together.

        `tokens_seen`, `tokens_trained` (those of them with loss), `train_seconds`, `tokens_per_second`: of the whole
        run, a resumed one included.
        """
        here = self.accelerator.reduce(self._tokens, "sum") if self.args.world_size > 1 else self._tokens
        self.counters = counters_of(here.tolist(), self._tokens_before, self.clock.seconds)
        return self.counters

    # --- the loss of a step -------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; where it is the mean over the rows of a pass, each row of the step weighs the same.

        The Trainer divides such a loss by the number of passes (transformers 5.23, `training_step`). At the end of the
        data the last pass of a step may have fewer rows, which would weigh more then.
        """
        with self._gathering_any_number():
            loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training and self.loss_is_scaled_for_ga is False and not return_outputs:
            loss = loss * self.weight_in_step(_sequences, together=self._uneven)
            self._passes += 1
        return loss

    @contextmanager
    def _gathering_any_number(self) -> Iterator[None]:
        """Let TRL gather its metrics where processes have different numbers of rows.

        TRL 1.16 (reward_trainer.py, dpo_trainer.py) gathers one value a row by a collective that wants equal shapes:
        gloo aborts on others, and NCCL reads past the end.
        """
        if not self._uneven:
            yield
            return

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            own = tensor[:0] if self._idle and tensor.ndim else tensor  # a repetition is no row
            parts: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(parts, own.detach().cpu())
            return torch.cat([part if part.ndim else part[None] for part in parts]).to(tensor.device)

        self.accelerator.gather = gather
        try:
            yield
        finally:
            del self.accelerator.gather

    def weight_in_step(self, size: Callable[[Mapping[str, Any]], float], *, together: bool) -> float:
        """What the mean over the present pass weighs in the mean over all passes of the step: 1 where all are alike.

        Args:
            size: what of a batch counts.
            together: whether the processes may differ. All must say the same.
        """
        sizes = [float(size(batch)) for batch in self._rows]
        if self._idle:
            sizes[-1] = 0.0
        total = sum(sizes)
        if together and self.args.world_size > 1:
            total = float(self.accelerator.reduce(torch.tensor(total, device=self.args.device), "mean"))
        return sizes[self._passes] * len(sizes) / total

    # --- the finite guard ---------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: Any) -> Any:
        """Stop before the optimizer takes a non-finite step: the weights stay as they were."""
        if self.scaler is not None and not self.accelerator.native_amp:
            # accelerate (1.15, `unscale_gradients`) does so under autocast only.
            wrapped: Any = self.optimizer
            self.scaler.unscale_(wrapped.optimizer)
        norm = super()._clip_grad_norm(model)
        # The scaler skips a step with an infinite gradient by itself; there only the loss counts.
        found = bool(torch.isfinite(self._tr_loss)), self.scaler is not None or math.isfinite(float(norm))
        if not agreement(self)(not all(found)):
            return norm
        rows = [ids for batch in self._rows for ids in batch["input_ids"].tolist()]
        self._report_non_finite({"process": self.args.process_index, "finite": found, "input_ids": rows})
        return norm

    def _report_non_finite(self, own: Mapping[str, Any]) -> None:
        """All processes come here together: whose loss it was decides whose rows are to be looked at."""
        parts: list[Any] = [own]
        if self.args.world_size > 1:
            parts = [None] * self.args.world_size
            torch.distributed.all_gather_object(parts, own)
        guilty = [part for part in parts if not part["finite"][0]]
        what = "the loss" if guilty else "the gradient norm"
        step = self.state.global_step + 1
        if self.is_world_process_zero():
            rows = [ids for part in guilty or parts for ids in part["input_ids"]]
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
        """The stage's figures over the held-out rows, as `eval_...`.

        The Trainer's own takes the mean of batch means, in which a token of a short row weighs more.
        """
        with self.clock.paused():
            found = self.score_held_out(self._held_out if eval_dataset is None else eval_dataset)
        self.count()
        metrics: dict[str, float] = {}
        if found is not None:
            self.last_evaluation, self.evaluated_at = found, self.state.global_step
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.metrics().items()}
            # Past TRL's log: it would mix in, and forget, the training metrics since the last line.
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
        if self.scaler is not None and "loss" in logs:
            logs |= self.scaler.figures()
        super().log(logs, start_time)
        # The whole history goes into every checkpoint; metrics.jsonl has it already.
        del self.state.log_history[:-1]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All that a bit-equal continuation needs, in one atomic folder; no model card, tokenizer or pickled args."""
        step = self.state.global_step
        staging = self._folder.path / f".staging-{step}"
        self.store_flos()
        sharding.settle(self.model)
        try:
            with self.clock.paused(), checkpoint.disk_errors(self._folder.path / f"checkpoint-{step}"):
                self._fill(staging, step)
        except BaseException:
            if self.args.should_save:  # on a full disk it is what fills it
                shutil.rmtree(staging, ignore_errors=True)
            raise

    def _fill(self, staging: Path, step: int) -> None:
        self._refuse_non_finite_weights()
        progress = self.count()
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
        """The trained weights, on the process that saves, or in parts on each."""
        if not self._in_parts and (self.args.should_save or self.is_fsdp_enabled):
            write_weights(self.model, folder, writes=self.args.should_save)
            if self.args.should_save and (folder / ADAPTER_FILE).is_file():
                # The first step of a warm-up may have a learning rate of 0, and a skipped one moves nothing.
                taken = self.state.global_step - (self.scaler.skipped if self.scaler is not None else 0)
                warmed = taken > self.args.get_warmup_steps(self.state.max_steps) + 1
                check_written(self.model, folder, moved=warmed)

    @property
    def _in_parts(self) -> bool:
        return self.is_fsdp_enabled and self._distributed["checkpoint"] == "sharded"

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The state of one process alone, also where several hold parts of it: any number may go on from it."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        if self._in_parts:
            state = write_parts(own_weights(self.model), self.optimizer, folder)
        else:
            state = sharding.whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            if self._in_parts:
                write_config(self.model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.is_fsdp_enabled or has_parts(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if has_parts(folder):
            read_optimizer(self.optimizer, state, folder)
        else:
            sharding.load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

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


def _sequences(batch: Mapping[str, Any]) -> int:
    return len(batch["input_ids"])


Agree = Callable[[bool], bool]


def agreement(trainer: RunTrainer) -> Agree:
    """A function that is True on every process as soon as it is True on one."""

    def agree(flag: bool) -> bool:
        if trainer.args.world_size == 1:
            return flag
        votes = torch.tensor(int(flag), device=trainer.args.device)
        return bool(trainer.accelerator.reduce(votes, "sum") > 0)

    return agree
