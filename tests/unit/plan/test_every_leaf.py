"""No dead knobs: each leaf of the recipe, flipped to another valid value, changes what the plan holds.

Reasons do not count, only values: a reason changes from "default" to "recipe" by itself.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from gemma_tune.plan.stages import CONFIGS
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.schema import Recipe
from tests.unit.plan.recipes import plan_for

SECTIONS = ("model", "quantization", "lora", "trainer", "data", "session")

# Leaves that only `sft` reads. A recipe of another stage that writes them is refused (tests/unit/recipe/test_rules.py).
ONLY_SFT = {
    "data.packing",
    "data.train_on",
    "data.streaming",
    "data.shuffle_buffer",
    "data.canaries.count",
    "data.canaries.repeats",
    "adapter.dropout",
}
# Those that a stage has no use for which is not sharded.
ONLY_SHARDED = {
    "distributed.strategy",
    "distributed.checkpoint",
    "distributed.offload",
    "distributed.reshard_after_forward",
    "distributed.replicas",
}
# Those that a reward model has no use for: it gives no answers.
NOT_REWARD = {"samples.prompts", "samples.held_out", "samples.every", "samples.max_new_tokens"}

# leaf -> another valid value. Everything else that it needs stands in COMPANIONS.
FLIPS: dict[str, Any] = {
    "model.name": "google/gemma-3-270m",
    "model.revision": "main",
    "model.tokenizer": "google/gemma-3-4b-it",
    "model.quantization": "int8",
    "model.double_quantization": False,
    "model.precision": "fp32",
    "model.attention": "eager",
    "model.text_only": True,
    "model.adapter": "runs/sft",
    "model.adapter_mode": "stack",
    "adapter.r": 8,
    "adapter.alpha": 8,
    "adapter.dropout": 0.2,
    "adapter.targets": "attention",
    "adapter.rslora": True,
    "adapter.dora": True,
    "reward.margin": "score",
    "reward.center": 0.1,
    "dpo.loss": "ipo",
    "dpo.beta": 0.01,
    "dpo.label_smoothing": 0.1,
    "dpo.sft_weight": 1.0,
    "dpo.precompute_reference": True,
    "kto.beta": 0.01,
    "kto.desirable_weight": 1.3,
    "kto.undesirable_weight": 0.8,
    "ppo.reward.source": "runs/other",
    "ppo.reward.weight": 0.5,
    "ppo.max_new_tokens": 128,
    "ppo.temperature": 0.7,
    "ppo.top_k": 50,
    "ppo.top_p": 0.9,
    "ppo.samples_per_prompt": 4,
    "ppo.estimator": "reinforce_pp",
    "ppo.epochs": 4,
    "ppo.minibatches": 2,
    "ppo.critic": "head",
    "ppo.critic_learning_rate": 1e-4,
    "ppo.critic_warmup": 3,
    "ppo.clip": 0.1,
    "ppo.value_clip": 0.5,
    "ppo.gamma": 0.99,
    "ppo.lam": 1.0,
    "ppo.kl": 0.2,
    "ppo.kl_target": 6.0,
    "ppo.kl_horizon": 5000,
    "ppo.stop_kl": 0.1,
    "ppo.entropy": 0.01,
    "ppo.missing_stop_penalty": 0.0,
    "ppo.normalize": False,
    "ppo.score_clip": None,
    "ppo.whiten_rewards": True,
    "data.sources.name": "mine.jsonl",
    "data.sources.format": "messages",
    "data.sources.columns": {"messages": "turns"},
    "data.sources.subset": "en",
    "data.sources.split": "test",
    "data.sources.revision": "main",
    "data.sources.weight": 2.0,
    "data.sources.limit": 10,
    "data.max_length": 512,
    "data.packing": False,
    "data.train_on": "all",
    "data.holdout": 50,
    "data.deduplicate": False,
    "data.shuffle": False,
    "data.streaming": True,
    "data.shuffle_buffer": 100,
    "data.system_role": "drop",
    "data.fix_roles": "merge",
    "data.on_empty_turn": "drop",
    "data.on_overlong": "drop",
    "data.on_bad_row": "drop",
    "data.canaries.count": 2,
    "data.canaries.repeats": [2, 8],
    "data.workers": 2,
    "optim.learning_rate": 3e-5,
    "optim.schedule": "linear",
    "optim.warmup_ratio": 0.1,
    "optim.epochs": 2.0,
    "optim.max_steps": 100,
    "optim.optimizer": "adafactor",
    "optim.weight_decay": 0.1,
    "optim.max_grad_norm": 0.3,
    "optim.beta1": 0.8,
    "optim.beta2": 0.9,
    "optim.epsilon": 1e-6,
    "batch.size": 32,
    "batch.micro": 16,
    "memory.gradient_checkpointing": True,
    "evaluation.every": 10,
    "evaluation.max_rows": 10,
    "samples.prompts": ["Hello"],
    "samples.held_out": 1,
    "samples.every": 10,
    "samples.max_new_tokens": 8,
    "checkpoint.every": 10,
    "checkpoint.keep": 5,
    "tracking.wandb": True,
    "tracking.project": "mine",
    "tracking.name": "first",
    "tracking.log_every": 5,
    "distributed.strategy": "fsdp2",
    "distributed.checkpoint": "sharded",
    "distributed.offload": True,
    "distributed.reshard_after_forward": False,
    "distributed.replicas": 2,
    "distributed.timeout": 60,
    "seed": 1,
    "output": "runs/other",
    "advanced.trainer": {"ddp_bucket_cap_mb": 50},
}

# What must be set on both sides of the comparison for a flip to be valid.
COMPANIONS: dict[str, dict[str, Any]] = {
    "data.streaming": {"data.holdout": 50, "optim.max_steps": 100},
    "model.adapter_mode": {"model.adapter": "runs/sft"},
    "data.canaries.count": {"data.canaries": {"repeats": [1, 4]}},
    "data.canaries.repeats": {"data.canaries": {"count": 4}},
    "ppo.kl_horizon": {"ppo.kl_target": 6.0},
    "distributed.checkpoint": {"distributed.strategy": "fsdp2"},
    "distributed.offload": {"distributed.strategy": "fsdp2"},
    "distributed.reshard_after_forward": {"distributed.strategy": "fsdp2"},
    "distributed.replicas": {"distributed.strategy": "hsdp"},
}


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves; sections that are optional, or items of a list, are walked into."""
    for name, field in model.model_fields.items():
        section = section_in(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from leaves(section, f"{prefix}{name}.")


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, in a union or in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return next(filter(None, map(section_in, typing.get_args(annotation))), None)
    return None


def held(plan: Plan) -> dict[str, Any]:
    """What a run reads of a plan."""
    return {section: plan.values(section) for section in SECTIONS} | {"stage": plan.stage, "family": plan.family}


def with_flip(leaf: str, value: Any) -> dict[str, Any]:
    if leaf.startswith("data.sources."):
        return {"data.sources": [{"name": "ultrachat"} | {leaf.rpartition(".")[2]: value}]}
    if leaf.startswith("ppo.reward."):
        return {"ppo.reward": [{"source": "runs/reward"} | {leaf.rpartition(".")[2]: value}]}
    return {leaf: value}


def test_the_table_covers_every_leaf_and_nothing_else():
    assert set(leaves(Recipe)) == FLIPS.keys() | {"stage"}


def read_in(stage: str) -> list[str]:
    """The leaves that this stage reads."""
    unread = {
        "sft": set(),
        "reward": ONLY_SFT | NOT_REWARD | {"model.adapter_mode"},
        "dpo": ONLY_SFT,
        "kto": ONLY_SFT | ONLY_SHARDED,
        "ppo": ONLY_SFT | ONLY_SHARDED,
    }[stage]
    others = tuple(f"{other}." for other in CONFIGS if other != stage)
    return [leaf for leaf in FLIPS if leaf not in unread and not leaf.startswith(others)]


@pytest.mark.parametrize(("stage", "leaf"), [(stage, leaf) for stage in CONFIGS for leaf in read_in(stage)])
def test_a_flipped_leaf_changes_the_plan(stage, leaf):
    companions = {"stage": stage} | COMPANIONS.get(leaf, {})
    machine = "8xh100" if leaf == "distributed.replicas" else "rtx4090"
    before = held(plan_for(companions, machine))
    after = held(plan_for(companions | with_flip(leaf, FLIPS[leaf]), machine))
    assert after != before


def test_no_adapter_changes_the_plan():
    base = {"model.quantization": "none"}
    assert held(plan_for(base)) != held(plan_for(base | {"adapter": None}))


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_stage(stage):
    assert plan_for({"stage": stage}).stage == stage
