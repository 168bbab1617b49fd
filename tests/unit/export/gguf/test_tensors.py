"""Names, types and bytes of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_tune.errors import UserError
from gemma_tune.export.gguf import tensors
from gemma_tune.export.gguf.facts import Decoder, read_decoder
from gemma_tune.export.gguf.tensors import encode, gguf_names, size_of, type_of
from gemma_tune.export.weights import CheckpointFiles
from gemma_tune.gemma.families import FAMILIES

gguf = pytest.importorskip("gguf", reason='needs the package gguf: pip install "gemma-tune[gguf]"')
Types = gguf.GGMLQuantizationType


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slabs_are_the_whole(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_SLAB", 3 * 64)  # 3 rows at a time, of 50: the last slab is shorter
    tensor = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = encode(tensor, Types[kind], offset=1.0)
    whole = gguf.quants.quantize((tensor.float() + 1).numpy(), Types[kind])
    assert found.dtype == np.uint8 and found.nbytes == size_of((50, 64), Types[kind])
    assert found.tobytes() == whole.tobytes()


def test_types() -> None:
    assert type_of((64,), "q8_0") == Types.F32
    assert type_of((8, 64), "q8_0") == Types.Q8_0
    assert type_of((8, 48), "q8_0") == Types.F16
    assert type_of((8, 48), "bf16") == Types.BF16


def test_what_does_not_fit_is_refused() -> None:
    large = torch.full((2, 64), 70_000.0)
    with pytest.raises(UserError, match="up_proj holds values that do not fit into f16"):
        encode(large, Types.F16, where="up_proj")
    assert np.isfinite(encode(large, Types.F32).view(np.float32)).all()
    large[1, 3] = float("nan")
    with pytest.raises(UserError, match="is not finite"):
        encode(large, Types.Q8_0, where="up_proj")


@pytest.fixture
def decoder(tiny: Callable[..., Path]) -> Decoder:
    return read_decoder(tiny("gemma3_text"), FAMILIES["gemma3_text"])


@pytest.fixture
def names(tiny: Callable[..., Path]) -> list[str]:
    return list(CheckpointFiles(tiny("gemma3_text")).names())


def test_names_of_every_class(names: list[str], decoder: Decoder) -> None:
    plain = gguf_names(names, decoder, "")
    assert len(plain) == len(names) == 4 * 13 + 2
    assert plain["model.layers.2.pre_feedforward_layernorm.weight"] == "blk.2.ffn_norm.weight"
    wide = [name.replace("model.", "model.language_model.", 1) for name in names]
    tower = "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert list(gguf_names([*wide, tower], decoder, "").values()) == list(plain.values())
    first, *_, last = plain.values()
    assert first == "output_norm.weight" and last.startswith("blk.3.")


def test_the_head(names: list[str], decoder: Decoder) -> None:
    assert "output.weight" not in gguf_names([*names, "lm_head.weight"], decoder, "").values()
    untied = replace(decoder, tied=False)
    assert gguf_names([*names, "lm_head.weight"], untied, "")["lm_head.weight"] == "output.weight"
    with pytest.raises(UserError, match=r"1 tensors are missing, e.g. what llama.cpp calls output.weight"):
        gguf_names(names, untied, "")


def test_an_untied_head_of_an_architecture_without_one(tiny: Callable[..., Path]) -> None:
    folder = tiny("gemma2")
    decoder = replace(read_decoder(folder, FAMILIES["gemma2"]), tied=False)
    with pytest.raises(UserError, match=r"no place for the tensor lm_head.weight in the architecture gemma2"):
        gguf_names([*CheckpointFiles(folder).names(), "lm_head.weight"], decoder, "")


def test_missing_and_unknown_tensors(names: list[str], decoder: Decoder) -> None:
    with pytest.raises(UserError, match=r"missing, e\.g\. what llama\.cpp calls blk\.1\.attn_k\.weight"):
        gguf_names([name for name in names if name != "model.layers.1.self_attn.k_proj.weight"], decoder, "")
    with pytest.raises(UserError, match=r"no place for the tensor model\.layers\.0\.self_attn\.sinks"):
        gguf_names([*names, "model.layers.0.self_attn.sinks"], decoder, "")
