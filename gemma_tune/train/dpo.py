"""Direct preference optimisation: what it does besides what all stages do (`train/run.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import DPOConfig

from gemma_tune.data.collate import PairCollator
from gemma_tune.data.pairs import build_pairs
from gemma_tune.models.lora import save_adapter
from gemma_tune.train.dpo_trainer import ChosenAlarm, DpoTrainer, sampled_kl
from gemma_tune.train.evaluate import prompt_ids, sample_prompts
from gemma_tune.train.reference import cache_key, with_reference
from gemma_tune.train.run import Run, Stage, trainer_config
from gemma_tune.train.trainer import Surroundings, agreement

KL_PROMPTS = 32
"""Held-out prompts that are answered to measure how far the policy went from the reference."""


def make_trainer(run: Run, around: Surroundings) -> DpoTrainer:
    """TRL's loop over pairs, with the reference on the same base, its scores taken before where the plan says so."""
    data = run.materials.data
    trainer = DpoTrainer(
        model=run.model,
        tokenizer=run.materials.tokenizer,
        collator=PairCollator(run.materials.family.pad_id),
        train=data.train,
        config=trainer_config(run.plan),  # type: ignore[arg-type]
        around=around,
        mode=(run.session.get("adapter") or {}).get("mode", "continue"),
    )
    if run.session["precompute_reference"]:
        key = cache_key(run.identity)
        shared: dict[str, Any] = {
            "key": key,
            "score": trainer.score_reference,
            "writes": trainer.is_world_process_zero(),
            "agree": agreement(trainer),
        }
        trainer.train_dataset = with_reference(data.train, "train", **shared)
        if around.held_out:
            name = f"held_out-{len(around.held_out)}"
            trainer.set_held_out(with_reference(around.held_out, name, **shared))
    trainer.add_callback(ChosenAlarm(run.folder, run.console))
    return trainer


def write(run: Run, folder: Path, results: Mapping[str, Any]) -> None:
    """The policy as one plain adapter on the base, also where it was trained on top of another."""
    save_adapter(run.model, folder, run.materials.family, run.materials.tokenizer)


def finish(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """How far the policy went from its reference: KL over answers that it draws itself."""
    materials = run.materials
    prompts = sample_prompts((), materials.data.held_out_examples, KL_PROMPTS)
    if not prompts:
        return {}
    found = sampled_kl(
        run.model,
        prompt_ids(prompts, materials.family, materials.encoder),
        materials.family,
        max_new_tokens=run.session["samples"]["max_new_tokens"],
        seed=run.session["seed"],
    )
    results["tuned"] |= found
    return {}


STAGE = Stage(config=DPOConfig, prepare=build_pairs, trainer=make_trainer, write=write, finish=finish, reference=True)
