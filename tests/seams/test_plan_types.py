"""The plan's types work in the installed libraries: 16-bit or quantised base, fp32 adapters, no autocast, on a CPU."""

from __future__ import annotations

import pytest
import torch

from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.machine import GIB, Machine
from gemma_tune.plan.plan import make_plan
from tests.unit.plan.recipes import make_recipe

BF16_CPU = Machine("this kind of CPU", "cpu", 0, 24 * GIB, bf16=True)


@pytest.mark.parametrize(
    ("quantization", "dora"),
    [("nf4", False), ("nf4", True), ("int8", False), ("none", False), ("none", True)],  # int8 with DoRA is refused
)
def test_every_adapter_weight_gets_a_gradient_without_autocast(tiny, quantization, dora):
    name = str(tiny("gemma3_text"))
    family, shape = model_facts(name)
    changes = {"model.name": name, "model.quantization": quantization, "adapter.dora": dora, "data.max_length": 16}
    plan = make_plan(make_recipe(changes), BF16_CPU, shape, family)
    assert not plan.values("trainer")["bf16"]
    model = attach(load_base(plan.values("model"), plan.values("quantization"), family), plan.values("lora"), family)
    model.train()
    ids = torch.arange(200, 232).reshape(2, 16)
    assert model(ids).logits.dtype == torch.bfloat16
    for _ in range(2):  # B starts at zero, so A gets its gradient from the second step on
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
        with torch.no_grad():
            for weight in trained.values():
                weight -= 0.1 * weight.grad.sign()
    assert trained
    for key, weight in trained.items():
        assert weight.dtype == torch.float32, key
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, key
