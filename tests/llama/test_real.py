"""The real Gemma 3 270M with an adapter: 48 greedy tokens for 8 prompts, llama.cpp against transformers in fp32.

The adapter is that of the finished run that GEMMA_TUNE_TEST_RUN names (a quick start's), else a random one that moves
every answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.export.gguf.lora import write_lora_gguf
from gemma_tune.export.gguf.tensors import Kind
from gemma_tune.export.gguf.write import write_gguf
from gemma_tune.export.llama import open_gguf, quantize
from gemma_tune.export.weights import CheckpointFiles
from gemma_tune.gemma.chat import render_prompt
from gemma_tune.gemma.conversation import Conversation, Message
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.reference import ModelSource
from gemma_tune.models.tokenizer import GemmaEncoder, open_tokenizer
from tests.llama.needs import needs_llama
from tests.unit.export.gguf.test_lora import make_adapter

pytestmark = [pytest.mark.llama, pytest.mark.slow, pytest.mark.timeout(1800), needs_llama]
FAMILY = FAMILIES["gemma3_text"]
TOKENS = 48
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain what photosynthesis is in two sentences.",
    "Give me three tips for better sleep.",
    "How do I boil an egg?",
    "Tell me a story about a dragon who is afraid of fire.",
    "What does this Python code do: print([x * x for x in range(5)])?",
    "Translate into German: Good morning, how are you?",
)


@dataclass(frozen=True)
class Answer:
    """What a model in transformers writes: ids, by how much each led, and the first token's log-probabilities."""

    prompt: list[int]
    ids: list[int]
    leads: list[float]
    first: torch.Tensor


@dataclass(frozen=True)
class Real:
    """The base, an adapter, both merged in fp32, and what base + adapter write."""

    base: Path
    adapter: Path
    merged: Path
    work: Path
    answers: list[Answer]


def _write(model: Any, prompts: list[list[int]]) -> list[Answer]:
    answers = []
    for prompt in prompts:
        ids: list[int] = []
        leads: list[float] = []
        with torch.no_grad():
            step = model(input_ids=torch.tensor([prompt]), use_cache=True)
            first = torch.log_softmax(step.logits[0, -1].double(), -1)
            for _ in range(TOKENS):
                best = step.logits[0, -1].topk(2)
                ids.append(int(best.indices[0]))
                leads.append(float(best.values[0] - best.values[1]))
                past = step.past_key_values
                step = model(input_ids=torch.tensor([ids[-1:]]), past_key_values=past, use_cache=True)
        answers.append(Answer(prompt, ids, leads, first))
    return answers


