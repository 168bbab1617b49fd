"""Whole and in parts on a GPU: `make test-gpu`. Random Gemmas of real size start, shard and save.

With one GPU there is one process, whose part is the whole: what is shown is that NCCL, FSDP2's units, packed 4-bit
weights and checkpoints in parts work there, and what they cost beside DDP. More GPUs are used where they are.
GEMMA_TUNE_REHEARSE=1 runs the same with two processes of a tiny Gemma on the CPU.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.machine import GIB
from gemma_tune.plan.memory import CUDA_OVERHEAD
from gemma_tune.train.sharded_checkpoint import PARTS
from tests.gpu.test_cuda import CUDA, all_moved, make_real_size, needs_cuda, pytestmark  # noqa: F401
from tests.integration.test_resume import losses
from tests.integration.tiny_runs import document, write_recipe

Tiny = Callable[..., Path]
PROCESSES = torch.cuda.device_count() if CUDA else 2

WAYS: dict[str, tuple[str, ...]] = {
    "DDP": ("distributed.strategy=ddp",),
    "FSDP2": ("distributed.strategy=fsdp2",),
    "FSDP2, QLoRA": ("distributed.strategy=fsdp2", "model.quantization=nf4"),
    "FSDP2, checkpoints in parts": ("distributed.strategy=fsdp2", "distributed.checkpoint=sharded"),
}


def launch(recipe: Path, *words: str) -> dict[str, Any]:
    """Train on every GPU and return run.json's results."""
    output = recipe.parent / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run(
        [*command, "-m", "gemma_tune", "sft", str(recipe), *words],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **({} if CUDA else {"OMP_NUM_THREADS": "1"})},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(document(output / "run.json")["results"])


def check(folder: Path, base: Path, title: str, words: tuple[str, ...], length: int, micro: int) -> None:
    """Train eight steps and look at what was written."""
    recipe = write_recipe(
        folder,
        base,
        model={"quantization": "none", "precision": "auto"},
        data={"max_length": length},
        optim={"learning_rate": 1e-4, "max_steps": 8},
        batch={"size": micro * PROCESSES, "micro": micro},
        checkpoint={"every": 4},
        evaluation={"every": 8, "max_rows": 2},
        samples={"prompts": [], "held_out": 0},
    )
    results = launch(recipe, *words)
    run = folder / "run"
    assert all(math.isfinite(loss) for loss in losses(run).values()) and len(losses(run)) == 8
    assert all_moved(run)
    assert (run / "checkpoint-8" / PARTS).is_dir() == ("distributed.checkpoint=sharded" in words)
    plan = document(run / "plan.json")
    estimate = sum(term["bytes"] for term in plan["memory"])
    used = results["peak_memory"]
    peak = (
        f"{used['cuda'] / GIB:.2f} GiB allocated by the first, {(estimate - CUDA_OVERHEAD) / GIB:.2f} estimated"
        if CUDA
        else f"{used['rss'] / GIB:.2f} GiB of the first, {estimate / GIB:.2f} estimated"
    )
    print(f"\n{title}, {PROCESSES} processes: {results['tokens_per_second']:,.0f} tokens/s, peak {peak}")


@pytest.mark.parametrize("way", WAYS)
def test_a_tiny_gemma(way: str, tiny: Tiny, tmp_path: Path) -> None:
    check(tmp_path, tiny("gemma3_text"), f"tiny, {way}", WAYS[way], 128, 2)


@needs_cuda
@pytest.mark.parametrize("name", ["google/gemma-2b", "google/gemma-7b"])
@pytest.mark.parametrize("way", WAYS)
def test_real_sizes(name: str, way: str, tmp_path: Path) -> None:
    assert name in PUBLISHED
    base = make_real_size(name, tmp_path / "base")
    check(tmp_path, base, f"{name}, {way}", WAYS[way], 1024, 4)
