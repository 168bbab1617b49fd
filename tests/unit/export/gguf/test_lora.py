"""An adapter as GGUF: alpha / r * B A in the file is what PEFT adds to the weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.lora import write_lora_gguf
from gemma_tune.gemma.families import FAMILIES
from tests.gguf_tiny import ABOUT

gguf = pytest.importorskip("gguf", reason='needs the package gguf: pip install "gemma-tune[gguf]"')
NAME = "gemma3_text"


def make_adapter(base: Path, folder: Path, **lora: Any) -> Any:
    """A random LoRA adapter of `base` in `folder`; returns the PEFT model in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | lora
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(
    ("lora", "touches_b"),
    [
        ({}, False),
        ({"use_rslora": True}, False),
        ({"rank_pattern": {"q_proj": 8}}, False),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 12}}, True),
        ({"alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 24}}, True),
    ],
)
def test_the_file_adds_what_peft_adds(
    lora: dict[str, Any], touches_b: bool, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_adapter(tiny(NAME), tmp_path / "adapter", **lora)
    file = tmp_path / "lora.gguf"
    family = FAMILIES[NAME]
    found = write_lora_gguf(tmp_path / "adapter", tiny(NAME), file, family=family, about=ABOUT, weight=0.5)
    reader = gguf.GGUFReader(file)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == "gemma3"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    assert found.tensors == len(tensors) == 2 * 3 * 4
    short = {"q_proj": "attn_q", "v_proj": "attn_v", "down_proj": "ffn_down"}
    scaled = set()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, kind = name.split(".")[-3], name.split(".")[-1]
        a, b = (tensors[f"blk.{layer}.{short[kind]}.weight.lora_{half}"] for half in "ab")
        expected = 0.5 * module.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(alpha / a.shape[0] * b @ a, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(a, module.lora_A["default"].weight.detach().numpy())
        scaled.add(bool((b != module.lora_B["default"].weight.detach().numpy()).any()))
    assert (True in scaled) == touches_b


def _dora(config: dict[str, Any]) -> None:
    config["use_dora"] = True


def _modules(config: dict[str, Any]) -> None:
    config["modules_to_save"] = ["lm_head"]


def _biased(config: dict[str, Any]) -> None:
    config["bias"] = "lora_only"


def _ia3(config: dict[str, Any]) -> None:
    config["peft_type"] = "IA3"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_dora, "no adapters with DoRA"),
        (_modules, "modules_to_save"),
        (_biased, "bias: lora_only"),
        (_ia3, "not IA3"),
    ],
)
def test_what_llama_cpp_cannot_express(
    damage: Callable[[dict[str, Any]], None], message: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter(tiny(NAME), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    damage(config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        write_lora_gguf(tmp_path, tiny(NAME), tmp_path / "x.gguf", family=FAMILIES[NAME], about={})
    assert "--format gguf" in str(caught.value) and not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_of_the_embedding_and_the_head(target: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    make_adapter(tiny(NAME), tmp_path, target_modules=["q_proj", target])
    with pytest.raises(UserError, match=r"no place for the tensor|puts no adapter on"):
        write_lora_gguf(tmp_path, tiny(NAME), tmp_path / "x.gguf", family=FAMILIES[NAME], about={})


def test_adapters_of_a_tower(tiny: Callable[..., Path], tmp_path: Path) -> None:
    make_adapter(tiny("gemma3"), tmp_path, target_modules=["q_proj"])  # a bare name reaches the vision tower as well
    with pytest.raises(UserError, match=r"puts no adapter on .*vision_tower"):
        write_lora_gguf(tmp_path, tiny("gemma3"), tmp_path / "x.gguf", family=FAMILIES["gemma3"], about={})


def test_a_half_of_a_pair(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_adapter(tiny(NAME), tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state.pop(next(name for name in state if ".lora_B." in name))
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="copy the adapter again"):
        write_lora_gguf(tmp_path, tiny(NAME), tmp_path / "x.gguf", family=FAMILIES[NAME], about={})
