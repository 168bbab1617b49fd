"""How large a Gemma is: `shape_of` its config.json, `PUBLISHED` shapes, and `count` of its parameters by class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import family_of
from gemma_tune.gemma.published import PUBLISHED
from gemma_tune.gemma.shape import Layer, Parameters, Shape, count, every, layers_of

__all__ = ["PUBLISHED", "Layer", "Parameters", "Shape", "count", "layers_of", "shape_of"]

# Keys that a checkpoint leaves out have transformers' defaults (a test compares them with the installed ones).

_GEMMA2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
_GEMMA4_DEFAULTS = _GEMMA2_DEFAULTS | {
    "vocab_size": 262_144,
    "num_hidden_layers": 30,
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "gemma2": _GEMMA2_DEFAULTS,
    "vaultgemma": _GEMMA2_DEFAULTS,
    "gemma3_text": _GEMMA2_DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072},
    "gemma3n_text": {
        "vocab_size": 262_400,
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "altup_num_inputs": 4,
        "num_kv_shared_layers": 15,
        "laurel_rank": 64,
    },
    "gemma4_text": _GEMMA4_DEFAULTS,
    "gemma4_unified_text": _GEMMA4_DEFAULTS
    | {
        "max_position_embeddings": 262_144,
        "sliding_window": 1024,
        "vocab_size_per_layer_input": 0,
        "hidden_size_per_layer_input": 0,
    },
}
# Every n-th layer sees everything, where the config does not list its layers (hf: __post_init__).
_GLOBAL_EVERY = {"gemma": 1, "gemma2": 2, "vaultgemma": 2, "gemma3n_text": 5}


def shape_of(config: Mapping[str, Any], where: str = "") -> Shape:
    """The shape of any Gemma checkpoint, also of one that is not in `PUBLISHED`.

    Args:
        config: the parsed config.json; a multimodal one holds its decoder under `text_config`.
        where: shown in an error.

    Returns:
        The shape. `towers` is 0 for a text-only checkpoint, the published number where a published size has the same
        decoder, and None otherwise.

    Raises:
        UserError: not a Gemma (`families.family_of`), or a number is missing or of the wrong kind.
    """
    family = family_of(config, where)
    text_type = family.text_model_type or family.model_types[0]
    text = config.get("text_config") if family.text_model_type else config
    if not isinstance(text, Mapping):
        raise UserError("config.json has no text_config", where=where, fix="use a complete checkpoint")
    known = _DEFAULTS[text_type] | {key: value for key, value in text.items() if value is not None}
    if family.licence == "apache-2.0" and "per_layer_config" not in known:
        known.setdefault("global_head_dim", 512)  # hf: Gemma4TextConfig.__post_init__
    try:
        shape = _shape(family.name, text_type, known, tied=bool(config.get("tie_word_embeddings", True)))
    except (KeyError, TypeError, ValueError) as error:
        what = f"config.json cannot be read: {error!r}"
        raise UserError(what, where=where, fix="use a complete checkpoint") from error
    return replace(shape, towers=_towers_of(shape)) if family.text_model_type else shape


def _shape(name: str, text_type: str, text: Mapping[str, Any], tied: bool) -> Shape:
    layers = int(text["num_hidden_layers"])
    global_layers = _global_layers(text_type, text, layers)
    # transformers writes differing layers as {"05": {"head_dim": 512, ...}}; older configs have two keys of their own.
    overrides: Mapping[str, Any] = next(iter((text.get("per_layer_config") or {}).values()), {})
    global_head_dim = overrides.get("head_dim", text.get("global_head_dim"))
    k_eq_v = bool(text.get("attention_k_eq_v", False))
    global_kv_heads = overrides.get("num_key_value_heads", text.get("num_global_key_value_heads") if k_eq_v else None)
    moe = bool(text.get("enable_moe_block", False))
    per_layer_dim = int(text.get("hidden_size_per_layer_input", 0))
    return Shape(
        family=name,
        layers=layers,
        hidden=int(text["hidden_size"]),
        intermediate=_intermediate(text["intermediate_size"]),
        heads=int(text["num_attention_heads"]),
        kv_heads=int(text["num_key_value_heads"]),
        head_dim=int(text["head_dim"]),
        vocab=int(text["vocab_size"]),
        max_positions=int(text["max_position_embeddings"]),
        tied=tied,
        sliding_window=text.get("sliding_window"),
        global_layers=global_layers,
        global_head_dim=global_head_dim,
        global_kv_heads=global_kv_heads,
        k_eq_v=k_eq_v,
        kv_shared_layers=int(text.get("num_kv_shared_layers", 0)),
        double_wide=bool(text.get("use_double_wide_mlp", False)),
        per_layer_dim=per_layer_dim,
        per_layer_vocab=int(text.get("vocab_size_per_layer_input", 0)) if per_layer_dim else 0,
        experts=int(text["num_experts"]) if moe else 0,
        expert_dim=int(text["moe_intermediate_size"]) if moe else 0,
        experts_per_token=int(text["top_k_experts"]) if moe else 0,
        altup_inputs=int(text.get("altup_num_inputs", 0)),
        laurel_rank=int(text.get("laurel_rank", 0)),
    )


def _intermediate(value: Any) -> int | tuple[int, ...]:
    """One number where all layers agree."""
    widths = tuple(map(int, value)) if isinstance(value, (list, tuple)) else (int(value),)
    return widths[0] if len(set(widths)) == 1 else widths


def _global_layers(text_type: str, text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    kinds = text.get("layer_types")
    if kinds:
        found = tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")
    else:
        step = int(text.get("sliding_window_pattern") or _GLOBAL_EVERY.get(text_type, 6))
        found = every(step, layers)
    if text_type.startswith("gemma4") and layers - 1 not in found:
        found = (*found, layers - 1)  # hf: the last layer of a Gemma 4 is forced to full attention
    return found


def _towers_of(shape: Shape) -> int | None:
    """Towers of the published size with the same decoder."""
    for published in PUBLISHED.values():
        if published.towers and replace(published, towers=0) == shape:
            return published.towers
    return None
