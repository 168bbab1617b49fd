"""A checkpoint in parts: each process writes what it holds, and any number of processes reads it (torch DCP).

    checkpoint-40/parts/            torch.distributed.checkpoint: `weights.<name>`, `optimizer.<number>.<key>`
    checkpoint-40/optimizer.pt      what of the optimizer's state is no tensor of a parameter's shape

For weights and optimizer states that one process has no room for. The folder must be one that all processes see.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gemma_tune.errors import TrainingError, UserError

PARTS = "parts"
_WEIGHTS, _OPTIMIZER = "weights.", "optimizer."


def has_parts(folder: Path) -> bool:
    return (folder / PARTS).is_dir()


def write_parts(weights: Mapping[str, torch.Tensor], optimizer: Any, folder: Path) -> dict[str, Any]:
    """Write tensors in parts; all processes must call this together.

    Args:
        weights: name -> tensor, sharded or whole.
        optimizer: whose state is written.
        folder: of the checkpoint.

    Returns:
        The rest of the optimizer's state, for one process to write.
    """
    state = optimizer.state_dict()
    large, rest = _split(optimizer, state["state"])
    dcp.save(_named(weights, large), checkpoint_id=str(folder / PARTS))
    return {"state": rest, "param_groups": state["param_groups"]}


def _split(optimizer: Any, state: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """(`<number>.<key>` -> tensors of their parameter's shape, everything else)."""
    shapes = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    large: dict[str, Any] = {}
    rest: dict[int, dict[str, Any]] = {}
    for index, entry in state.items():
        rest[index] = {}
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and tuple(value.shape) == shapes[index]:
                large[f"{index}.{key}"] = value
            else:
                rest[index][key] = value
    return large, rest


def _named(weights: Mapping[str, torch.Tensor], large: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {_WEIGHTS + name: tensor.detach() for name, tensor in weights.items()}
    return named | {_OPTIMIZER + name: tensor for name, tensor in large.items()}


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    found = dcp.FileSystemReader(str(folder / PARTS)).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def _load(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process alone: as intended
        dcp.load(tensors, checkpoint_id=str(folder / PARTS))


def read_weights(own: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Fill a model's own tensors, whole or in parts of any size.

    Raises:
        TrainingError: the checkpoint has other tensors.
    """
    stored = {
        name.removeprefix(_WEIGHTS): tuple(entry.size)
        for name, entry in _stored(folder).items()
        if name.startswith(_WEIGHTS)
    }
    if stored != {name: tuple(tensor.shape) for name, tensor in own.items()}:
        raise TrainingError(
            "the weights in the checkpoint do not fit this model", where=str(folder), fix="start a new run"
        )
    _load(_named(own, {}), folder)


def read_optimizer(optimizer: Any, rest: Mapping[str, Any], folder: Path) -> None:
    """Fill an optimizer that has made no step yet.

    Args:
        optimizer: over the same parameters, sharded as now.
        rest: what `write_parts` returned.
        folder: of the checkpoint.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    large = {}
    for name, entry in _stored(folder).items():
        if name.startswith(_OPTIMIZER):
            index = int(name.removeprefix(_OPTIMIZER).partition(".")[0])
            large[name] = torch.empty_like(parameters[index].detach(), dtype=entry.properties.dtype)
    _load(large, folder)
    state = {index: dict(entry) for index, entry in rest["state"].items()}
    for name, tensor in large.items():
        number, _, key = name.removeprefix(_OPTIMIZER).partition(".")
        state[int(number)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})


def gather(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint in parts, whole, on the CPU, without a model or other processes.

    Raises:
        UserError: the folder holds no parts.
    """
    if not has_parts(folder):
        raise UserError("it is no checkpoint in parts", where=str(folder), fix="use it as it is")
    named = {
        name: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in _stored(folder).items()
        if name.startswith(_WEIGHTS)
    }
    _load(named, folder)
    return {name.removeprefix(_WEIGHTS): tensor for name, tensor in named.items()}
