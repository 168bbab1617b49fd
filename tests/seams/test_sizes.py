"""Counted parameters against the models of transformers and the totals that the hub states."""

from __future__ import annotations

import re

import pytest

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.sizes import _DEFAULTS, PUBLISHED, Layer, Shape, count, layers_of, shape_of
from tests.meta_models import SHAPES, TOWERS, multimodal_config, multimodal_model, text_config, text_model

# Elements in the safetensors of google's checkpoints, as the hub states them.
HUB_TOTALS = {
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 4_300_079_472,
    "google/gemma-3-12b-pt": 12_187_325_040,
    "google/gemma-3-27b-pt": 27_432_406_640,
    "google/gemma-3n-E2B": 5_439_438_272,
    "google/gemma-3n-E4B": 7_849_978_192,
    "google/gemma-4-E2B": 5_123_178_051,
    "google/gemma-4-E4B": 7_996_156_490,
    "google/gemma-4-12B": 11_959_730_224,
    "google/gemma-4-26B-A4B": 25_805_936_206,
    "google/gemma-4-31B": 31_273_088_876,
}
# Buffers that the hub counts and that are no parameters: Gemma 4's scalar a layer, the standardisation of the large
# vision tower (2 x 1152).
_VISION_BUFFERS = {"google/gemma-4-26B-A4B": 2304, "google/gemma-4-31B": 2304}


@pytest.mark.parametrize("name", SHAPES)
def test_text_parameters_are_exact(name: str) -> None:
    parameters = dict(text_model(name).named_parameters())
    counted = count(SHAPES[name].text)
    by_class = {"embedding": 0, "per_layer_embedding": 0, "experts": 0, "linear": 0, "norms_and_rest": 0}
    for parameter_name, parameter in parameters.items():
        by_class[_class_of(parameter_name, SHAPES[name])] += parameter.numel()
    assert by_class == {key: getattr(counted, key) for key in by_class}
    assert counted.text == sum(parameter.numel() for parameter in parameters.values())
    assert counted.towers == 0


def _class_of(parameter: str, shape: Shape) -> str:
    """What quantisation does to it, by the rule of transformers and our list of exceptions."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    module = parameter.removesuffix(".weight")
    if "embed_tokens_per_layer" in parameter:
        return "per_layer_embedding"
    if "embed_tokens" in parameter or parameter.startswith("lm_head"):
        return "embedding"
    if ".experts." in parameter:
        return "experts"
    is_linear = re.search(r"(_proj|_projection|_gate|proj|linear_left|linear_right|_coefs|_router)$", module)
    converted = should_convert_module(module, list(FAMILIES[shape.family].skip_quantization))
    return "linear" if is_linear and converted and "altup_" not in module else "norms_and_rest"


@pytest.mark.parametrize("name", SHAPES)
def test_lora_parameters_are_exact(name: str) -> None:
    import torch

    family = FAMILIES[SHAPES[name].family]
    for preset, pattern in family.lora_targets.items():
        matched = [m for n, m in text_model(name).named_modules() if re.fullmatch(pattern, n)]
        assert matched
        assert all(type(module) is torch.nn.Linear for module in matched)
        expected = sum(module.in_features + module.out_features for module in matched)
        assert count(SHAPES[name]).lora_per_rank[preset] == expected


@pytest.mark.parametrize("name", TOWERS)
def test_towers_are_exact(name: str) -> None:
    whole = sum(parameter.numel() for parameter in multimodal_model(name).parameters())
    counted = count(SHAPES[name])
    assert whole == counted.text + counted.towers


@pytest.mark.parametrize("name", SHAPES)
def test_totals_are_the_hubs(name: str) -> None:
    """Towers included, and what the hub counts beyond parameters."""
    shape, counted = SHAPES[name], count(SHAPES[name])
    layers = list(layers_of(shape))
    stored = sum(_unused_keys(shape, layer) for layer in layers)
    buffers = shape.layers if FAMILIES[shape.family].licence == "apache-2.0" else 0
    buffers += _VISION_BUFFERS.get(name, 0)
    assert counted.text + counted.towers + stored + buffers == HUB_TOTALS[name]


def _unused_keys(shape: Shape, layer: Layer) -> int:
    """Keys and values of a KV-shared layer: published, but not loaded."""
    return 0 if layer.has_k else (2 * shape.hidden * layer.kv_heads + 1) * layer.head_dim


def test_every_shape_has_a_hub_total() -> None:
    assert set(HUB_TOTALS) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_gives_its_shape_back(name: str) -> None:
    config = text_config(SHAPES[name])
    assert shape_of(config.to_dict()) == SHAPES[name].text
    assert shape_of(config.to_diff_dict()) == SHAPES[name].text


@pytest.mark.parametrize("name", TOWERS)
def test_a_multimodal_config_gives_its_shape_back_with_the_towers(name: str) -> None:
    config = multimodal_config(name)
    assert shape_of(config.to_dict()) == SHAPES[name]
    assert shape_of(config.to_diff_dict()) == SHAPES[name]


@pytest.mark.parametrize("model_type", _DEFAULTS)
def test_defaults_are_those_of_the_installed_classes(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    installed = config.to_dict()
    for key, value in _DEFAULTS[model_type].items():
        if model_type == "gemma4_unified_text" and "per_layer" in key:
            assert key not in installed
        elif isinstance(installed[key], list):
            assert set(installed[key]) == {value}
        else:
            assert installed[key] == value, key
    # A config.json that says nothing but its type.
    family = next(family for family in FAMILIES.values() if model_type in family.model_types)
    assert shape_of({"model_type": model_type}) == shape_of(config.to_dict())
    assert shape_of({"model_type": model_type}).family == family.name


def test_published_families_exist_and_share_keys_where_their_row_says_so() -> None:
    for name, shape in PUBLISHED.items():
        assert FAMILIES[shape.family].kv_shared or not shape.kv_shared_layers, name
