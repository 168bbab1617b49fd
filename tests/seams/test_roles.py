"""Moving the pointer of the active adapter does what PEFT's public switches do to the output, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach, begin_with, save_adapter
from gemma_tune.models.roles import REFERENCE, TRAINED, reference_adapters, speak_as, speaking_as
from tests.seams.test_trl_seams import family_of_tiny

Tiny = Callable[..., Path]
IDS = torch.tensor([[2, 105, 240, 300, 310, 107, 320, 106]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


def base_of(tiny: Tiny, name: str, quantization: dict[str, Any] | None = None) -> Any:
    family = family_of_tiny(name)
    model = {"name": str(tiny(name)), "dtype": "float32", "attn_implementation": family.attention[0]}
    return load_base(model, quantization or {}, family)


def lora_of(name: str, r: int = 4) -> dict[str, Any]:
    targets = family_of_tiny(name).lora_targets["all-linear"]
    return {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", "target_modules": targets}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def randomised(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(params=["gemma3_text", "gemma4"])
def two(request: Any, tiny: Tiny, tmp_path: Path) -> tuple[Any, str]:
    """A model with a trained and a frozen adapter of different weights."""
    name = request.param
    first = randomised(attach(base_of(tiny, name), lora_of(name), family_of_tiny(name)), 1)
    save_adapter(first, tmp_path / "adapter", family_of_tiny(name))
    both = begin_with(
        base_of(tiny, name), tmp_path / "adapter", {}, family_of_tiny(name), mode="continue", keep_frozen=True
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in both.named_parameters():
            if f"lora_B.{TRAINED}" in key:
                parameter.normal_(std=0.1)
    return both, name


def test_the_pointer_equals_the_public_switches_bit_for_bit(two: tuple[Any, str]) -> None:
    model, _ = two
    mine = {}
    for role, adapters in {"base": [], "policy": [TRAINED], "reference": [REFERENCE]}.items():
        with speaking_as(model, adapters):
            mine[role] = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), mine["base"])
    for role, adapter in {"policy": TRAINED, "reference": REFERENCE}.items():
        model.set_adapter(adapter)
        assert torch.equal(logits(model), mine[role])
    assert not torch.equal(mine["policy"], mine["reference"]) and not torch.equal(mine["policy"], mine["base"])


def test_nothing_but_the_pointer_moves(two: tuple[Any, str]) -> None:
    model, _ = two
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(f".{TRAINED}." in name for name in trainable)
    before = logits(model)
    for adapters in ([], [REFERENCE], [REFERENCE, TRAINED]):
        with speaking_as(model, adapters):
            logits(model)
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
        assert torch.equal(logits(model), before)
    with pytest.raises(ZeroDivisionError), speaking_as(model, []):
        _ = 1 / 0
    assert torch.equal(logits(model), before), "also after an error"


def test_peft_itself_thaws_and_freezes(two: tuple[Any, str]) -> None:
    """Why the public switches are not used: fails on the day that PEFT leaves `requires_grad` alone."""
    model, _ = two
    model.set_adapter(REFERENCE)
    thawed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert thawed and all(f".{REFERENCE}." in name for name in thawed)


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["fp32", "nf4"])
def test_the_reference_with_the_adapter_off_is_a_base_that_was_loaded_alone(
    tiny: Tiny, quantization: dict[str, Any]
) -> None:
    name = "gemma3_text"
    model = randomised(attach(base_of(tiny, name, quantization), lora_of(name), family_of_tiny(name)), 3)
    assert reference_adapters(model) == []
    with speaking_as(model, reference_adapters(model)):
        found = logits(model)
    expected = logits(base_of(tiny, name, quantization))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gemma3_text", "gemma4"])
def test_a_stack_is_saved_as_one_adapter_that_says_the_same(tiny: Tiny, tmp_path: Path, name: str) -> None:
    from gemma_tune.models.lora import open_adapter

    family = family_of_tiny(name)
    first = randomised(attach(base_of(tiny, name), lora_of(name), family), 4)
    save_adapter(first, tmp_path / "first", family)
    alone = logits(first)
    stack = begin_with(base_of(tiny, name), tmp_path / "first", lora_of(name, 2), family, mode="stack")
    torch.testing.assert_close(logits(stack), alone, atol=1e-5, rtol=0)
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in stack.named_parameters():
            if f"lora_B.{TRAINED}" in key:
                parameter.normal_(std=0.1)
    together = logits(stack)
    assert (together - alone).abs().max() > 1e-2
    save_adapter(stack, tmp_path / "second", family)
    assert torch.equal(logits(stack), together), "saving leaves the model as it was"
    opened = open_adapter(base_of(tiny, name), tmp_path / "second")
    assert opened.peft_config["default"].r == 6 and not list((tmp_path / "second").glob("*/"))
    torch.testing.assert_close(logits(opened), together, atol=1e-4, rtol=0)


def test_a_stack_on_an_adapter_whose_targets_are_a_list(tiny: Tiny, tmp_path: Path) -> None:
    """Adapters of others often name their modules; PEFT adds up patterns, or lists, but not one to the other."""
    from gemma_tune.models.lora import open_adapter

    name, family = "gemma3_text", family_of_tiny("gemma3_text")
    lora = lora_of(name) | {"target_modules": ["q_proj", "up_proj"]}
    save_adapter(randomised(attach(base_of(tiny, name), lora, family), 6), tmp_path / "first", family)
    stack = begin_with(base_of(tiny, name), tmp_path / "first", lora_of(name, 2), family, mode="stack")
    together = logits(randomised(stack, 7))
    save_adapter(stack, tmp_path / "second", family)
    opened = open_adapter(base_of(tiny, name), tmp_path / "second")
    torch.testing.assert_close(logits(opened), together, atol=1e-4, rtol=0)


def test_speak_as_stays(two: tuple[Any, str]) -> None:
    model, _ = two
    speak_as(model, [])
    plain = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
