"""Reward models: what their training does besides what all stages do (`train/run.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl import RewardConfig

from gemma_tune.data.collate import PairCollator
from gemma_tune.data.pairs import build_pairs
from gemma_tune.models.lora import save_adapter
from gemma_tune.models.reward import RewardModel, save_head
from gemma_tune.train.reward_trainer import RewardFigures, RewardTrainer
from gemma_tune.train.run import Run, Stage, trainer_config
from gemma_tune.train.trainer import Surroundings

STATS_PAIRS = 200
"""Training pairs that the statistics are taken from where no pair is held out."""


def make_trainer(run: Run, around: Surroundings) -> RewardTrainer:
    """TRL's loop over pairs."""
    return RewardTrainer(
        model=run.model,
        tokenizer=run.materials.tokenizer,
        collator=PairCollator(run.materials.family.pad_id),
        train=run.materials.data.train,
        config=trainer_config(run.plan),  # type: ignore[arg-type]
        around=around,
    )


def write(run: Run, folder: Path, results: Mapping[str, Any]) -> None:
    """The adapter, the head, and what its rewards are like: whoever uses them has to scale and to check them."""
    save_adapter(run.model.trunk, folder, run.materials.family, run.materials.tokenizer)
    save_head(run.model, folder, results["reward_stats"])


def finish(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """The contents of reward_stats.json."""
    family, materials = run.materials.family, run.materials
    found, held_out = run.trainer.last_evaluation, True
    if found is None:
        train = materials.data.train
        found, held_out = run.trainer.score_held_out(train.select(range(min(len(train), STATS_PAIRS)))), False
    assert isinstance(found, RewardFigures)
    stats = {
        "family": family.name,
        "base": materials.source.name,
        "base_revision": materials.revision,
        "template_sha256": family.template_sha256,
        "token": family.turn_end,
        "token_id": family.turn_end_id,
        "held_out": held_out,
        **found.to_json(),
    }
    return {"reward_stats": stats}


STAGE = Stage(
    config=RewardConfig,
    prepare=build_pairs,
    trainer=make_trainer,
    write=write,
    finish=finish,
    wrap=lambda model, plan, family: RewardModel(model),
    answers=False,
)
