"""What only a GPU can show: `make test-gpu` on a CUDA machine. Every Gemma here is random, so no weights are needed.

Each run prints its speed, and its peak memory beside the plan's estimate. GEMMA_TUNE_REHEARSE=1 runs the same tests on
a CPU with the real size left out, to see that they work before a GPU is at hand.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.cli import main
from gemma_tune.data.collate import Collator
from gemma_tune.gemma.shape import count
from gemma_tune.gemma.sizes import PUBLISHED, shape_of
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import inspect_adapter
from gemma_tune.plan.machine import GIB
from gemma_tune.plan.memory import CUDA_OVERHEAD
from gemma_tune.train.evaluate import held_out_loss
from tests.integration.test_resume import LIGHT, losses, stop_at
from tests.integration.tiny_runs import document, write_recipe, write_rows
from tests.meta_models import text_config
from tests.seams.test_equivalence import CASES, documents, family_of_tiny, packed
from tests.seams.test_traps import WIDE, gradients_before_and_after_eval, nf4_with_adapter
from tests.seams.test_trl_seams import some_rows
from tests.tiny import TINY_NAMES, write_tokenizer

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and os.environ.get("GEMMA_TUNE_REHEARSE") != "1",
        reason="needs a CUDA device; GEMMA_TUNE_REHEARSE=1 rehearses on the CPU",
    ),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
Tiny = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_peak() -> Iterator[None]:
    """Each test's peak is its own."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


def train(folder: Path, base: Path, title: str, **changes: Any) -> dict[str, Any]:
    """Run a recipe as a user would, print what it cost, and return `results` of run.json."""
    changes["model"] = {"quantization": "nf4", "precision": "auto", **changes.get("model", {})}
    assert main(["sft", str(write_recipe(folder, base, **changes))]) == 0
    results = document(folder / "run" / "run.json")["results"]
    estimate = sum(term["bytes"] for term in document(folder / "run" / "plan.json")["memory"])
    used = results["peak_memory"]
    if CUDA:  # what torch allocates is the estimate without the context
        peak = f"{used['cuda'] / GIB:.2f} GiB allocated, {(estimate - CUDA_OVERHEAD) / GIB:.2f} GiB estimated"
    else:
        peak = f"{used['rss'] / GIB:.2f} GiB of this whole process, {estimate / GIB:.2f} GiB estimated"
    print(f"\n{title}: {results['tokens_per_second']:,.0f} tokens/s, peak {peak}")
    assert all(math.isfinite(loss) for loss in losses(folder / "run").values())
    return dict(results)


def all_moved(run: Path) -> bool:
    """Whether a gradient reached every matrix of the adapter."""
    report = inspect_adapter(load_file(run / "adapter" / "adapter_model.safetensors"))
    return report.moved == report.matrices > 0


# --- training


@pytest.mark.parametrize("name", TINY_NAMES)
def test_qlora_of_every_generation_on_packed_rows(name: str, tiny: Tiny, tmp_path: Path) -> None:
    results = train(tmp_path, tiny(name), name)
    assert all_moved(tmp_path / "run")
    assert results["tuned"]["loss"] < results["base"]["loss"]


