"""Every proved generation, as a tiny random model: llama.cpp's log-probabilities against transformers' in fp32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.lora import write_lora_gguf
from gemma_tune.export.llama import QUANTS, open_gguf, quantize
from gemma_tune.gemma.families import FAMILIES
from tests.gguf_tiny import ABOUT, SIX, with_closed_merges, write_tiny
from tests.llama.needs import needs_llama
from tests.unit.export.gguf.test_lora import make_adapter

pytestmark = [pytest.mark.llama, needs_llama]

LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma1": ("gemma1", {}),
    "gemma2": ("gemma2", {}),
    "gemma2, another pattern": ("gemma2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
    "gemma2, other caps": ("gemma2", {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0}),
    "gemma3": ("gemma3_text", SIX),
    "gemma3, another pattern": ("gemma3_text", {}),
    "gemma3, scaled rope of the global layers": ("gemma3_text", SIX | {"rope_parameters": LINEAR}),
    "gemma3, head of its own": ("gemma3_text", SIX | {"tie_word_embeddings": False}),
    "gemma3, capped logits": ("gemma3_text", SIX | {"final_logit_softcapping": 10.0}),
    "gemma3 multimodal": ("gemma3", {}),
}
IDS = [2, *range(300, 360)]
"""Longer than the window, which is 16."""


def _reference(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return _log_probs(model)


def _log_probs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model.eval()(input_ids=torch.tensor([IDS])).logits[0, -1].double(), -1)


@pytest.mark.parametrize("case", CASES)
def test_log_probs(case: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    name, changes = CASES[case]
    folder = with_closed_merges(tiny(name, **changes), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    expected = _reference(folder)
    with open_gguf(tmp_path / "x.gguf") as model:
        found = torch.from_numpy(model.log_probs(IDS))
        assert model.greedy(IDS, 1) == [int(expected.argmax())]
    gap = float((found - expected).abs().max())
    spread = float(expected.max() - expected.min())
    print(f"\n{case}: largest difference of log-probabilities {gap:.2e}, over a range of {spread:.1f}")
    # ggml looks GELU up in a table of fp16.
    assert gap < 1e-3 * spread


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 12}}], ids=str
)
def test_an_adapter(lora: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_closed_merges(tiny("gemma3_text", **SIX), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    adapted = make_adapter(folder, tmp_path / "adapter", **lora)
    family = FAMILIES["gemma3_text"]
    write_lora_gguf(tmp_path / "adapter", folder, tmp_path / "lora.gguf", family=family, about=ABOUT)
    expected, plain = _log_probs(adapted), _reference(folder)
    with open_gguf(tmp_path / "x.gguf", lora=tmp_path / "lora.gguf") as model:
        found = torch.from_numpy(model.log_probs(IDS))
    gap, moved = float((found - expected).abs().max()), float((plain - expected).abs().max())
    print(f"\n{lora}: largest difference {gap:.2e}, where the adapter moves {moved:.2f}")
    assert moved > 1 and gap < 2e-3 * moved


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types(kind: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp reads each of them; how near they are follows from their bits."""
    folder = with_closed_merges(tiny("gemma3_text", **SIX), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf", kind)
    expected = _reference(folder)
    with open_gguf(tmp_path / "x.gguf") as model:
        found = torch.from_numpy(model.log_probs(IDS))
    kl = float((expected.exp() * (expected - found)).sum())
    print(f"\n{kind}: KL {kl:.2e}")
    assert 0 <= kl < {"f16": 1e-3, "bf16": 5e-2, "q8_0": 2e-1}[kind]


def test_quantise(tiny: Callable[..., Path], tmp_path: Path) -> None:
    wide = SIX | {"hidden_size": 256, "intermediate_size": 512}  # blocks of 256
    folder = with_closed_merges(tiny("gemma3_text", **wide), tmp_path / "model")
    whole = write_tiny(folder, tmp_path / "x.gguf")
    sizes = []
    for kind in QUANTS:
        quantize(whole.file, tmp_path / f"{kind}.gguf", kind)
        sizes.append((tmp_path / f"{kind}.gguf").stat().st_size)
        with open_gguf(tmp_path / f"{kind}.gguf") as model:
            assert len(model.greedy(IDS, 3)) == 3
    assert sizes[0] < sizes[-1] < whole.size


def test_our_q8_0_is_llama_cpps(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import gguf
    import numpy as np

    folder = with_closed_merges(tiny("gemma3_text", **SIX), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    write_tiny(folder, tmp_path / "ours.gguf", "q8_0")
    quantize(tmp_path / "x.gguf", tmp_path / "theirs.gguf", "q8_0")
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / file).tensors}
        for file in ("ours.gguf", "theirs.gguf")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        a, b = (gguf.quants.dequantize(np.asarray(one.data), one.tensor_type) for one in (tensor, theirs[name]))
        # llama.cpp rounds halves to even where the gguf package rounds them away: one step of a block, and rarely.
        assert np.mean(a != b) < 1e-2 and np.abs(a - b).max() <= np.abs(a).max() / 127, name


def test_refusals(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_closed_merges(tiny("gemma3_text", **SIX), tmp_path / "model")
    write_tiny(folder, tmp_path / "x.gguf")
    with pytest.raises(UserError, match="unknown quantisation 'q4'"):
        quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "q4")
    with pytest.raises(UserError, match="no such file"), open_gguf(tmp_path / "none.gguf"):
        pass
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "x.gguf").read_bytes()[:100_000])
    with pytest.raises(UserError, match="cannot read it"), open_gguf(tmp_path / "cut.gguf"):
        pass
    make_adapter(tiny("gemma2"), tmp_path / "foreign")
    lora = tmp_path / "foreign.gguf"
    write_lora_gguf(tmp_path / "foreign", tiny("gemma2"), lora, family=FAMILIES["gemma2"], about=ABOUT)
    with pytest.raises(UserError, match="refuses this adapter"), open_gguf(tmp_path / "x.gguf", lora=lora):
        pass
