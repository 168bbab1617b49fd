"""The facts of each generation against the installed transformers."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from gemma_tune.gemma.families import FAMILIES, Family
from tests.meta_models import SHAPES, TOWERS, multimodal_model, text_model

_PROJECTIONS = {
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}


def model_class(family: Family) -> Any:
    """What `AutoModelForCausalLM` loads for this row."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[family.model_types[0]]]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_facts_of_the_model_class(family: Family) -> None:
    loaded = model_class(family)
    assert family.decoder_layer in loaded._no_split_modules
    assert loaded._supports_sdpa == ("sdpa" in family.attention)
    assert loaded._supports_flash_attn >= ("flash_attention_2" in family.attention)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(loaded.forward).parameters.values())
    assert getattr(loaded, "accepts_loss_kwargs", takes_any) == family.accepts_loss_kwargs
    module = inspect.getmodule(loaded)
    assert hasattr(module, family.decoder_layer)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_facts_of_the_config(family: Family) -> None:
    from transformers import AutoConfig

    text = AutoConfig.for_model(family.text_model_type or family.model_types[0])
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (family.bos_id, family.eos_id, family.pad_id)
    assert hasattr(text, "num_kv_shared_layers") >= family.kv_shared
    assert getattr(text, "attn_logit_softcapping", None) == family.attention_softcap
    if not family.tools:  # Gemma 4's default is none; its checkpoints say 30
        assert getattr(text, "final_logit_softcapping", None) == family.final_softcap
    assert max(family.control_ids) < text.vocab_size
    if family.text_model_type:
        assert AutoConfig.for_model(family.text_model_type).model_type == family.text_model_type


@pytest.mark.parametrize("name", TOWERS)
def test_lora_targets_match_the_same_layers_with_and_without_towers(name: str) -> None:
    family = FAMILIES[SHAPES[name].family]
    text_names = [module for module, _ in text_model(name).named_modules()]
    whole_names = [module for module, _ in multimodal_model(name).named_modules()]
    assert any("vision" in module for module in whole_names)
    for preset, pattern in family.lora_targets.items():
        in_text = {module for module in text_names if re.fullmatch(pattern, module)}
        in_whole = {module for module in whole_names if re.fullmatch(pattern, module)}
        assert {module.replace("model.language_model.", "model.") for module in in_whole} == in_text
        assert all(module.startswith(family.adapter_prefix + ".") for module in in_whole)
        wanted = set().union(*_PROJECTIONS.values()) if preset == "all-linear" else _PROJECTIONS[preset]
        assert {module.rsplit(".", 1)[1] for module in in_whole} == wanted


@pytest.mark.parametrize("name", SHAPES)
def test_lora_targets_leave_nothing_of_a_decoder_out(name: str) -> None:
    """Every projection of attention and MLP is matched, and no router, expert or per-layer map."""
    import torch

    pattern = FAMILIES[SHAPES[name].family].lora_targets["all-linear"]
    for module_name, module in text_model(name).named_modules():
        if isinstance(module, torch.nn.Linear):
            wanted = re.search(r"\.(self_attn|mlp)\.\w+$", module_name) is not None
            assert bool(re.fullmatch(pattern, module_name)) == wanted, module_name


def test_what_gemma_3n_and_the_experts_router_keep_in_16_bits() -> None:
    import torch
    from transformers.quantizers.quantizers_utils import should_convert_module

    for name, kept in {
        "google/gemma-3n-E2B": {
            "lm_head",
            "linear_left",
            "linear_right",
            "correction_coefs",
            "prediction_coefs",
            "modality_router",
            "0",  # altup_projections and altup_unembed_projections are lists
            "1",
            "2",
        },
        "google/gemma-4-26B-A4B": {"lm_head", "proj"},
        "google/gemma-3-1b-pt": {"lm_head"},
    }.items():
        skip = list(FAMILIES[SHAPES[name].family].skip_quantization)
        for model, prefix in ((text_model(name), "model."), (text_model(name), "model.language_model.")):
            found = {
                module_name.rsplit(".", 1)[-1]
                for module_name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
                and not should_convert_module(module_name.replace("model.", prefix, 1), skip)
            }
            assert found == kept
