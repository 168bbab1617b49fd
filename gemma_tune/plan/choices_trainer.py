"""Every keyword that trl's SFTConfig, RewardConfig, DPOConfig or KTOConfig, or our PpoConfig receives: what the stages
share.

Names are those of trl 1.16 and transformers 5.23. What only pairs and judged answers need stands in `choices_pairs`,
what only PPO needs in `choices_ppo`.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from gemma_tune.gemma.families import Family
from gemma_tune.plan.choices_batch import Batch
from gemma_tune.plan.choices_model import Precision
from gemma_tune.plan.choices_pairs import (
    NO_DROPOUT,
    REFERENCE,
    SCORES,
    dpo_choices,
    kto_choices,
    pair_choices,
    reward_choices,
)
from gemma_tune.plan.choices_ppo import ppo_choices
from gemma_tune.plan.machine import Machine
from gemma_tune.plan.sharding import Sharding, sharding_keywords
from gemma_tune.plan.stages import has_answers, unit, written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Recipe

_OWN_DATA = "rows arrive tokenised, labelled and packed by gemma_tune.data"
_OWN_CHECKPOINTS = "checkpoints are ours: written whole or not at all"
_OWN_EVALUATION = "evaluation is ours: weighted by trained tokens"
_NON_REENTRANT = "exact also where layers share keys and values; reentrant checkpointing is silently wrong there"
_NON_FINITE = "a non-finite loss must be seen, not written down as 0"

_FIXED: dict[str, str] = {
    "activation_checkpointing": "memory.gradient_checkpointing decides it",
    "activation_checkpointing_kwargs": _NON_REENTRANT,
    "average_tokens_across_devices": "a token counts the same on every process",
    "eval_on_start": _OWN_EVALUATION,
    "label_names": _OWN_DATA,
    "hub_token": "secrets do not belong in recipes",
}
_NO_REMOTE_CODE = "no code from a model folder is run"
_OWN_LOOP = "the loop of PPO is ours, and has no use for it"
_FIXED_OF_STAGE: dict[str, dict[str, str]] = {
    "sft": {"truncation_mode": _OWN_DATA, "trust_remote_code": _NO_REMOTE_CODE},
    "reward": {
        "disable_dropout": NO_DROPOUT,
        "pad_to_multiple_of": _OWN_DATA,
        "trust_remote_code": _NO_REMOTE_CODE,
    },
    "dpo": {
        "trust_remote_code": _NO_REMOTE_CODE,
        "truncation_mode": _OWN_DATA,
        "disable_dropout": NO_DROPOUT,
        "pad_to_multiple_of": _OWN_DATA,
        "ld_alpha": SCORES,
        "use_weighting": SCORES,
        "sync_ref_model": REFERENCE,
        "ref_model_mixup_alpha": REFERENCE,
        "ref_model_sync_steps": REFERENCE,
    },
    "kto": {
        "trust_remote_code": _NO_REMOTE_CODE,
        "disable_dropout": NO_DROPOUT,
        "pad_to_multiple_of": _OWN_DATA,
        "sync_ref_model": REFERENCE,
        "ref_model_mixup_alpha": REFERENCE,
        "ref_model_sync_steps": REFERENCE,
    },
    "ppo": {
        "neftune_noise_alpha": _OWN_LOOP,
        "use_liger_kernel": _OWN_LOOP,
        "label_smoothing_factor": _OWN_LOOP,
        "torch_compile": _OWN_LOOP,
        "torch_compile_backend": _OWN_LOOP,
        "torch_compile_mode": _OWN_LOOP,
        "liger_kernel_config": _OWN_LOOP,
        "torch_empty_cache_steps": _OWN_LOOP,
        "dataloader_num_workers": _OWN_LOOP,
        "dataloader_drop_last": _OWN_LOOP,
        "accelerator_config": _OWN_LOOP,
    },
}


def fixed(stage: str) -> dict[str, str]:
    """Keywords that `advanced.trainer` may not carry although no key of the recipe owns them -> why.

    Those that one owns: `recipe.names.owner_of`.
    """
    return _FIXED | _FIXED_OF_STAGE[stage]


def trainer_choices(
    recipe: Recipe, machine: Machine, family: Family, precision: Precision, batch: Batch, sharding: Sharding
) -> dict[str, Choice]:
    """Keywords of the stage's configuration, those of `advanced.trainer` last."""
    chosen = {
        "output_dir": written(recipe, "output"),
        "seed": written(recipe, "seed"),
        "data_seed": Choice(recipe.seed, "the recipe's seed"),
        **_batch(batch),
        **_optim(recipe, machine, sharding),
        **sharding_keywords(recipe, machine, family, sharding),
        **_types(machine, precision),
        **_checkpointing(batch),
        **_speaking(recipe),
        **(ppo_choices(recipe) if recipe.stage == "ppo" else _of_trl(recipe, machine)),
    }
    unchecked = {key: Choice(value, "advanced.trainer: unchecked") for key, value in recipe.advanced.trainer.items()}
    return chosen | unchecked


def _batch(batch: Batch) -> dict[str, Choice]:
    return {
        "per_device_train_batch_size": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "per_device_eval_batch_size": batch.evaluation,
    }


