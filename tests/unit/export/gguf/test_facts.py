"""What llama.cpp takes for granted is compared with config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.facts import read_decoder
from gemma_tune.gemma.families import FAMILIES


def _changed(folder: Path, into: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (into / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return into


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3_text", {"query_pre_attn_scalar": 17}, "takes query_pre_attn_scalar to be 16"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "takes query_pre_attn_scalar to be 16"),
        (
            "gemma1",
            {"hidden_activation": "gelu", "hidden_act": "gelu"},
            "takes hidden_activation to be gelu_pytorch_tanh",
        ),
        ("gemma3_text", {"attention_bias": True}, "takes attention_bias to be False"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "takes use_bidirectional_attention to be False"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "takes attn_logit_softcapping to be absent"),
        ("gemma2", {"attn_logit_softcapping": None}, r"takes attn_logit_softcapping to be 50\.0"),
        ("gemma2", {"final_logit_softcapping": None}, r"takes final_logit_softcapping to be 30\.0"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "takes the kinds of layers to be sliding and full"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(
    name: str, changes: dict[str, Any], message: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_decoder(_changed(tiny(name), tmp_path, **changes), FAMILIES[name])


def test_ropes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    folder = _changed(tiny("gemma3_text"), tmp_path, rope_parameters=ropes)
    assert read_decoder(folder, FAMILIES["gemma3_text"]).text.rope_parameters == ropes
    ropes["sliding_attention"] = ropes["full_attention"]
    with pytest.raises(UserError, match="rope_type of sliding_attention"):
        read_decoder(_changed(tiny("gemma3_text"), tmp_path, rope_parameters=ropes), FAMILIES["gemma3_text"])


def test_the_27b_models_scale_queries_by_the_width(tiny: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 46, "layer_types": ["sliding_attention", "full_attention"] * 23}
    wide = _changed(tiny("gemma2"), tmp_path, hidden_size=96, query_pre_attn_scalar=24, **changes)
    assert read_decoder(wide, FAMILIES["gemma2"]).layers == 46
    with pytest.raises(UserError, match="to be 24"):
        read_decoder(_changed(wide, tmp_path, query_pre_attn_scalar=16), FAMILIES["gemma2"])


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"])
def test_unproved_generations_are_refused(name: str, tiny: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="has not been proved") as caught:
        read_decoder(tiny(name), FAMILIES[name])
    assert "Gemma 1, Gemma 2, Gemma 3 (text)" in str(caught.value)


def test_the_decoder_of_a_multimodal_checkpoint(tiny: Callable[..., Path]) -> None:
    decoder = read_decoder(tiny("gemma3"), FAMILIES["gemma3"])
    assert decoder.tied and decoder.layers == 4 and decoder.text.model_type == "gemma3_text"
