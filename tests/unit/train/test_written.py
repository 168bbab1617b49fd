"""An adapter that was saved is looked at; a model that is said to be in parts, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import TrainingError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach
from gemma_tune.train.sharding import check_sharded
from gemma_tune.train.weights import ADAPTER_FILE, check_written, load_weights, write_weights

LORA = {
    "r": 2,
    "lora_alpha": 4,
    "target_modules": FAMILIES["gemma3_text"].lora_targets["mlp"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def adapted(tiny: Callable[..., Path]) -> Any:
    family = FAMILIES["gemma3_text"]
    model = attach(load_base({"name": str(tiny("gemma3_text")), "dtype": "float32"}, {}, family), LORA, family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    return model


@pytest.fixture
def written(adapted: Any, tmp_path: Path) -> Path:
    write_weights(adapted, tmp_path)
    return tmp_path


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / ADAPTER_FILE)
    how(state)
    save_file(state, folder / ADAPTER_FILE, metadata={"format": "pt"})


def test_what_was_written_is_accepted_and_read(adapted: Any, written: Path) -> None:
    check_written(adapted, written, moved=True)
    load_weights(adapted, written)


def _cut(state: dict[str, torch.Tensor]) -> None:
    name = next(iter(state))
    state[name] = state[name][:1].clone()


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (lambda state: state.clear(), "has no tensors"),  # what FSDP's own activation checkpointing leaves
        (lambda state: state.pop(next(iter(state))), "1 tensors of the saved adapter"),
        (lambda state: state.update(more=torch.ones(1)), "more"),
        (_cut, "not those of the model"),  # the first process's part alone (accelerate#4206)
        (lambda state: state.update({next(iter(state)): torch.full((2, 2), torch.nan)}), "is not finite"),
        (lambda state: [tensor.zero_() for name, tensor in state.items() if "lora_B" in name], "every B"),
    ],
)
def test_what_a_save_can_lose_is_noticed(adapted: Any, written: Path, how: Callable[..., Any], text: str) -> None:
    change(written, how)
    with pytest.raises(TrainingError, match=text):
        check_written(adapted, written, moved=True)


def test_before_the_first_step_every_b_may_be_zero(adapted: Any, written: Path) -> None:
    change(written, lambda state: [tensor.zero_() for name, tensor in state.items() if "lora_B" in name])
    check_written(adapted, written, moved=False)


def test_weights_of_another_model_are_refused(adapted: Any, written: Path) -> None:
    change(written, lambda state: state.pop(next(iter(state))))
    with pytest.raises(TrainingError, match="do not fit"):
        load_weights(adapted, written)


def test_a_model_that_every_process_holds_whole_is_not_in_parts(adapted: Any) -> None:
    with pytest.raises(TrainingError, match=r"was not sharded: .* parameters are whole"):
        check_sharded(adapted, layers=2, shards=2)
