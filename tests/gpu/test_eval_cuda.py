"""Speed of lm-eval's tasks at the size of Gemma 2B, random weights, ours beside stock: `make test-gpu`.

GEMMA_TUNE_REHEARSE=1 runs the same on a CPU with a tiny model. Speed is printed; that both answer alike is asserted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'gemma-tune[eval]'")

from lm_eval.models.huggingface import HFLM

from gemma_tune.evaluation.harness_model import GemmaLM
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.machine import GIB
from tests.meta_models import text_config
from tests.tiny import write_tokenizer

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and os.environ.get("GEMMA_TUNE_REHEARSE") != "1",
        reason="needs a CUDA device; GEMMA_TUNE_REHEARSE=1 rehearses on the CPU",
    ),
]
Tiny = Callable[..., Path]

SENTENCE = "The quick brown fox jumps over the lazy dog, and the old ships sleep in the waves. "
ANSWERS = (" The capital of France is Paris.", " Seven minutes.", " A list of numbers.", " Nobody walks there.")
LENGTHS = {"short questions": 2, "five shots": 40}
"""Sentences in a prompt: about 60 tokens, and about 1,100."""


def opened(tiny: Tiny, tmp_path: Path) -> tuple[Any, Any]:
    """A random model of Gemma 2B's size in bf16, or a tiny one in a rehearsal; and a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer("gemma1", tmp_path / "tokenizer"))
    if not CUDA:
        return AutoModelForCausalLM.from_pretrained(tiny("gemma1"), dtype=torch.float32).eval(), tokenizer
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(text_config(PUBLISHED["google/gemma-2b"]), dtype=torch.bfloat16)
    return model.eval(), tokenizer


def questions(sentences: int, items: int) -> list[Any]:
    """Items of four choices each, all different."""
    texts = [f"Question {n}. " + SENTENCE * (sentences + n % 3) + "Answer:" for n in range(items)]
    return [SimpleNamespace(args=(text, answer), task_name=None) for text in texts for answer in ANSWERS]


def timed(lm: Any, asked: list[Any]) -> tuple[list[float], float, float]:
    """(log-likelihoods, seconds, peak memory in GiB) of the second run."""
    lm.loglikelihood(asked[:8], disable_tqdm=True)
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    found = [nats for nats, _ in lm.loglikelihood(asked, disable_tqdm=True)]
    if CUDA:
        torch.cuda.synchronize()
    return found, time.perf_counter() - begin, torch.cuda.max_memory_allocated() / GIB if CUDA else 0.0


@pytest.mark.parametrize("kind", LENGTHS)
def test_throughput_of_multiple_choice(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = opened(tiny, tmp_path)
    asked = questions(LENGTHS[kind], items=64 if CUDA else 4)
    ours = GemmaLM(model, tokenizer, FAMILIES["gemma1"], batch_size=8)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, add_bos_token=True, softmax_dtype="float32")
    tokens = sum(len(ours.encode("".join(request.args))) + 1 for request in asked)
    print()
    figures = {}
    for name, lm in (("ours", ours), ("stock", stock)):
        figures[name], seconds, peak = timed(lm, asked)
        speed = f"{len(asked) / len(ANSWERS) / seconds:,.1f} items/s, {tokens / seconds:,.0f} tokens/s"
        print(f"{kind}, {name}: {speed}, peak {peak:.2f} GiB")
    # Sums over some ten tokens; a bf16 product of another shape rounds its last bit elsewhere.
    assert figures["ours"] == pytest.approx(figures["stock"], abs=0.5 if CUDA else 1e-3)


def test_throughput_of_generation(tiny: Tiny, tmp_path: Path) -> None:
    model, tokenizer = opened(tiny, tmp_path)
    lm = GemmaLM(model, tokenizer, FAMILIES["gemma1"], batch_size=8)
    how = {"until": ["\n\n\n"], "max_gen_toks": 64 if CUDA else 4, "do_sample": False}
    asked = [SimpleNamespace(args=(f"Question {n}. {SENTENCE}", how), task_name=None) for n in range(16 if CUDA else 2)]
    lm.generate_until(asked[:2], disable_tqdm=True)
    begin = time.perf_counter()
    texts = lm.generate_until(asked, disable_tqdm=True)
    seconds = time.perf_counter() - begin
    most = len(texts) * int(how["max_gen_toks"])
    print(f"\ngeneration: {len(texts) / seconds:,.1f} items/s, at most {most / seconds:,.0f} tokens/s")
    assert len(texts) == len(asked)