@pytest.fixture(scope="module")
def real(real_270m: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("real")
    run = os.environ.get("GEMMA_TUNE_TEST_RUN")
    if run:
        adapter = Path(run) / "adapter"
        base = AutoModelForCausalLM.from_pretrained(real_270m, dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, str(adapter))
    else:
        adapter = work / "adapter"
        model = make_adapter(real_270m, adapter, r=8, lora_alpha=2, target_modules=["q_proj", "v_proj", "up_proj"])
    print(f"\nadapter: {'of the run' if run else 'random'}")
    encoder = GemmaEncoder(open_tokenizer(ModelSource("270M", real_270m, None), FAMILY), FAMILY)
    prompts = [render_prompt(Conversation((Message("user", text),)), FAMILY, encoder) for text in PROMPTS]
    answers = _write(model.eval(), prompts)
    model.merge_and_unload().save_pretrained(work / "merged")
    return Real(real_270m, adapter, work / "merged", work, answers)


def _export(real: Real, model: Path, kind: Kind) -> Path:
    file = real.work / f"{model.name}-{kind}.gguf"
    if not file.exists():
        write_gguf(CheckpointFiles(model), model, real.base, file, family=FAMILY, kind=kind, about={"name": "270M"})
    return file


@dataclass(frozen=True)
class Comparison:
    """For each prompt: the first token that differs (48: none), the reference's lead there, the KL of the first."""

    label: str
    first: list[int]
    leads: list[float]
    kls: list[float]

    def __str__(self) -> str:
        where = [
            f"{at} (lead {lead:.4f})" if at < TOKENS else str(at)
            for at, lead in zip(self.first, self.leads, strict=True)
        ]
        return f"{self.label}: first difference at {', '.join(where)}; largest KL {max(self.kls):.2e}"


def _compare(label: str, answers: list[Answer], file: Path, lora: Path | None = None) -> Comparison:
    first, leads, kls = [], [], []
    with open_gguf(file, lora=lora) as model:
        for answer in answers:
            ids = model.greedy(answer.prompt, TOKENS)
            at = next((n for n in range(TOKENS) if ids[n] != answer.ids[n]), TOKENS)
            first.append(at)
            leads.append(answer.leads[at] if at < TOKENS else 0.0)
            found = torch.from_numpy(model.log_probs(answer.prompt))
            kls.append(float((answer.first.exp() * (answer.first - found)).sum()))
    found_all = Comparison(label, first, leads, kls)
    print(f"\n{found_all}")
    return found_all


def test_f32(real: Real) -> None:
    found = _compare("F32 against base + adapter", real.answers, _export(real, real.merged, "f32"))
    assert found.first == [TOKENS] * 8 and max(found.kls) < 1e-5


def test_base_and_lora(real: Real) -> None:
    lora = real.work / "lora.gguf"
    write_lora_gguf(real.adapter, real.base, lora, family=FAMILY, about={"name": "270M"})
    base = _export(real, real.base, "f32")
    found = _compare("F32 base and LoRA against base + adapter", real.answers, base, lora)
    assert found.first == [TOKENS] * 8 and max(found.kls) < 1e-5
    alone = _compare("F32 base alone (another model)", real.answers, base)
    assert min(alone.first) < TOKENS, "the adapter changes nothing, so that the test above could not fail"


@pytest.fixture(scope="module")
def rounded(real: Real) -> Iterator[list[Answer]]:
    """What transformers writes with our Q8_0 file, whose weights it turns back into fp32."""
    from transformers import AutoModelForCausalLM

    file = _export(real, real.merged, "q8_0")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    yield _write(model.eval(), [answer.prompt for answer in real.answers])


def test_q8_0(real: Real, rounded: list[Answer]) -> None:
    """Q8_0 rounds the weights, and llama.cpp rounds what they are multiplied with to 8 bits as well.

    Neither is an error of a file, so equal texts cannot be asked for. What a wrong file would show is held: weights as
    far from the originals as rounding alone brings them, and small KLs.
    """
    file = _export(real, real.merged, "q8_0")
    weights = [
        next((n for n in range(TOKENS) if a.ids[n] != b.ids[n]), TOKENS)
        for a, b in zip(real.answers, rounded, strict=True)
    ]
    kl = max(float((a.first.exp() * (a.first - b.first)).sum()) for a, b in zip(real.answers, rounded, strict=True))
    print(f"\ntransformers on Q8_0 against base + adapter: first difference at {weights}; largest KL {kl:.2e}")
    assert kl < 0.02
    both = _compare("Q8_0 in llama.cpp against base + adapter", real.answers, file)
    _compare("Q8_0 in llama.cpp against transformers on Q8_0", rounded, file)
    assert max(both.kls) < 0.2


def test_f16(real: Real) -> None:
    found = _compare("F16 against base + adapter", real.answers, _export(real, real.merged, "f16"))
    assert max(found.kls) < 1e-3


@pytest.mark.parametrize("kind", ["q4_k_m"])
def test_quantised_by_llama_cpp(kind: str, real: Real) -> None:
    file = real.work / f"{kind}.gguf"
    quantize(_export(real, real.merged, "f32"), file, kind)
    found = _compare(f"{kind} against base + adapter", real.answers, file)
    assert max(found.kls) < 2