def optimizer_choice(recipe: Recipe, machine: Machine, *, sharded: bool = False) -> Choice:
    """The optimizer under the name that SFTConfig's `optim` takes."""
    if recipe.optim.optimizer != "auto":
        return Choice(recipe.optim.optimizer, "recipe")
    if machine.device == "cpu":
        return Choice("adamw_torch", "AdamW of torch")
    if recipe.adapter is None and sharded:
        return Choice("adamw_torch_fused", "AdamW of torch: its states are sharded; 8-bit AdamW knows no parts")
    if recipe.adapter is None:
        return Choice("adamw_8bit", "full fine-tune on a GPU: 2 bytes of state a parameter instead of 8")
    return Choice("adamw_torch_fused", "AdamW of torch, one kernel for all; an adapter's state is small")


def _optim(recipe: Recipe, machine: Machine, sharding: Sharding) -> dict[str, Choice]:
    optim = recipe.optim
    steps = (
        Choice(-1, "default: optim.epochs decides") if optim.max_steps is None else Choice(optim.max_steps, "recipe")
    )
    return {
        "learning_rate": written(recipe, "optim.learning_rate"),
        "lr_scheduler_type": written(recipe, "optim.schedule"),
        # transformers 5 takes a share of the steps as a number below 1 and rounds up.
        "warmup_steps": written(recipe, "optim.warmup_ratio"),
        "num_train_epochs": written(recipe, "optim.epochs"),
        "max_steps": steps,
        "optim": optimizer_choice(recipe, machine, sharded=sharding.sharded),
        "weight_decay": written(recipe, "optim.weight_decay"),
        "max_grad_norm": written(recipe, "optim.max_grad_norm"),
        "adam_beta1": written(recipe, "optim.beta1"),
        "adam_beta2": written(recipe, "optim.beta2"),
        "adam_epsilon": written(recipe, "optim.epsilon"),
    }


def _types(machine: Machine, precision: Precision) -> dict[str, Choice]:
    return {
        "bf16": Choice(precision.autocast == "bf16", precision.why_autocast),
        "fp16": Choice(precision.autocast == "fp16", precision.why_autocast),
        "use_cpu": Choice(machine.device == "cpu", f"the machine is {machine.name}"),
    }


def _checkpointing(batch: Batch) -> dict[str, Choice]:
    return {
        "activation_checkpointing": batch.checkpointing,
        "activation_checkpointing_kwargs": Choice({"use_reentrant": False}, _NON_REENTRANT),
    }


def _speaking(recipe: Recipe) -> dict[str, Choice]:
    name = recipe.tracking.name
    run_name = Choice(name, "recipe") if name else Choice(PurePath(recipe.output).name, "default: the output folder's")
    return {
        "logging_strategy": Choice("steps", "metrics.jsonl"),
        "logging_steps": written(recipe, "tracking.log_every"),
        "logging_first_step": Choice(True, "the first loss shows whether the base was loaded right"),
        "logging_nan_inf_filter": Choice(False, _NON_FINITE),
        "disable_tqdm": Choice(True, "the progress bar is ours"),
        "report_to": Choice(
            "none", "metrics go to metrics.jsonl; W&B, where asked for, is written by our own callback"
        ),
        "run_name": run_name,
        "save_strategy": Choice("no", _OWN_CHECKPOINTS),
        "eval_strategy": Choice("no", _OWN_EVALUATION),
    }


def _of_trl(recipe: Recipe, machine: Machine) -> dict[str, Choice]:
    """What TRL's trainers are told beside that. PPO has a loop of its own."""
    several = {
        "average_tokens_across_devices": Choice(True, _FIXED["average_tokens_across_devices"]),
        "ddp_find_unused_parameters": Choice(False, "every trained parameter takes part in every step"),
    }
    return several | _data(recipe, machine) | _of_stage(recipe)


def _data(recipe: Recipe, machine: Machine) -> dict[str, Choice]:
    data = recipe.data
    sampling = (
        ("random", "data.shuffle: a new order each epoch") if data.shuffle else ("sequential", "data.shuffle: false")
    )
    if data.shuffle and has_answers(recipe):
        sampling = ("sequential", f"the data come shuffled, {unit(recipe.stage)}s of like length next to each other")
    return {
        "max_length": Choice(None, _OWN_DATA),
        "remove_unused_columns": Choice(False, _OWN_DATA),
        "train_sampling_strategy": Choice(*sampling),
        "dataloader_num_workers": Choice(0, "rows are ready token ids: a worker would only copy them"),
        "dataloader_pin_memory": Choice(machine.device == "cuda", "pinned memory speeds up copies to a GPU"),
    }


def _of_stage(recipe: Recipe) -> dict[str, Choice]:
    if has_answers(recipe):
        own = {"reward": reward_choices, "dpo": dpo_choices, "kto": kto_choices}[recipe.stage]
        return pair_choices() | own(recipe)
    fixed: dict[str, Any] = {
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "label_names": ["labels"],
    }
    return {key: Choice(value, _OWN_DATA) for key, value in fixed.items()}
