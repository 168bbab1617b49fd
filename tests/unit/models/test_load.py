"""The loader: the right class, nothing random, towers frozen, stop ids set."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES, text_only
from gemma_tune.models.load import check_vocabulary, load_base, source_of
from gemma_tune.models.remedies import is_tower
from gemma_tune.models.tokenizer import load_tokenizer
from tests.tiny import TINY_NAMES

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
CLASSES = {
    "gemma1": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4": "Gemma4ForConditionalGeneration",
    "gemma4_moe": "Gemma4ForConditionalGeneration",
    "gemma4_text": "Gemma4ForCausalLM",
    "gemma4_unified": "Gemma4UnifiedForConditionalGeneration",
}


@pytest.mark.parametrize("quantization", [{}, NF4, {"load_in_8bit": True}], ids=["none", "nf4", "int8"])
@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_generation_loads(name: str, quantization: dict[str, object], tiny: Callable[..., Path]) -> None:
    family = FAMILIES["gemma4" if name == "gemma4_moe" else name]
    model = load_base({"name": str(tiny(name)), "dtype": "bfloat16"}, quantization, family)
    assert type(model).__name__ == CLASSES[name]
    assert model.config.use_cache is False
    assert model.generation_config.eos_token_id == list(family.stop_ids)
    assert source_of(model).name == str(tiny(name))
    assert not any(parameter.requires_grad for key, parameter in model.named_parameters() if is_tower(key))
    row = torch.arange(500, 530)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=row).logits).all()
    check_vocabulary(model, load_tokenizer(str(tiny(name)), None, family), family)
    linear = {type(module).__name__ for key, module in model.named_modules() if key.endswith(("q_proj", "up_proj"))}
    wanted = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}.get(next(iter(quantization), ""), "Linear")
    assert wanted in linear
    assert type(model.get_output_embeddings()).__name__ == "Linear", "the tied head stays in 16 bits"


def test_towers_are_recognised() -> None:
    assert is_tower("model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert is_tower("base_model.model.model.embed_vision.embedding_projection.weight")
    assert not is_tower("model.language_model.layers.0.self_attn.q_proj")
    assert not is_tower("model.embed_tokens.weight")


def test_3n_with_its_tower_says_what_to_install(tiny: Callable[..., Path]) -> None:
    with pytest.raises(AccessError, match="timm") as error:
        load_base({"name": str(tiny("gemma3n"))}, {}, FAMILIES["gemma3n"])
    assert "model.text_only: true" in error.value.problems[0].fix


# --- refusals


@pytest.fixture
def copy(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("gemma3_text"), tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_llama_is_refused(copy: Path) -> None:
    change_config(copy, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match="no Gemma: its model_type is 'llama'"):
        load_base({"name": str(copy)}, {}, FAMILIES["gemma3_text"])


def test_another_gemma_than_planned_is_refused(copy: Path) -> None:
    with pytest.raises(UserError, match="the plan was made for Gemma 1"):
        load_base({"name": str(copy)}, {}, FAMILIES["gemma1"])


def test_missing_tensors_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base({"name": str(copy)}, {}, FAMILIES["gemma3_text"])


def test_tensors_of_another_shape_are_refused(copy: Path) -> None:
    change_config(copy, intermediate_size=96)
    with pytest.raises(UserError, match="other shapes than") as error:
        load_base({"name": str(copy)}, {}, FAMILIES["gemma3_text"])
    assert error.value.problems[0].where == str(copy)


def test_left_over_tensors_are_mentioned(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(copy / "model.safetensors") | {"model.layers.9.extra": torch.zeros(2)}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    load_base({"name": str(copy)}, {}, FAMILIES["gemma3_text"])
    assert "model.layers.9.extra" in capsys.readouterr().err


def test_towers_left_out_are_no_news(tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    load_base({"name": str(tiny("gemma4")), "text_only": True}, {}, text_only(FAMILIES["gemma4"]))
    assert capsys.readouterr().err == ""


def test_a_tokenizer_with_too_many_ids_is_refused(tiny: Callable[..., Path]) -> None:
    family = FAMILIES["gemma3_text"]
    model = load_base({"name": str(tiny("gemma3_text"))}, {}, family)
    tokenizer = load_tokenizer(str(tiny("gemma3_text")), None, family)
    # Beyond the embedding, but a control token: as in the official tokenizer of Gemma 3.
    assert max(family.control_ids) > 1024
    check_vocabulary(model, tokenizer, family)
    tokenizer.add_tokens([f"extra{n}" for n in range(1024)])
    with pytest.raises(UserError, match="only 1024 rows"):
        check_vocabulary(model, tokenizer, family)
