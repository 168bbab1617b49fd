"""What may change between a run and its continuation, and what may not."""

from __future__ import annotations

import dataclasses

import pytest

from gemma_tune.plan.types import Choice, Plan
from gemma_tune.train.identity import differences, identity_of


def section(**values: object) -> dict[str, Choice]:
    return {key: Choice(value, "recipe") for key, value in values.items()}


PLAN = Plan(
    stage="sft",
    family="gemma3_text",
    machine={"name": "cpu"},
    model=section(name="google/gemma-3-270m", dtype="bfloat16", attn_implementation="sdpa"),
    quantization=section(load_in_4bit=True),
    lora=section(r=16),
    trainer=section(
        learning_rate=2e-4,
        output_dir="runs/x",
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        seed=0,
        max_steps=-1,
        lr_scheduler_type="cosine",
    ),
    data=section(max_length=256, workers=1, sources=({"name": "a.jsonl"},)),
    session=section(output="runs/x"),
)


def changed(name: str, **values: object) -> Plan:
    return dataclasses.replace(PLAN, **{name: {**getattr(PLAN, name), **section(**values)}})


def diff(plan: Plan, *, fingerprint: str = "abc", revision: str | None = "r1", world_size: int = 1) -> list[str]:
    saved = identity_of(PLAN, fingerprint="abc", revision="r1")
    return differences(saved, identity_of(plan, fingerprint=fingerprint, revision=revision, world_size=world_size))


def test_the_same_plan_has_no_difference() -> None:
    assert diff(PLAN) == []


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        (changed("trainer", learning_rate=1e-4), "trainer.learning_rate: 0.0002 -> 0.0001"),
        (changed("trainer", lr_scheduler_type="linear"), 'trainer.lr_scheduler_type: "cosine" -> "linear"'),
        (changed("trainer", seed=1), "trainer.seed: 0 -> 1"),
        (changed("trainer", max_steps=9), "trainer.max_steps: -1 -> 9"),
        (changed("trainer", gradient_accumulation_steps=8), "batch.size: 8 -> 16"),
        (changed("trainer", weight_decay=0.1), "trainer.weight_decay: null -> 0.1"),
        (changed("trainer", accelerator_config={}), "trainer.accelerator_config: null -> {}"),
        (changed("model", dtype="float32"), 'model.dtype: "bfloat16" -> "float32"'),
        (changed("quantization", load_in_4bit=False), "quantization.load_in_4bit: true -> false"),
        (changed("lora", r=8), "lora.r: 16 -> 8"),
        (changed("data", max_length=128), "data.max_length: 256 -> 128"),
    ],
)
def test_a_change_of_the_mathematics_is_listed_with_both_values(plan: Plan, line: str) -> None:
    assert diff(plan) == [line]


def test_other_data_or_another_base_are_listed() -> None:
    assert diff(PLAN, fingerprint="xyz") == ['data.fingerprint: "abc" -> "xyz"']
    assert diff(PLAN, revision="r2") == ['model.revision: "r1" -> "r2"']


@pytest.mark.parametrize(
    "plan",
    [
        changed("trainer", output_dir="runs/y", logging_steps=10),
        changed("trainer", per_device_train_batch_size=8, gradient_accumulation_steps=1),
        changed("trainer", fsdp=True, fsdp_config={"version": 2}, ddp_timeout=60),
        changed("trainer", accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": True}}),
        changed("model", attn_implementation="eager"),
        changed("data", workers=4),
        changed("session", output="runs/y"),
    ],
)
def test_what_does_not_touch_the_mathematics_may_change(plan: Plan) -> None:
    assert diff(plan) == []


def test_processes_times_micro_times_accumulation_is_what_counts() -> None:
    assert diff(changed("trainer", gradient_accumulation_steps=2), world_size=2) == []
    assert diff(PLAN, world_size=2) == ["batch.size: 8 -> 16"]
