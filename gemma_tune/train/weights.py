"""The trained weights of a run, into a checkpoint and back: an adapter, a reward model, or the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_tune.errors import TrainingError
from gemma_tune.models.lora import CONFIG as ADAPTER_CONFIG
from gemma_tune.models.lora import inspect_adapter
from gemma_tune.models.reward import RewardModel
from gemma_tune.models.roles import TRAINED, belongs
from gemma_tune.plan.starts import REWARD_HEAD
from gemma_tune.train.sharded_checkpoint import gather, has_parts, read_weights
from gemma_tune.train.sharding import is_sharded, part_of, whole_state

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FILE = "model.safetensors"
_HEAD = "head."
"""Before the names of a reward model's head, in parts."""


def write_weights(model: Any, folder: Path, *, writes: bool = True) -> None:
    """An adapter in PEFT's form, with a reward model's head beside it, or the whole model under its own names.

    A frozen adapter is not written: it is part of what the run began with. Of a sharded model all processes must call
    this together, and the one that writes has the whole.

    Args:
        model: the trained model.
        folder: where the files go.
        writes: whether this process writes them.
    """
    if isinstance(model, RewardModel):
        write_weights(model.trunk, folder, writes=writes)
        head = whole_state(model.head.state_dict())
        if writes:
            save_file(head, str(folder / REWARD_HEAD))
    elif isinstance(model, PeftModel):
        named = {name: parameter for name, parameter in model.named_parameters() if belongs(name, TRAINED)}
        state = whole_state(named) if is_sharded(model) else None
        if writes:
            model.save_pretrained(
                str(folder), selected_adapters=[TRAINED], save_embedding_layers=False, state_dict=state
            )
            (folder / "README.md").unlink(missing_ok=True)
    else:
        state = whole_state(own_weights(model))
        if writes:
            save_file(state, str(folder / MODEL_FILE), metadata={"format": "pt"})
            model.config.save_pretrained(str(folder))


def check_written(model: Any, folder: Path, *, moved: bool, stacked: bool = False) -> None:
    """Read an adapter again, as whoever loads it will, and compare it with what it is to be.

    A sharded save that gathers nothing writes an empty file and ends well (peft 0.21 with FSDP's own activation
    checkpointing; accelerate#4206, trl#4416).

    Args:
        model: whose adapter was written.
        folder: an adapter in PEFT's form.
        stacked: whether two adapters were written as one, whose ranks are added.
        moved: whether the optimizer has made steps: some B must then have left zero.

    Raises:
        TrainingError: tensors are missing, left over, of another shape, not finite, or untrained.
    """
    state = load_file(str(folder / ADAPTER_FILE))
    report = inspect_adapter(state, str(folder))
    expected = own_weights(model.trunk if isinstance(model, RewardModel) else model)
    odd = sorted(state.keys() ^ expected.keys())
    if not odd and not stacked:
        odd = [name for name, tensor in state.items() if tensor.shape != expected[name].shape]
    if odd:
        raise TrainingError(
            f"{len(odd)} tensors of the saved adapter are not those of the model, e.g. {odd[0]}",
            where=str(folder),
            fix="report it: this is a bug, or PEFT has changed; the last checkpoint is intact",
        )
    if moved and report.matrices and not report.moved:
        raise TrainingError(
            "every B of the saved adapter is zero: nothing was trained",
            where=str(folder),
            fix="raise optim.learning_rate; if it is not tiny, report it",
        )


def write_config(model: Any, folder: Path) -> None:
    """What says how weights that were gathered later are to be read."""
    trunk = model.trunk if isinstance(model, RewardModel) else model
    if not isinstance(trunk, PeftModel):
        trunk.config.save_pretrained(str(folder))
        return
    config = trunk.peft_config[TRAINED]
    trained, config.inference_mode = config.inference_mode, True  # as PEFT saves it
    config.save_pretrained(str(folder))
    config.inference_mode = trained


def write_gathered(checkpoint: Path, folder: Path) -> int:
    """A checkpoint in parts -> the files that `write_weights` would have written. Returns how many tensors.

    Args:
        checkpoint: verified, in parts.
        folder: to write into.
    """
    state = gather(checkpoint)
    head = {name.removeprefix(_HEAD): tensor for name, tensor in state.items() if name.startswith(_HEAD)}
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith(_HEAD)}
    adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    config = ADAPTER_CONFIG if adapter else "config.json"
    save_file(trunk, str(folder / (ADAPTER_FILE if adapter else MODEL_FILE)), metadata={"format": "pt"})
    if head:
        save_file(head, str(folder / REWARD_HEAD))
    (folder / config).write_bytes((checkpoint / config).read_bytes())
    return len(state)


def load_weights(model: Any, folder: Path) -> None:
    """Put the trainable weights of a verified checkpoint into `model`, strictly. A sharded model takes its part.

    Raises:
        TrainingError: its tensors are not those of this model.
    """
    if has_parts(folder):
        read_weights(own_weights(model), folder)
    elif isinstance(model, RewardModel):
        load_weights(model.trunk, folder)
        _fill(model.head.state_dict(), load_file(str(folder / REWARD_HEAD)), folder)
    else:
        file = ADAPTER_FILE if isinstance(model, PeftModel) else MODEL_FILE
        _fill(own_weights(model), load_file(str(folder / file)), folder)


def own_weights(model: Any) -> dict[str, Tensor]:
    """The model's own tensors that a checkpoint holds, under the names that they have there.

    An adapter's, as PEFT names them, with a reward model's `head.`; or parameters and saved buffers of a whole model, a
    tied one once.
    """
    if isinstance(model, RewardModel):
        head = {_HEAD + name: tensor for name, tensor in model.head.state_dict().items()}
        return own_weights(model.trunk) | head
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
    saved = model.state_dict()
    return {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())  # which leave out repetitions
        if name in saved
    }


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> None:
    """Copy `state` into the tensors of `own`, which are a model's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        raise TrainingError(
            "the weights in the checkpoint do not fit this model", where=str(folder), fix="start a new run"
        )
    for name, tensor in own.items():
        tensor.copy_(part_of(tensor, state[name]))
