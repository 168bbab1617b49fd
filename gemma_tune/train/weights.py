"""The trained weights of a run, into a checkpoint and back: an adapter, a reward model, or the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model, save_file, save_model

from gemma_tune.errors import TrainingError
from gemma_tune.models.reward import RewardModel
from gemma_tune.models.roles import TRAINED
from gemma_tune.plan.starts import REWARD_HEAD

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"


def write_weights(model: Any, folder: Path) -> None:
    """An adapter in PEFT's form, with a reward model's head beside it, or the whole model under its own names.

    A frozen adapter is not written: it is part of what the run began with.
    """
    if isinstance(model, RewardModel):
        write_weights(model.trunk, folder)
        save_file(model.head.state_dict(), str(folder / REWARD_HEAD))
    elif isinstance(model, PeftModel):
        model.save_pretrained(str(folder), selected_adapters=[TRAINED], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        save_model(model, str(folder / MODEL_FILE), metadata={"format": "pt"})
        model.config.save_pretrained(str(folder))


def load_weights(model: Any, folder: Path) -> None:
    """Put the trainable weights of a verified checkpoint into `model`, strictly.

    Raises:
        TrainingError: its tensors are not those of this model.
    """
    if isinstance(model, RewardModel):
        load_weights(model.trunk, folder)
        model.head.load_state_dict(load_file(str(folder / REWARD_HEAD)))
        return
    if not isinstance(model, PeftModel):
        load_model(model, str(folder / MODEL_FILE), strict=True)
        return
    state = load_file(str(folder / ADAPTER_FILE))
    expected = get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
        raise TrainingError(
            "the adapter in the checkpoint does not fit this model", where=str(folder), fix="start a new run"
        )
    set_peft_model_state_dict(model, state, adapter_name=TRAINED)
