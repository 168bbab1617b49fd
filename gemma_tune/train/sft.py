"""Supervised fine-tuning: what it does besides what all stages do (`train/run.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from trl import SFTConfig

from gemma_tune.data.build import build
from gemma_tune.data.collate import Collator
from gemma_tune.models.card import write_card
from gemma_tune.models.load import set_stop_ids
from gemma_tune.models.lora import save_adapter
from gemma_tune.train.run import Run, Stage, endless, trainer_config
from gemma_tune.train.sft_trainer import SftTrainer
from gemma_tune.train.trainer import Surroundings


def make_trainer(run: Run, around: Surroundings) -> SftTrainer:
    """TRL's loop over packed or single rows."""
    family, train = run.materials.family, run.materials.data.train
    collator = Collator(
        family.pad_id,
        fill_id=family.bos_id,
        flatten=run.plan.values("model")["attn_implementation"] == "flash_attention_2",
    )
    return SftTrainer(
        model=run.model,
        tokenizer=run.materials.tokenizer,
        collator=collator,
        train=endless(train) if isinstance(train, IterableDataset) else train,
        config=trainer_config(run.plan),  # type: ignore[arg-type]
        around=around,
    )


def write(run: Run, folder: Path, results: Mapping[str, Any]) -> None:
    """An adapter in PEFT's form, or the whole model after a full fine-tune."""
    family, tokenizer = run.materials.family, run.materials.tokenizer
    if run.plan.lora:
        save_adapter(run.model, folder, family, tokenizer)
    else:
        set_stop_ids(run.model, family)
        run.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        write_card(folder, run.materials.source.name, family, adapter=False)


def finish(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """By how much the held-out loss fell, as a share of the base's."""
    before, after = results.get("base", {}).get("loss"), results["tuned"].get("loss")
    return {"relative_fall": (before - after) / before if before and after is not None else None}


STAGE = Stage(config=SFTConfig, prepare=build, trainer=make_trainer, write=write, finish=finish)
