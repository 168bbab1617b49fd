"""fp16_rescaled on a GPU: what it costs beside bf16, and that it agrees with fp32 there. `make test-gpu`.

Random weights of published sizes. GEMMA_TUNE_REHEARSE=1 runs the same on a CPU, with tiny Gemmas.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.gemma.families import FAMILIES, RESIDUAL_EXPONENT
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach
from gemma_tune.plan.machine import GIB
from gemma_tune.train.loss_scaling import LossScaler
from tests.gpu.test_cuda import CUDA, DEVICE, make_real_size, pytestmark  # noqa: F401 - the same marks
from tests.gpu.test_cuda import train as train_recipe

Tiny = Callable[..., Path]
SIZES = {
    "gemma2": ("google/gemma-2-2b", "gemma2"),
    "gemma3_text": ("google/gemma-3-1b-it", "gemma3_text"),
    "gemma1": ("google/gemma-2b", "gemma1"),
}
"""Family -> the size that is measured on a GPU, the tiny one that stands for it on a CPU."""
ROWS, LENGTH, STEPS = (2, 1024, 8) if CUDA else (2, 32, 3)


def base_of(family: str, tiny: Tiny, folder: Path) -> Path:
    size, small = SIZES[family]
    return make_real_size(size, folder) if CUDA else tiny(small)


def nf4(dtype: str) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def cost(base: Path, family_name: str, dtype: str, exponent: int) -> tuple[float, float, list[float]]:
    """Median seconds of a step, peak GiB allocated (0 on a CPU), and the losses: QLoRA on rows of random ids."""
    family = FAMILIES[family_name]
    torch.manual_seed(0)
    model = load_base({"name": str(base), "dtype": dtype, "residual_exponent": exponent}, nf4(dtype), family)
    lora = {"target_modules": family.lora_targets["all-linear"], "r": 16, "task_type": "CAUSAL_LM"}
    model = attach(model, lora, family)
    model.train()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    scaler = LossScaler(DEVICE, enabled=dtype == "float16")
    ids = torch.randint(300, 1000, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    seconds, losses = [], []
    for _ in range(STEPS):
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        losses.append(float(loss.detach()))
    peak = torch.cuda.max_memory_allocated() / GIB if CUDA else 0.0
    return sorted(seconds[1:])[len(seconds[1:]) // 2], peak, losses


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_cost_of_fp16_rescaled_beside_bf16(family: str, tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(family, tiny, tmp_path / "base")
    found = {}
    for name, dtype, exponent in (
        ("bf16", "bfloat16", 0),
        ("fp16_rescaled", "float16", RESIDUAL_EXPONENT),
        ("fp32", "float32", 0),
    ):
        found[name] = cost(base, family, dtype, exponent)
        print(
            f"\n{SIZES[family][0] if CUDA else family}, {ROWS} x {LENGTH} tokens, {name}: "
            f"{found[name][0]:.3f} s a step, peak {found[name][1]:.2f} GiB, loss {found[name][2][-1]:.3f}"
        )
    assert found["fp16_rescaled"][2] == pytest.approx(found["fp32"][2], rel=0.02)
    if CUDA:
        assert found["fp16_rescaled"][0] < 1.3 * found["bf16"][0], "two kernels a norm more, in all"
        assert found["fp16_rescaled"][1] < 1.05 * found["bf16"][1] + 0.1


def test_the_cost_of_gemma_2b(tiny: Tiny, tmp_path: Path) -> None:
    """Gemma 1 needs no rescaling: fp16 beside bf16 at the size of the free T4's recipe."""
    base = base_of("gemma1", tiny, tmp_path / "base")
    for dtype in ("bfloat16", "float16"):
        seconds, peak, losses = cost(base, "gemma1", dtype, 0)
        print(f"\nGemma 2B, {ROWS} x {LENGTH} tokens, {dtype}: {seconds:.3f} s a step, peak {peak:.2f} GiB")
        assert all(map(torch.isfinite, map(torch.tensor, losses)))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3"])
def test_a_run_by_name(family: str, tiny: Tiny, tmp_path: Path) -> None:
    results = train_recipe(tmp_path, tiny(family), f"{family} in fp16_rescaled", model={"precision": "fp16_rescaled"})
    assert results["tuned"]["loss"] < results["base"]["loss"]
