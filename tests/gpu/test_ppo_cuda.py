"""PPO at real sizes: `make test-gpu`. Random weights; what a step costs, and what a rollout loses to plain `generate`.

GEMMA_TUNE_REHEARSE=1 runs the same at a tiny size on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.cli import main
from gemma_tune.models.load import load_base
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.machine import GIB
from gemma_tune.plan.memory import CUDA_OVERHEAD
from gemma_tune.train.evaluate import lent_settings, pad_left
from gemma_tune.train.ppo.config import PpoConfig
from gemma_tune.train.ppo.rollout import sampling
from tests.gpu.test_cuda import CUDA, DEVICE, make_real_size, needs_cuda, pytestmark  # noqa: F401
from tests.integration.test_ppo_tiny import ppo_recipe
from tests.integration.tiny_runs import document, lines

Tiny = Callable[..., Path]
WARM = 1
"""Steps that are not timed."""


def measure(folder: Path, base: Path, title: str, *, size: int, micro: int, length: int) -> None:
    """Three steps of `gemma-tune ppo` in NF4, and the same responses by plain `generate` on the base alone."""
    recipe = ppo_recipe(
        folder,
        base,
        model={"quantization": "nf4", "precision": "auto"},
        data={"max_length": length + 64},
        ppo={"max_new_tokens": length, "minibatches": 1, "epochs": 1},
        optim={"learning_rate": 1e-5, "max_steps": WARM + 2},
        batch={"size": size, "micro": micro},
        evaluation={"max_rows": 2},
        samples={"held_out": 0, "prompts": []},
    )
    assert main(["ppo", str(recipe)]) == 0
    run = folder / "run"
    steps = [row for row in lines(run / "metrics.jsonl") if "objective/scores" in row][WARM:]
    mean = {key: sum(row[key] for row in steps) / len(steps) for key in steps[0] if isinstance(steps[0][key], float)}
    results = document(run / "run.json")["results"]
    estimate = sum(term["bytes"] for term in document(run / "plan.json")["memory"])
    peak = (
        f"{results['peak_memory']['cuda'] / GIB:.2f} GiB allocated, {(estimate - CUDA_OVERHEAD) / GIB:.2f} estimated"
        if CUDA
        else f"{results['peak_memory']['rss'] / GIB:.2f} GiB of this whole process, {estimate / GIB:.2f} estimated"
    )
    plain = plain_speed(base, document(run / "plan.json"), size, length)
    print(
        f"\n{title}: a step of {size} responses of {mean['rollout/length']:.0f} tokens: rollout "
        f"{mean['time/rollout']:.1f} s, scores and log-probabilities {mean['time/score']:.1f} s, update "
        f"{mean['time/update']:.1f} s; rollout {mean['rollout/tokens_per_second']:,.0f} tokens/s, plain generate "
        f"{plain:,.0f} tokens/s; peak {peak}"
    )
    assert all(row["val/first_ratio_gap"] < 0.1 for row in steps)
    assert mean["rollout/tokens_per_second"] > plain / 4, "the adapter costs a rollout less than this"


def plain_speed(base: Path, plan: dict[str, Any], size: int, length: int) -> float:
    """Tokens a second of `generate` on the quantised base without any adapter, for as many responses."""
    family, _ = model_facts(str(base), None)
    values = {
        section: {key: choice["value"] for key, choice in plan[section].items()}
        for section in ("model", "quantization")
    }
    model = load_base(values["model"], values["quantization"], family)
    settings = sampling(family, PpoConfig(output_dir="unused", use_cpu=not CUDA, bf16=False, max_new_tokens=length))
    ids, mask = (tensor.to(DEVICE) for tensor in pad_left([[family.bos_id, *range(300, 320)]] * size, family.pad_id))
    found = 0.0
    with torch.no_grad(), lent_settings(model, settings):
        for _ in range(2):  # the first one warms up
            torch.manual_seed(0)
            start = time.perf_counter()
            made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            tokens = int((made[:, ids.shape[1] :] != family.pad_id).sum())
            found = tokens / (time.perf_counter() - start)
    return found


@pytest.mark.parametrize("name", ["gemma3_text", "gemma1"])
def test_a_step_of_a_tiny_one(name: str, tiny: Tiny, tmp_path: Path) -> None:
    measure(tmp_path, tiny(name), f"tiny {name}", size=8, micro=4, length=16)


@needs_cuda
@pytest.mark.parametrize(("name", "size", "micro"), [("google/gemma-2b", 32, 8), ("google/gemma-7b", 16, 4)])
def test_a_step_at_256_tokens(
    name: str, size: int, micro: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = make_real_size(name, tmp_path_factory.mktemp("real"))
    measure(tmp_path, base, name, size=size, micro=micro, length=256)
