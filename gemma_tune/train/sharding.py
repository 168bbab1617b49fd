"""FSDP2: a model of which every process holds a part, made sure of, written whole and taken up again.

accelerate shards; this module looks whether it did, and turns parts into the plain tensors that a checkpoint and an
adapter folder hold, so that a run may go on with another number of processes, sharded or not.

Shapes: a sharded parameter is a `DTensor`, whose `.shape` is that of the whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from gemma_tune.errors import TrainingError, UserError

SHARDED = ("fsdp2", "hsdp")
"""Strategies under which a process holds a part of the model."""


def take_over(distributed: Mapping[str, Any], autocast: str | None) -> None:
    """Let the plan decide what the launcher's environment would decide behind it.

    accelerate and transformers read these variables wherever they find them.

    Args:
        distributed: `plan.values("session")["distributed"]`.
        autocast: `bf16`, `fp16` or None, of the plan.
    """
    if distributed["strategy"] in SHARDED:
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ["FSDP_VERSION"] = "2"
        # accelerate (1.15, state.py) gives CPU tensors a backend beside NCCL only where the environment says so.
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(bool(distributed["offload"])).lower()
    else:
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    os.environ["ACCELERATE_MIXED_PRECISION"] = autocast or "no"


def shard_on_cpu(config: TrainingArguments) -> None:
    """Let accelerate shard on a CPU.

    `AcceleratorState` (accelerate 1.15, state.py) turns FSDP on for kinds of GPU alone; several processes on a CPU
    would train with DDP, or each for itself, without a word. torch shards on a CPU as on a GPU.
    """
    assert config.device.type == "cpu"  # makes the process group: gloo
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def mesh_of(distributed: Mapping[str, Any]) -> ParallelismConfig | None:
    """What accelerate is told about groups of processes that each hold the whole model (HSDP)."""
    if distributed["strategy"] != "hsdp":
        return None
    return ParallelismConfig(dp_replicate_size=distributed["replicas"], dp_shard_size=distributed["shards"])


def refuse_parts(kind: DistributedType) -> None:
    """For what needs the whole model on every process.

    Raises:
        UserError: accelerate shards it.
    """
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            "all roles of PPO share one base, which every process must hold whole",
            where="distributed.strategy",
            fix="use distributed.strategy: ddp, and unset ACCELERATE_USE_FSDP",
        )


def add_in_fp32(plugin: FullyShardedDataParallelPlugin) -> None:
    """Let FSDP2 add up gradients in fp32 under autocast, as DDP does.

    accelerate's policy for bf16 (1.15, dataclasses.py, `set_mixed_precision`) adds them in bf16, where each process
    rounds away what is below 1/256 of the sum, and casts what the model returns.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=policy.cast_forward_inputs
        )


def is_sharded(model: Any) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def check_sharded(model: Any, layers: int, shards: int) -> None:
    """Make sure that the model is in parts, and each decoder layer a part of its own.

    Args:
        model: as accelerate prepared it.
        layers: decoder layers that it has.
        shards: processes that share one copy.

    Raises:
        TrainingError: parameters are held whole by every process, which is DDP under another name.
    """
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if whole or units < layers:
        raise TrainingError(
            f"the model was not sharded: {len(whole)} parameters are whole on every process, e.g. "
            f"{whole[0] if whole else 'none'}, and {units} modules of at least {layers} are units of FSDP",
            where="distributed.strategy",
            fix="report it: accelerate or the quantisation does not shard this model; use distributed.strategy: ddp",
        )
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    every = sum(parameter.numel() for parameter in model.parameters())
    if every and held > every / shards * 1.5 + 1e6:  # a part is rounded up to whole rows
        raise TrainingError(
            f"this process holds {held:,} of {every:,} parameters, though {shards} share them",
            where="distributed.strategy",
            fix="report it: the mesh of accelerate is not the one that was asked for",
        )


# --- parts -> whole -------------------------------------------------------------------------------------------------


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is in parts, on every process. All must call this together, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same names, whole, on the CPU. All processes must call this together."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in state.items()}


def part_of(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What of a whole tensor belongs where `target` is: this process's part, if `target` is in parts."""
    if not isinstance(target, DTensor):
        return value
    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def settle(model: Any) -> None:
    """Drop what is gathered, on all processes together.

    `state_dict()` does so by a hook. Where one process alone asks for it (the one that writes), the next forward pass
    gathers on that process what the others still have, and the collective operations of the two no longer pair.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def make_whole(model: Any, *, writes: bool) -> None:
    """Put the whole of each parameter that is written into the model, which nobody runs from here on.

    Only the process that writes keeps them, on the CPU. Of a model with an adapter the base stays in parts.

    Args:
        model: which no process runs any more.
        writes: whether this process writes it.
    """
    settle(model)
    made: dict[int, torch.nn.Parameter] = {}  # a tied head stays tied
    for module, key, parameter in list(_wanted(model)):
        if id(parameter) not in made:
            value = whole(parameter).cpu()
            made[id(parameter)] = torch.nn.Parameter(
                value if writes else value.new_empty(0), requires_grad=parameter.requires_grad
            )
        module._parameters[key] = made[id(parameter)]


def _wanted(model: Any) -> Iterator[tuple[torch.nn.Module, str, DTensor]]:
    """(module, name in it, parameter) of what is written: all of a whole model, its frozen towers too."""
    adapted = any("lora_" in name for name, _ in model.named_parameters())
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            written = not adapted or parameter is None or parameter.requires_grad or "lora_" in f"{name}.{key}"
            if isinstance(parameter, DTensor) and written:
                yield module, key, parameter


# --- optimizer ------------------------------------------------------------------------------------------------------


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors: what one process alone would have. All call this together."""
    state = optimizer.state_dict()
    values = {
        index: {key: whole(value).cpu() if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {"state": values, "param_groups": state["param_groups"]}


def load_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Take up a whole state: each tensor of a parameter's shape is cut as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = {}
    for index, entry in state["state"].items():
        target = parameters[index]
        values[index] = {
            key: part_of(target, value) if isinstance(value, torch.Tensor) and value.shape == target.shape else value
            for key, value in entry.items()
        }
    optimizer.load_state_dict({"state": values, "param_groups": state["param_groups"]})
