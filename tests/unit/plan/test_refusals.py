"""Combinations that are refused before anything is loaded."""

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.recipe.names import OWNED_BY_RECIPE
from tests.unit.plan.recipes import plan_for


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"adapter": None}, "adapter", "trains all weights"),
        ({"adapter": None, "model.quantization": "int8"}, "adapter", "trains all weights"),
        ({"model.name": "google/gemma-2-2b", "model.attention": "sdpa"}, "model.attention", "capped at 50"),
        ({"model.name": "google/gemma-4-E4B", "model.attention": "flash_attention_2"}, "model.attention", "of 512"),
        ({"model.precision": "fp16"}, "model.precision", "overflows fp16"),
        ({"model.name": "google/gemma-4-31B", "model.precision": "fp16"}, "model.precision", "overflows fp16"),
        (
            {"model.name": "google/gemma-2b", "model.precision": "fp16_rescaled"},
            "model.precision",
            "cannot be rescaled",
        ),
        ({"model.name": "google/gemma-3n-E2B", "model.precision": "fp16_rescaled"}, "model.precision", "be rescaled"),
        ({"model.attention": "flash_attention_2", "model.precision": "fp32"}, "model.attention", "16 bits"),
        ({"model.name": "google/gemma-2b", "data.max_length": 8193}, "data.max_length", "8,192 positions"),
        ({"adapter.dropout": 1}, "adapter.dropout", "drops all"),
        ({"optim.schedule": "constant"}, "optim.schedule", "no warm-up"),
        ({"optim.warmup_ratio": 1}, "optim.warmup_ratio", "never reaches"),
        ({"optim.beta2": 1}, "optim.beta2", "never"),
        ({"data.holdout": 1.5}, "data.holdout", "1.5"),
        ({"data.streaming": True, "data.holdout": 10}, "data.streaming", "no known end"),
        ({"data.streaming": True, "optim.max_steps": 9}, "data.streaming", "no known length"),
        ({"advanced.trainer": {"learning_rate": 1}}, "advanced.trainer.learning_rate", "optim.learning_rate"),
        ({"advanced.trainer": {"trust_remote_code": True}}, "advanced.trainer.trust_remote_code", "is fixed"),
    ],
)
def test_the_recipe_is_refused(changes, where, what):
    with pytest.raises(UserError) as caught:
        plan_for(changes, "a100")
    problem = caught.value.problems[0]
    assert problem.where == where and what in problem.what and problem.fix
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("changes", "machine", "where"),
    [
        ({"model.attention": "flash_attention_2"}, "t4", "model.attention"),
        ({"model.attention": "flash_attention_2"}, "cpu", "model.attention"),
        ({"model.precision": "bf16"}, "t4", "model.precision"),
        ({"model.name": "google/gemma-2b", "model.precision": "fp16"}, "cpu", "model.precision"),
        (
            {"adapter": None, "model.quantization": "none", "model.precision": "fp16_rescaled"},
            "cpu",
            "model.precision",
        ),
        ({"model.quantization": "int8", "adapter.dora": True}, "cpu", "adapter.dora"),
    ],
)
def test_the_machine_stands_in_the_way(changes, machine, where):
    with pytest.raises(AccessError) as caught:
        plan_for(changes, machine)
    assert [problem.where for problem in caught.value.problems] == [where]
    assert plan_for({key: value for key, value in changes.items() if key != where}, machine), "auto must work"


def test_all_problems_at_once():
    changes = {"adapter": None, "model.precision": "fp16", "model.attention": "flash_attention_2", "optim.beta1": 1}
    with pytest.raises(UserError) as caught:
        plan_for(changes, "cpu")
    assert len(caught.value.problems) == 5  # of the recipe: adapter, beta1, fp16; of the machine: FlashAttention, fp16


def test_no_keyword_of_the_plan_can_be_overridden_unless_it_is_free():
    """What advanced.trainer may replace is chosen on purpose."""
    free = {"dataloader_num_workers", "dataloader_pin_memory", "ddp_find_unused_parameters", "logging_first_step"}
    keywords = set(plan_for().trainer)
    for keyword in keywords - free:
        with pytest.raises(UserError, match=keyword):
            plan_for({"advanced.trainer": {keyword: None}})
    assert free <= keywords and not free & set(OWNED_BY_RECIPE)
