"""Plans for TPUs: what is derived, what is refused, and that the recipe means the same as for torch."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_tune.commands import tpu as command
from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.machine import MACHINES
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.types import Plan
from gemma_tune.recipe.schema import Recipe
from gemma_tune.tpu.plan import Mesh, make_tpu_plan, named_topology, read_mesh, total_steps


def recipe(**changes: Any) -> Recipe:
    written: dict[str, Any] = {
        "stage": "sft",
        "model": {"name": "google/gemma-7b"},
        "adapter": {"r": 8},
        "data": {"sources": [{"name": "english_quotes"}], "max_length": 1024},
        "batch": {"size": 64},
        "output": "runs/x",
    }
    for section, values in changes.items():
        known = written.get(section)
        written[section] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    return Recipe.model_validate(written)


def plan_of(one: Recipe, mesh: Mesh = Mesh(8)) -> Plan:  # noqa: B008 - frozen
    shape = PUBLISHED[one.model.name]
    return make_tpu_plan(one, FAMILIES[shape.family], shape, mesh, "v5e")


@pytest.mark.parametrize(
    ("text", "chips", "mesh"),
    [
        (None, 8, Mesh(8, 1)),
        ("fsdp=4,tp=2", 8, Mesh(4, 2)),
        ("tp=2,fsdp=4", 8, Mesh(4, 2)),
        ("tp=4", 8, Mesh(2, 4)),
        ("fsdp=2", 8, Mesh(2, 4)),
        (None, 1, Mesh(1, 1)),
    ],
)
def test_meshes(text: str | None, chips: int, mesh: Mesh) -> None:
    assert read_mesh(text, chips) == mesh


@pytest.mark.parametrize("text", ["fsdp=16", "tp=3", "fsdp=3,tp=2", "8", "dp=8", "fsdp=0", "fsdp=4,tp=2,tp=1"])
def test_meshes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--mesh"):
        read_mesh(text, 8)


def test_the_plan_is_that_of_torch_where_both_have_a_key() -> None:
    one = recipe(optim={"weight_decay": 0.01, "beta2": 0.95, "max_steps": 7}, adapter={"rslora": True})
    shape = PUBLISHED[one.model.name]
    torch = make_plan(one, MACHINES["a100-80gb"], shape, FAMILIES[shape.family])
    jax = plan_of(one)
    assert jax.values("lora") == torch.values("lora")
    assert jax.values("data") == torch.values("data")
    same = {"learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "weight_decay"}
    same |= {"max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"}
    for key in same:
        assert jax.values("trainer")[key] == torch.values("trainer")[key], key
    assert (
        jax.values("quantization").items()
        <= {
            **torch.values("quantization"),
            "bnb_4bit_use_double_quant": False,
        }.items()
    )


@pytest.mark.parametrize(("micro", "rows", "passes"), [("auto", 4, 16), (2, 8, 8), (16, 64, 1)])
def test_a_batch_is_split_over_the_chips_that_share_rows(micro: Any, rows: int, passes: int) -> None:
    trainer = plan_of(recipe(batch={"micro": micro}), Mesh(4, 2)).values("trainer")
    assert (trainer["per_device_train_batch_size"], trainer["gradient_accumulation_steps"]) == (rows, passes)


def test_a_batch_that_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"batch.size 20 cannot be split"):
        plan_of(recipe(batch={"size": 20}))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": {"precision": "fp16"}}, "model.precision"),
        ({"model": {"quantization": "int8"}}, "model.quantization"),
        ({"model": {"adapter": "runs/y"}}, "model.adapter"),
        ({"model": {"name": "google/gemma-4-31B-it"}}, "model.name"),
        ({"model": {"name": "google/gemma-3n-E2B-it", "text_only": True}}, "model.name"),
        ({"adapter": None}, "adapter"),
        ({"adapter": {"dora": True}}, "adapter.dora"),
        ({"optim": {"optimizer": "adafactor"}}, "optim.optimizer"),
        ({"data": {"streaming": True, "holdout": 8}, "optim": {"max_steps": 8}}, "data.streaming"),
        ({"tracking": {"wandb": True}}, "tracking.wandb"),
        ({"advanced": {"trainer": {"torch_compile": True}}}, "advanced.trainer"),
        ({"stage": "dpo"}, "stage"),
        ({"data": {"max_length": 9000}}, "data.max_length"),
    ],
)
def test_what_is_not_there_is_refused(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(recipe(**changes))
    assert [problem.where for problem in caught.value.problems] == [key]
    assert all(problem.fix for problem in caught.value.problems)


def test_steps_are_counted_as_transformers_does() -> None:
    assert total_steps(51, 16, 2, -1) == 8
    assert total_steps(51, 16, 0.3, -1) == 2
    assert total_steps(51, 16, 2, 5) == 5


def test_another_environment_says_which_one_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(AccessError, match=r"jax, tunix, qwix(.|\n)*make setup-tpu"):
        command.require_jax()
    with pytest.raises(UserError, match="unknown TPU 'v9x-1'"):
        named_topology("v9x-1")
