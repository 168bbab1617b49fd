"""Tiny random Gemmas of every generation, as folders that the real loaders open.

`make_tiny("gemma4", folder)` writes config.json, model.safetensors, generation_config.json and a tokenizer. Weights are
random but fixed, in fp32, with a wide spread (0.2), so that outputs are far from uniform and a wrong mask shows.
The tokenizer is a byte-level-fallback BPE with Gemma's layout: the control tokens stand at the ids of the real ones.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

VOCAB = 1024
"""Rows of the embedding. The pieces of the tokenizer take less."""

_BYTES_AT = 238
_IMAGE_IDS = {"boi": 170, "eoi": 171, "image": 172, "boa": 173, "eoa": 174, "audio": 175, "video": 176}

_CORPUS = """
The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.
Write a short poem about the sea. The sea is wide, the sea is deep, and in the waves the old ships sleep.
How do I boil an egg? Put the egg into boiling water and wait for seven minutes, then cool it under cold water.
user model system assistant. Quote: Be yourself; everyone else is already taken. Author: Oscar Wilde
Hello, how are you today? I am fine, thank you. Can you help me with this question, please? Yes, of course I can.
A list of numbers: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100, 1000. The answer to the question is that there is no answer.
def add(a, b): return a + b  # Python code that adds two numbers and returns the result of the addition.
When it rains, the streets of the town shine in the light of the lamps, and nobody walks there without an umbrella.
Which of the two is better? That depends on what you want to do with it: the first is faster, the second is smaller.
"""


# --- tokenizer

_GEMMA_1 = {"<start_of_turn>": 106, "<end_of_turn>": 107}
_GEMMA_3 = {"<start_of_turn>": 105, "<end_of_turn>": 106}
_GEMMA_4 = {
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
_IMAGE_TOKENS = {"<start_of_image>": 170, "<end_of_image>": 171, "<image_soft_token>": 172}


@cache
def _learn_merges(count: int) -> tuple[tuple[str, str], ...]:
    """Byte-pair merges of the corpus: plain counting, ties broken by text, so the result never changes."""
    words: dict[tuple[str, ...], int] = {}
    for line in _CORPUS.strip().splitlines():
        for word in line.replace(" ", " ▁").split(" "):
            symbols = tuple(word)
            words[symbols] = words.get(symbols, 0) + 1
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: dict[tuple[str, str], int] = {}
        for symbols, seen in words.items():
            for pair in pairwise(symbols):
                pairs[pair] = pairs.get(pair, 0) + seen
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = _merge_all(words, best)
    return tuple(merges)


def _merge_all(words: dict[tuple[str, ...], int], pair: tuple[str, str]) -> dict[tuple[str, ...], int]:
    merged: dict[tuple[str, ...], int] = {}
    for symbols, seen in words.items():
        out: list[str] = []
        i = 0
        while i < len(symbols):
            if symbols[i : i + 2] == pair:
                out.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                out.append(symbols[i])
                i += 1
        merged[tuple(out)] = merged.get(tuple(out), 0) + seen
    return merged


def tokenizer_json(control: dict[str, int], newlines_at: int) -> dict[str, Any]:
    """A `tokenizer.json` with Gemma's layout.

    Args:
        control: turn, tool and thinking tokens with their ids.
        newlines_at: id of the single newline; runs of 2 to 31 newlines follow, then runs of 2 to 31 blanks.
    """
    ids: dict[str, int] = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "[multimodal]": 5}
    special = {"<pad>", "<eos>", "<bos>", "<unk>", *control}
    ids |= control
    runs = {"\n" * n: newlines_at + n - 1 for n in range(1, 32)} | {"▁" * n: newlines_at + 29 + n for n in range(2, 32)}
    ids |= runs | {token: number for token, number in _IMAGE_TOKENS.items() if number not in runs.values()}
    taken = set(ids.values())
    unused = (f"<unused{n}>" for n in range(_BYTES_AT))
    ids |= {next(unused): number for number in range(_BYTES_AT) if number not in taken}
    added = sorted(ids.items(), key=lambda item: item[1])
    ids |= {f"<0x{byte:02X}>": _BYTES_AT + byte for byte in range(256)}
    pieces = [chr(code) for code in range(0x21, 0x7F)] + ["▁"]
    merges = list(_learn_merges(VOCAB - _BYTES_AT - 256 - len(pieces) - 40))
    pieces += [left + right for left, right in merges]
    for piece in pieces:
        ids.setdefault(piece, len(ids))
    assert max(ids.values()) < VOCAB and len(set(ids.values())) == len(ids)
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in special,
            }
            for token, number in added
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [list(pair) for pair in merges],
        },
    }


def write_tokenizer(family_name: str, folder: Path) -> Path:
    """The tokenizer files of that generation: enough for `AutoTokenizer.from_pretrained(folder)`."""
    folder.mkdir(parents=True, exist_ok=True)
    if family_name in ("gemma1", "gemma2"):
        document = tokenizer_json(_GEMMA_1, newlines_at=108)
    else:
        document = tokenizer_json(_GEMMA_4 if family_name.startswith("gemma4") else _GEMMA_3, newlines_at=107)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


# --- models

_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
}
_SLIDING: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA_4_TEXT: dict[str, Any] = (
    _DECODER | _SLIDING | {"global_head_dim": 32, "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0}
)
_E2B_TEXT: dict[str, Any] = _GEMMA_4_TEXT | {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "num_key_value_heads": 1,
}
_MOE_TEXT: dict[str, Any] = _GEMMA_4_TEXT | {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}
_GEMMA_3N_TEXT: dict[str, Any] = (
    _DECODER
    | _SLIDING
    | {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [128] * 4,
    }
)
_SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
_GEMMA_4_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 64,
    "patch_size": 8,
    # As published: these layers are what PEFT's name lists trip over.
    "use_clipped_linears": True,
}


def _config_of(family_name: str, changes: dict[str, Any]) -> Any:
    import transformers as hf

    def gemma4(text: dict[str, Any]) -> Any:
        ids = {f"{kind}_token_id": _IMAGE_IDS[kind] for kind in ("boi", "eoi", "image", "boa", "audio", "video")}
        return hf.Gemma4Config(
            text_config=text | changes,
            vision_config=_GEMMA_4_VISION,
            audio_config=None,
            eoa_token_index=_IMAGE_IDS["eoa"],
            **ids,
        )

    def gemma3() -> Any:
        return hf.Gemma3Config(
            text_config=_DECODER | _SLIDING | {"query_pre_attn_scalar": 16} | changes,
            vision_config=_SIGLIP,
            mm_tokens_per_image=4,
            boi_token_index=_IMAGE_IDS["boi"],
            eoi_token_index=_IMAGE_IDS["eoi"],
            image_token_index=_IMAGE_IDS["image"],
        )

    def unified() -> Any:
        text = {key: value for key, value in _GEMMA_4_TEXT.items() if key != "hidden_size_per_layer_input"}
        ids = {f"{kind}_token_id": _IMAGE_IDS[kind] for kind in ("boi", "eoi", "image", "boa", "audio", "video")}
        return hf.Gemma4UnifiedConfig(
            text_config=text | changes,
            vision_config={"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64, "patch_size": 4},
            audio_config={"audio_embed_dim": 32},
            eoa_token_index=_IMAGE_IDS["eoa"],
            **ids,
        )

    builders: dict[str, Callable[[], Any]] = {
        "gemma1": lambda: hf.GemmaConfig(**(_DECODER | {"num_key_value_heads": 1} | changes)),
        "gemma2": lambda: hf.Gemma2Config(**(_DECODER | _SLIDING | {"query_pre_attn_scalar": 16} | changes)),
        "gemma3_text": lambda: hf.Gemma3TextConfig(**(_DECODER | _SLIDING | {"query_pre_attn_scalar": 16} | changes)),
        "gemma3": gemma3,
        "gemma3n_text": lambda: hf.Gemma3nTextConfig(**(_GEMMA_3N_TEXT | changes)),
        "gemma4": lambda: gemma4(_E2B_TEXT),
        "gemma4_moe": lambda: gemma4(_MOE_TEXT),
        "gemma4_text": lambda: hf.Gemma4TextConfig(**(_E2B_TEXT | changes)),
        "gemma4_unified": unified,
    }
    return builders[family_name]()


TINY_NAMES = (
    "gemma1",
    "gemma2",
    "gemma3_text",
    "gemma3",
    "gemma3n_text",
    "gemma4",
    "gemma4_moe",
    "gemma4_text",
    "gemma4_unified",
)
"""What `make_tiny` can make and every loader opens. `gemma3n` is for text-only loading: see `_publish_as_3n`."""


def make_tiny(family_name: str, folder: Path, **overrides: Any) -> Path:
    """Write a tiny random Gemma into `folder` and return it.

    Args:
        family_name: one of `TINY_NAMES`, or `gemma3n` (published layout, to be loaded as text only).
        folder: is made; files in it are overwritten.
        overrides: fields of the text config, e.g. `num_hidden_layers=2, layer_types=[...]`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = "gemma3n_text" if family_name == "gemma3n" else family_name
    folder.mkdir(parents=True, exist_ok=True)
    config = _config_of(name, overrides)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(sum(name.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _widen(model)
        model.save_pretrained(folder)
    if family_name == "gemma3n":
        _publish_as_3n(folder)
    return write_tokenizer(name, folder)


def _publish_as_3n(folder: Path) -> None:
    """Give a text-only Gemma 3n the layout of the published one: nested config, prefixed names, a tower's tensor.

    The class with towers needs the package timm for its vision tower, so only the text side of this can be opened.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in load_file(file).items()}
    tensors["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.zeros(2, 2)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    outer = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": config}
    # Without names of labels, reading the config asks timm for ImageNet's.
    outer["vision_config"] = {"model_type": "gemma3n_vision", "label_names": ["LABEL_0", "LABEL_1"], "num_classes": 2}
    (folder / "config.json").write_text(json.dumps(outer, indent=2), encoding="utf-8")


def _widen(model: Any) -> None:
    """Give what starts at zero or one (norms, scalars) a little spread: a zero would hide mistakes."""
    import torch

    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
