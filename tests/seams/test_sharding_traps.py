"""Faults below us that train/sharding.py and train/trainer.py work around: each test fails once upstream is mended."""

from __future__ import annotations

import inspect

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp_utils
from trl import RewardTrainer

from gemma_tune.train.sharding import add_in_fp32


def test_accelerate_shards_on_no_cpu() -> None:
    """Why `shard_on_cpu`: several processes on a CPU are no kind that FSDP is switched on for."""
    until = inspect.getsource(AcceleratorState.__init__).partition("ACCELERATE_USE_FSDP")[0]
    kinds = until[until.rindex("elif self.distributed_type in [") :]
    assert "MULTI_GPU" in kinds and "MULTI_CPU" not in kinds


def test_accelerate_adds_gradients_in_bf16() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.reduce_dtype is torch.bfloat16
    add_in_fp32(plugin)
    assert plugin.mixed_precision_policy.reduce_dtype is torch.float32
    assert plugin.mixed_precision_policy.param_dtype is torch.bfloat16


def test_accelerate_sends_no_buffers() -> None:
    """Why `cpu_ram_efficient_loading` is off: a saved buffer, as Gemma 4 has in each layer, is no DTensor."""
    source = inspect.getsource(fsdp_utils.fsdp2_load_full_state_dict)
    assert "sharded_param.device_mesh" in source and "isinstance(sharded_param" not in source


def test_trl_gathers_a_value_for_each_row() -> None:
    """Why `_gathering_any_number`: processes may have different numbers of rows in the last step."""
    assert "self.accelerator.gather(outputs.logits)" in inspect.getsource(RewardTrainer.compute_loss)
