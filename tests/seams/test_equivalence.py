"""What must not change the mathematics does not: packing, gradient checkpointing, the cache, text-only loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.gemma.families import FAMILIES, Family, text_only
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach
from tests.tiny import TINY_NAMES

LENGTHS = (23, 40, 7)
"""Documents in a row. Longer than the sliding window of 16, so that both kinds of layers matter."""


def family_of_tiny(name: str) -> Family:
    return FAMILIES["gemma4" if name == "gemma4_moe" else name]


def open_tiny(folder: Path, name: str, **changes: Any) -> Any:
    family = family_of_tiny(name)
    return load_base({"name": str(folder), "dtype": "float32", **changes}, {}, family)


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(500, 900, (1, length), generator=generator) for length in LENGTHS]


def packed(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row, as our collator builds it: positions restart, and there is no attention mask."""
    return {
        "input_ids": torch.cat(rows, dim=1),
        "position_ids": torch.cat([torch.arange(row.shape[1]) for row in rows])[None],
    }


CASES = [(name, kind) for name in TINY_NAMES for kind in ("sdpa", "eager") if kind in family_of_tiny(name).attention]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_logits_equal_unpacked(name: str, attention: str, tiny: Callable[..., Path]) -> None:
    # In fp64, where rounding cannot hide a leak. In fp32 a row alone and the same row in a longer batch already differ
    # by up to 1e-5. Eager attention takes its softmax in fp32 all the same, and experts know no fp64.
    precision = "float32" if name == "gemma4_moe" else "float64"
    model = open_tiny(tiny(name), name, attn_implementation=attention, dtype=precision).train()
    rows = documents()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
        together = model(**packed(rows)).logits
    difference = float((together - alone).abs().max())
    assert difference < (1e-10 if precision == "float64" and attention == "sdpa" else 1e-5)
    assert alone.std() > 0.5, "logits must differ between tokens, or the comparison says nothing"


def test_an_all_ones_mask_would_contaminate(tiny: Callable[..., Path]) -> None:
    """Why the collator leaves the mask out: transformers looks for packing only where there is none."""
    model = open_tiny(tiny("gemma3_text"), "gemma3_text")
    rows = documents()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row).logits for row in rows], dim=1)
        batch = packed(rows)
        masked = model(**batch, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (masked - alone).abs().max() > 0.1


def adapter_gradients(
    folder: Path, name: str, checkpointing: dict[str, Any] | None, *, remedy: bool = True
) -> dict[str, torch.Tensor]:
    family = family_of_tiny(name)
    torch.manual_seed(0)
    base = open_tiny(folder, name)
    if not remedy:
        del base._set_gradient_checkpointing
    model = attach(
        base, {"target_modules": family.lora_targets["all-linear"], "r": 4, "task_type": "CAUSAL_LM"}, family
    )
    for parameter_name, parameter in model.named_parameters():
        # B starts at zero, where A has no gradient.
        if ".lora_B." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    model.train()
    batch = packed(documents())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {
        key: value.grad for key, value in model.named_parameters() if value.requires_grad and value.grad is not None
    }


def relative_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor."""
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).norm() / right[key].norm()) for key in right)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_gradients_with_checkpointing_equal_those_without(name: str, tiny: Callable[..., Path]) -> None:
    plain = adapter_gradients(tiny(name), name, None)
    assert all(bool(gradient.any()) for gradient in plain.values())
    assert relative_difference(adapter_gradients(tiny(name), name, {"use_reentrant": False}), plain) < 1e-5


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_cache_does_not_change_logits(name: str, tiny: Callable[..., Path]) -> None:
    """Gemma 4 returned garbage without a cache until transformers 5.5.2 (transformers#45242)."""
    model = open_tiny(tiny(name), name)
    row = documents()[1]
    with torch.no_grad():
        without, cached = (model(input_ids=row, use_cache=use).logits for use in (False, True))
    assert (without - cached).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_moe", "gemma4_unified"])
def test_text_only_loading_gives_the_same_logits(name: str, tiny: Callable[..., Path]) -> None:
    whole = open_tiny(tiny(name), name)
    family = text_only(family_of_tiny(name))
    text = load_base({"name": str(tiny(name)), "dtype": "float32", "text_only": True}, {}, family)
    assert type(text) is not type(whole)
    assert text.num_parameters() < whole.num_parameters()
    row = documents()[0]
    with torch.no_grad():
        assert torch.equal(text(input_ids=row).logits, whole(input_ids=row).logits)


def test_text_only_loading_of_the_published_3n_layout(tiny: Callable[..., Path]) -> None:
    published = load_base(
        {"name": str(tiny("gemma3n")), "dtype": "float32", "text_only": True}, {}, FAMILIES["gemma3n_text"]
    )
    plain = open_tiny(tiny("gemma3n_text"), "gemma3n_text")
    row = documents()[0]
    with torch.no_grad():
        assert torch.equal(published(input_ids=row).logits, plain(input_ids=row).logits)