KINDS: dict[str, dict[str, Any]] = {
    "NF4, recomputed": {"memory": {"gradient_checkpointing": True}},
    "NF4, paged 8-bit AdamW": {"optim": {"optimizer": "paged_adamw_8bit"}},
    "int8": {"model": {"quantization": "int8"}},
    "bf16": {"model": {"quantization": "none"}},
    "all weights, 8-bit AdamW": {
        "model": {"quantization": "none"},
        "adapter": None,
        "optim": {"learning_rate": 1e-3, "optimizer": "adamw_8bit"},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_runs_train_and_resume(
    kind: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {key: dict(value) for key, value in LIGHT.items()} | {"adapter": {"dropout": 0.1}}
    for section, values in KINDS[kind].items():
        changes[section] = None if values is None else {**changes.get(section, {}), **values}
    straight = tmp_path / "straight"
    straight.mkdir()
    results = train(straight, tiny("gemma3_text"), kind, **changes)
    assert results["tuned"]["loss"] < results["base"]["loss"]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert main(["sft", str(straight / "recipe.yaml"), f"output={tmp_path / 'run'}"]) == 75
    assert main(["sft", str(straight / "recipe.yaml"), f"output={tmp_path / 'run'}", "--resume", "must"]) == 0
    # Some CUDA kernels add in any order, so not to the bit.
    assert losses(tmp_path / "run") == pytest.approx(losses(straight / "run"), rel=1e-3)


@needs_cuda
def test_fp16_scales_the_loss_and_keeps_the_adapter_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    """What a T4 does with Gemma 1."""
    results = train(tmp_path, tiny("gemma1"), "gemma1 in fp16", model={"precision": "fp16"})
    assert document(tmp_path / "run" / "plan.json")["trainer"]["fp16"]["value"] is True
    assert (tmp_path / "run" / "checkpoint-8" / "scaler.pt").is_file()
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert results["tuned"]["loss"] < results["base"]["loss"]


def make_real_size(name: str, folder: Path) -> Path:
    """A random model of a published size, in bf16, with the small tokenizer."""
    from transformers import AutoModelForCausalLM

    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(text_config(PUBLISHED[name]), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return write_tokenizer("gemma3_text", folder)


def test_the_real_size_has_the_published_parameters() -> None:
    published = PUBLISHED["google/gemma-3-1b-it"]
    assert count(shape_of(text_config(published).to_dict())) == count(published)


@needs_cuda
@pytest.mark.parametrize("recomputed", [False, True])
def test_speed_and_memory_of_a_1b_at_2048_tokens(
    recomputed: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not recomputed and torch.cuda.get_device_properties(0).total_memory < 20 * GIB:
        pytest.skip("needs a GPU with 20 GiB")
    base = make_real_size("google/gemma-3-1b-it", tmp_path_factory.mktemp("1b"))
    results = train(
        tmp_path,
        base,
        f"Gemma 3 1B, 2 x 2,048 tokens a pass, {'' if recomputed else 'not '}recomputed",
        adapter={"r": 16, "alpha": 32, "dropout": 0.05},
        data={"sources": [{"name": str(write_rows(tmp_path / "many.jsonl", 6000))}], "max_length": 2048},
        optim={"learning_rate": 1e-3, "max_steps": 6},
        batch={"size": 8, "micro": 2},
        memory={"gradient_checkpointing": recomputed},
        evaluation={"every": 3, "max_rows": 8},
    )
    assert all_moved(tmp_path / "run")
    estimate = sum(term["bytes"] for term in document(tmp_path / "run" / "plan.json")["memory"]) - CUDA_OVERHEAD
    assert 0.7 < results["peak_memory"]["cuda"] / estimate < 1.1


# --- mathematics


def test_gradients_survive_an_evaluation_pass(tiny: Tiny) -> None:
    row = torch.randint(500, 900, (1, 24), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert gradients_before_and_after_eval(nf4_with_adapter(tiny("gemma3_text", **WIDE)), row) > 0.999


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_logits_equal_unpacked(name: str, attention: str, precision: str, tiny: Tiny) -> None:
    if name == "gemma4_moe" and precision == "bfloat16":
        pytest.skip("rounding changes which experts a token visits")
    family = family_of_tiny(name)
    model = load_base({"name": str(tiny(name)), "dtype": precision, "attn_implementation": attention}, {}, family)
    rows = [row.to(DEVICE) for row in documents()]
    with torch.no_grad():
        alone = torch.cat([model.train()(input_ids=row).logits for row in rows], dim=1).float()
        together = model(**{key: value.to(DEVICE) for key, value in packed(rows).items()}).logits.float()
    difference = float((together - alone).norm() / alone.norm())
    print(f"\n{name}, {attention}, {precision}: {difference:.1e}")
    assert difference < (1e-4 if precision == "float32" else 0.05)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_the_fused_head_gives_the_models_own_loss(name: str, tiny: Tiny) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = load_base({"name": str(tiny(name)), "dtype": "float32"}, {}, family_of_tiny(name))
    rows = some_rows()
    total, tokens = 0.0, 0
    for row in rows:
        ids, labels = (torch.tensor([row[key]], device=DEVICE) for key in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += int(labels[0, 1:].ne(-100).sum())
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    found = held_out_loss(model, rows, Collator(0), batch_size=2)
    assert found is not None and found.tokens == tokens
    assert found.loss == pytest.approx(total / tokens, rel=1e-4)
