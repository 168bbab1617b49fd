"""Models of transformers for the published shapes, on the meta device: all names and sizes, no memory."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from gemma_tune.gemma.families import FAMILIES, text_only
from gemma_tune.gemma.sizes import PUBLISHED, Shape

# One id for each different shape.
SHAPES: dict[str, Shape] = {}
for _name, _shape in PUBLISHED.items():
    if _shape not in SHAPES.values():
        SHAPES[_name] = _shape

_SIGLIP = {  # of Gemma 3: google-deepmind/gemma, gemma/gm/vision
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
_LARGE_VISION_4 = {  # google-deepmind/gemma, gemma/gm/nn/gemma4/_gemma4.py
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}
_SMALL_4 = {
    "vision_config": {"model_type": "gemma4_vision", "use_clipped_linears": True},
    "audio_config": {"model_type": "gemma4_audio"},
}
TOWERS: dict[str, dict[str, Any]] = {
    "google/gemma-3-4b-pt": {"vision_config": _SIGLIP},
    "google/gemma-3-12b-pt": {"vision_config": _SIGLIP},
    "google/gemma-3-27b-pt": {"vision_config": _SIGLIP},
    "google/gemma-4-E2B": _SMALL_4,
    "google/gemma-4-E4B": _SMALL_4,
    "google/gemma-4-12B": {
        "vision_config": {"model_type": "gemma4_unified_vision"},
        "audio_config": {"model_type": "gemma4_unified_audio"},
    },
    "google/gemma-4-26B-A4B": {"vision_config": _LARGE_VISION_4},
    "google/gemma-4-31B": {"vision_config": _LARGE_VISION_4},
}
"""Tower configs of the multimodal ones. Gemma 3n's class needs the package timm and is left out."""


def text_config(shape: Shape) -> Any:
    """The config object of the shape's text-only class."""
    from transformers import AutoConfig

    model_type = text_only(FAMILIES[shape.family]).model_types[0]
    fields: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
    }
    if shape.sliding_window is not None:
        kinds = ["full_attention" if i in shape.global_layers else "sliding_attention" for i in range(shape.layers)]
        fields |= {"sliding_window": shape.sliding_window, "layer_types": kinds}
    if model_type.startswith("gemma4"):
        fields |= {
            "global_head_dim": shape.global_head_dim,
            "num_global_key_value_heads": shape.global_kv_heads,
            "attention_k_eq_v": shape.k_eq_v,
            "num_kv_shared_layers": shape.kv_shared_layers,
            "use_double_wide_mlp": shape.double_wide,
        }
    if model_type == "gemma4_text":
        fields |= {
            "hidden_size_per_layer_input": shape.per_layer_dim,
            "vocab_size_per_layer_input": shape.per_layer_vocab,
            "enable_moe_block": shape.experts > 0,
            "num_experts": shape.experts or None,
            "moe_intermediate_size": shape.expert_dim or None,
            "top_k_experts": shape.experts_per_token or None,
        }
    if model_type == "gemma3n_text":
        fields |= {
            "num_kv_shared_layers": shape.kv_shared_layers,
            "laurel_rank": shape.laurel_rank,
            "altup_num_inputs": shape.altup_inputs,
        }
    return AutoConfig.for_model(model_type, **fields)


def multimodal_config(name: str) -> Any:
    from transformers import AutoConfig

    shape = SHAPES[name]
    towers = {"vision_config": None, "audio_config": None} | TOWERS[name]
    model_type = FAMILIES[shape.family].model_types[0]
    if model_type == "gemma3":
        del towers["audio_config"]
    return AutoConfig.for_model(model_type, text_config=text_config(shape).to_dict(), **towers)


@functools.cache
def text_model(name: str) -> Any:
    return _build(text_config(SHAPES[name]))


@functools.cache
def multimodal_model(name: str) -> Any:
    return _build(multimodal_config(name))


def _build(config: Any) -> Any:
    """What `AutoModelForCausalLM` gives for the config: for a multimodal one, the class with towers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(config)
