"""What is true of each Gemma generation: one frozen row each, every fact with its source.

No other module names a particular generation. A new Gemma is a new row here (and its sizes in `sizes.py`).

Sources, by their short names in the comments below:
  tokenizer   google-deepmind/gemma, gemma/gm/text/_tokenizer.py (ids of the special tokens)
  template    trl 1.16, trl/chat_templates/*.jinja (copies of the templates that Google ships) and its README.md
  modeling    transformers 5.23, models/<generation>/modeling_*.py
  config      transformers 5.23, models/<generation>/configuration_*.py
  llama.cpp   b11434, src/models/<generation>.cpp and conversion/gemma.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gemma_tune.errors import UserError

Targets = Literal["all-linear", "attention", "mlp"]

RESIDUAL_EXPONENT = -8
"""In `fp16_rescaled` the residual stream is multiplied by two to this power. On the real Gemma 3 270M it reaches
103,821, which becomes 406; at -10 a gradient of it overflowed at a loss scale of 1,024: they grow by as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """What llama.cpp assumes of a generation that its GGUF file does not say. Only generations that were proved here.

    Attributes:
        arch: `general.architecture`.
        norm_offset: what its converter adds to the weight of every RMS norm.
        period: every `period`-th layer is global and the others see a window, unless the file says otherwise; None
            where all layers are global.
        narrow_scale_layers: the one number of layers at which queries are scaled by hidden size / heads in place of
            the size of a head (how it tells the 27B model); None where there is none.
    """

    arch: str
    norm_offset: float
    period: int | None
    narrow_scale_layers: int | None


@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """One Gemma generation, as one model class of it is published. Compared by identity.

    Attributes:
        name: key in `FAMILIES`.
        label: how it is shown to people.
        model_types: values of `model_type` in config.json that mean this row.
        text_model_type: `model_type` of the same generation's text-only class; None where this is text-only already.
        bos_id, eos_id, pad_id: ids that open a document, end one, and fill a row.
        turn_start, turn_end: spelling of the tokens that open and close a turn.
        turn_start_id, turn_end_id: their ids.
        stop_ids: every id at which generation stops.
        tokens: spelling -> id of the control tokens that the renderer writes.
        control_ids: ids that no text of a user may ever become (the `<unusedN>` ids and media placeholders as well).
        role_model: the role name of the model in a turn header.
        system_role: `fold` (no system turn: its text goes into the first user turn) or `turn` (a real system turn).
        template_accepts_system: whether the official template itself takes a system message. Gemma 1 and 2 raise.
        roles_alternate: whether the template insists on user, model, user, model, ...
        thinking, tools: whether the template has a thought channel; tool declarations and calls.
        template_file, template_sha256, template_revision: the official template that the renderer is held to.
        adapter_prefix: path of the decoder layers inside the model class.
        lora_targets: preset -> regular expression over whole module names. Matches the multimodal and the text-only
            class, and never a tower, a router or a per-layer-embedding projection.
        decoder_layer: class name of a decoder layer, which FSDP gathers one at a time.
        tower_layers: class names of the layers of its towers, of those towers that every checkpoint of it has.
        norms_per_layer: RMS norms as wide as the hidden size in one decoder layer.
        qk_norm: whether queries and keys are normalised, with one learned vector of a head's size each.
        attention: attention implementations that are right for this generation, the default first.
        fp16: whether it can be computed in fp16. `plain`: as it is. `rescaled`: with its residual stream multiplied by
            2^RESIDUAL_EXPONENT (`models.rescale`), which is exact where RMS norms are all that reads and writes it.
            `never`: it overflows, and no exact remedy is known.
        accepts_loss_kwargs: what the model class tells the Trainer. False breaks gradient accumulation: correct it.
        kv_shared: whether sizes of it share keys and values between layers; reentrant checkpointing is then wrong.
        skip_quantization: patterns of modules that must keep 16 bits (`llm_int8_skip_modules`).
        attention_softcap, final_softcap: tanh soft-capping of attention scores and of logits; None where there is none.
        licence: `gemma` (Gemma Terms of Use) or `apache-2.0`.
        sampling: how its makers sample from it: temperature, top_k, top_p. Empty where they published nothing.
        ollama_code: names of what Ollama renders and reads this generation with instead of a TEMPLATE: `renderer`,
            `parser` without thinking, `thinking_parser`. Empty where it takes the TEMPLATE.
        gguf_tokenizer: whether `models.reference.repair_gguf_tokenizer` can rebuild the tokenizer from a GGUF file.
        gguf: how llama.cpp reads it; None where no export of it was proved.
    """

    name: str
    label: str
    model_types: tuple[str, ...]
    text_model_type: str | None
    bos_id: int
    eos_id: int
    pad_id: int
    turn_start: str
    turn_end: str
    turn_start_id: int
    turn_end_id: int
    stop_ids: tuple[int, ...]
    tokens: Mapping[str, int]
    control_ids: frozenset[int]
    role_model: str
    system_role: Literal["fold", "turn"]
    template_accepts_system: bool
    roles_alternate: bool
    thinking: bool
    tools: bool
    template_file: str
    template_sha256: str
    template_revision: str
    adapter_prefix: str
    lora_targets: Mapping[str, str]
    decoder_layer: str
    tower_layers: tuple[str, ...]
    norms_per_layer: int
    qk_norm: bool
    attention: tuple[str, ...]
    fp16: Literal["plain", "rescaled", "never"]
    accepts_loss_kwargs: bool
    kv_shared: bool
    skip_quantization: tuple[str, ...]
    attention_softcap: float | None
    final_softcap: float | None
    licence: Literal["gemma", "apache-2.0"]
    sampling: Mapping[str, float]
    ollama_code: Mapping[str, str]
    gguf_tokenizer: bool
    gguf: Gguf | None


def _lora_targets() -> dict[str, str]:
    """Anchored at the text decoder, so that `vision_tower...q_proj` and `router.proj` cannot match.

    Names differ by class: `model.layers.N` (text-only), `model.language_model.layers.N` (multimodal). Lists of bare
    names fail or leak into the towers (peft#3129), and `all-linear` adapts vision towers and routers.
    """
    layer = r"(?:model\.)?(?:language_model\.)?layers\.\d+\."
    attention, mlp = r"self_attn\.[qkvo]_proj", r"mlp\.(?:gate|up|down)_proj"
    return {
        "all-linear": f"{layer}(?:{attention}|{mlp})",
        "attention": f"{layer}{attention}",
        "mlp": f"{layer}{mlp}",
    }


# ---- Tokens. pad 0, eos 1, bos 2, unk 3, mask 4 are the same in all of them (tokenizer: _Gemma{2,3,4}SpecialTokens).

# tokenizer: _Gemma2SpecialTokens ("<unused0>" is 7, turn tokens 106 and 107); 255999 is "<unused99>" in the published
# tokenizer.json of Gemma 1 and 2, whose vocabulary ends there.
_TOKENS_1 = {"<bos>": 2, "<eos>": 1, "<pad>": 0, "<start_of_turn>": 106, "<end_of_turn>": 107}
_CONTROL_1 = frozenset(range(108)) | {255_999}

# tokenizer: _Gemma3SpecialTokens ("[multimodal]" 5, "<unused0>" 6, turn tokens 105 and 106, images 255999 and 256000,
# then unused ones); 262144 is "<image_soft_token>" in the published tokenizer.json; config: vocabulary ends at 262208.
_TOKENS_3 = {"<bos>": 2, "<eos>": 1, "<pad>": 0, "<start_of_turn>": 105, "<end_of_turn>": 106}
_CONTROL_3 = frozenset(range(107)) | frozenset(range(255_999, 262_208))
# config (gemma3n): image, audio and their ends live at 262144 .. 262399.
_CONTROL_3N = frozenset(range(107)) | frozenset(range(255_999, 262_400))

# tokenizer: _Gemma4SpecialTokens (turns 105, 106; tool response 50; media 255999, 256000, 258880 .. 258884).
# The other ids are those of the published tokenizer.json, where they took the place of "<unusedN>".
_TOKENS_4 = {
    "<bos>": 2,
    "<eos>": 1,
    "<pad>": 0,
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
_CONTROL_4 = frozenset(range(107)) | frozenset(range(255_999, 262_144))

_TURNS_1 = {
    "bos_id": 2,
    "eos_id": 1,
    "pad_id": 0,
    "turn_start": "<start_of_turn>",
    "turn_end": "<end_of_turn>",
    "turn_start_id": 106,
    "turn_end_id": 107,
    "stop_ids": (1, 107),
    "tokens": _TOKENS_1,
    "control_ids": _CONTROL_1,
    "role_model": "model",
}
_TURNS_3 = _TURNS_1 | {
    "turn_start_id": 105,
    "turn_end_id": 106,
    "stop_ids": (1, 106),
    "tokens": _TOKENS_3,
    "control_ids": _CONTROL_3,
}
_TURNS_4 = _TURNS_3 | {
    "turn_start": "<|turn>",
    "turn_end": "<turn|>",
    # generation_config.json of google/gemma-4-*: eos_token_id [1, 106, 50]; 50 is where the model hands over to a tool.
    "stop_ids": (1, 106, 50),
    "tokens": _TOKENS_4,
    "control_ids": _CONTROL_4,
}

# ---- Templates. Hashes of the files in trl 1.16.

_TEMPLATE_1 = {
    "template_file": "gemma.jinja",
    "template_sha256": "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6",
    "template_revision": "gemma (trl 1.16)",
    "system_role": "fold",
    "template_accepts_system": False,
    "roles_alternate": True,
    "thinking": False,
    "tools": False,
}
_TEMPLATE_3 = _TEMPLATE_1 | {
    "template_file": "gemma3.jinja",
    "template_sha256": "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4",
    "template_revision": "gemma3 (trl 1.16)",
    "template_accepts_system": True,
}
_TEMPLATE_4 = {
    "template_file": "gemma4_v5.jinja",
    "template_sha256": "0a2c8073c878ab1da004bee933a998606537bbb62016310352c7285c3f01c5b5",
    # template README: shipped by google/gemma-4-E2B-it at that commit; published 2026-07-09 (first lines of the file).
    "template_revision": "gemma4_v5 (google/gemma-4-E2B-it at 899537982545a3e55ce64d34462b2efa5af85232)",
    "system_role": "turn",
    "template_accepts_system": True,
    "roles_alternate": False,
    "thinking": True,
    "tools": True,
}

_TEXT_CLASS = {
    "text_model_type": None,
    "tower_layers": (),
    "adapter_prefix": "model.layers",
    "accepts_loss_kwargs": True,
}
_MULTIMODAL_CLASS = {"adapter_prefix": "model.language_model.layers"}

_GEMMA1: dict[str, Any] = {
    "name": "gemma1",
    "label": "Gemma 1",  # also 1.1, CodeGemma
    "model_types": ("gemma",),
    **_TURNS_1,
    **_TEMPLATE_1,
    **_TEXT_CLASS,
    "lora_targets": _lora_targets(),
    "decoder_layer": "GemmaDecoderLayer",  # modeling: _no_split_modules
    "norms_per_layer": 2,  # modeling: before attention and before the MLP
    "qk_norm": False,
    "attention": ("sdpa", "eager", "flash_attention_2"),  # modeling: _supports_sdpa, _supports_flash_attn
    # No report of overflow inside transformers, which keeps RoPE and norms in fp32 (transformers#29402), and Google's
    # 2024 notebook trains it in fp16. NaN was reported for other code (gemma_pytorch#10, #24). Not measured by us.
    "fp16": "plain",  # no norm behind attention and MLP: what they add to the stream could not be made smaller
    "kv_shared": False,
    "skip_quantization": ("lm_head",),  # tied to the embedding, which is not quantised
    "attention_softcap": None,
    "final_softcap": None,
    "licence": "gemma",
    "sampling": {},  # generation_config.json of google/gemma-*b-it and gemma-2-*-it: ids alone
    "ollama_code": {},
    "gguf_tokenizer": False,
    # llama.cpp: weights of norms are stored as 1 + weight, as GemmaRMSNorm uses them.
    "gguf": Gguf(arch="gemma", norm_offset=1.0, period=None, narrow_scale_layers=None),
}
_GEMMA2 = _GEMMA1 | {
    "name": "gemma2",
    "label": "Gemma 2",
    "model_types": ("gemma2",),
    "decoder_layer": "Gemma2DecoderLayer",
    "norms_per_layer": 4,  # modeling: before and after attention and the MLP
    # modeling: _supports_sdpa = False ("sdpa does not support softcapping"): sdpa raises ValueError.
    "attention": ("eager", "flash_attention_2"),
    "fp16": "rescaled",  # plain: inf in hidden states (transformers#32309, unsloth#2040)
    "attention_softcap": 50.0,  # config
    "final_softcap": 30.0,  # config
    "gguf": Gguf(arch="gemma2", norm_offset=1.0, period=2, narrow_scale_layers=46),
}
_GEMMA3_TEXT = _GEMMA1 | {
    **_TURNS_3,
    **_TEMPLATE_3,
    "name": "gemma3_text",
    "label": "Gemma 3 (text)",
    "model_types": ("gemma3_text",),
    "decoder_layer": "Gemma3DecoderLayer",
    "norms_per_layer": 4,
    "qk_norm": True,  # modeling: q_norm, k_norm
    "fp16": "rescaled",  # plain: transformers#39972, LlamaFactory#7755; docs/precision.md
    # generation_config.json of google/gemma-3-*-it: top_k 64, top_p 0.95; no temperature, which is transformers' 1.
    "sampling": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "gguf_tokenizer": True,  # tests/integration/test_real_270m.py compares it with Google's
    "gguf": Gguf(arch="gemma3", norm_offset=1.0, period=6, narrow_scale_layers=62),
}
_GEMMA3N_TEXT = _GEMMA3_TEXT | {
    "name": "gemma3n_text",
    "label": "Gemma 3n (text)",
    "model_types": ("gemma3n_text",),
    "control_ids": _CONTROL_3N,
    "decoder_layer": "Gemma3nTextDecoderLayer",
    # modeling: per_layer_input_gate reads the stream without a norm: its GELU is no function of the direction alone.
    "fp16": "never",
    "kv_shared": True,  # config: num_kv_shared_layers
    "gguf": None,  # llama.cpp: the layers that share keys and values are fixed to those of the published sizes
    # modeling: AltUp clamps prediction_coefs in place while it trains, which destroys a packed 4-bit weight; its other
    # maps (4 to 16 wide) and Laurel's (rank 64) are too narrow for blocks of 64.
    "skip_quantization": (
        "lm_head",
        r".*\.altup",
        r".*\.laurel",
        r".*altup_projections",
        r".*altup_unembed_projections",
    ),
    "final_softcap": 30.0,  # config
}
_GEMMA4_TEXT = _GEMMA3_TEXT | {
    **_TURNS_4,
    **_TEMPLATE_4,
    "name": "gemma4_text",
    "label": "Gemma 4 (text)",
    "model_types": ("gemma4_text",),
    "decoder_layer": "Gemma4TextDecoderLayer",
    # Heads of 512 on global layers (config: global_head_dim); flash-attention 2 ends at 256 (LlamaFactory#10736).
    "attention": ("sdpa", "eager"),
    # NaN after a few steps (unsloth#5055, #5074). modeling: in E2B and E4B per_layer_input_gate reads the stream
    # without a norm, as in 3n; the others were not looked into.
    "fp16": "never",
    "kv_shared": True,  # E2B and E4B; config: num_kv_shared_layers. Reentrant checkpointing: unsloth-zoo#1275
    "skip_quantization": ("lm_head", r".*\.router"),  # 26B-A4B: its routing must not be rounded
    "final_softcap": 30.0,  # google-deepmind/gemma, gm/nn/gemma4/_gemma4.py
    "licence": "apache-2.0",
    "gguf_tokenizer": False,
    "sampling": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},  # model card of google/gemma-4-*, "Best Practices"
    # Ollama, August 2026: server/create.go gives every GGUF of the architecture gemma4 the renderer "gemma4", which
    # from 12B on writes an empty thought before each answer (server/renderer_resolution.go). The template that we train
    # with writes none: model/renderers/renderer.go has that under "gemma4-small".
    "ollama_code": {"renderer": "gemma4-small", "parser": "gemma4-no-thinking", "thinking_parser": "gemma4"},
    "gguf": None,
}
_GEMMA4_UNIFIED_TEXT = _GEMMA4_TEXT | {
    "name": "gemma4_unified_text",
    "label": "Gemma 4 12B (text)",
    "model_types": ("gemma4_unified_text",),
    "decoder_layer": "Gemma4UnifiedTextDecoderLayer",
    "kv_shared": False,
    "skip_quantization": ("lm_head",),
}

FAMILIES: dict[str, Family] = {
    row["name"]: Family(**row)
    for row in (
        _GEMMA1,
        _GEMMA2,
        _GEMMA3_TEXT,
        # modeling: Gemma3ForConditionalGeneration has no accepts_loss_kwargs = False (only its inner model has).
        _GEMMA3_TEXT
        | _MULTIMODAL_CLASS
        | {
            "name": "gemma3",
            "label": "Gemma 3",
            "model_types": ("gemma3",),
            "text_model_type": "gemma3_text",
            "tower_layers": ("SiglipEncoderLayer",),  # modeling (siglip): the others of _no_split_modules are not there
        },
        _GEMMA3N_TEXT,
        _GEMMA3N_TEXT
        | _MULTIMODAL_CLASS
        | {
            "name": "gemma3n",
            "label": "Gemma 3n",
            "model_types": ("gemma3n",),
            "text_model_type": "gemma3n_text",
            "accepts_loss_kwargs": False,  # modeling: Gemma3nForConditionalGeneration
        },
        _GEMMA4_TEXT,
        _GEMMA4_TEXT
        | _MULTIMODAL_CLASS
        | {
            "name": "gemma4",
            "label": "Gemma 4",
            "model_types": ("gemma4",),
            "text_model_type": "gemma4_text",
            # modeling: _no_split_modules names audio layers too, which only E2B and E4B have.
            "tower_layers": ("Gemma4VisionEncoderLayer",),
            "accepts_loss_kwargs": False,  # modeling: Gemma4ForConditionalGeneration
        },
        _GEMMA4_UNIFIED_TEXT,
        _GEMMA4_UNIFIED_TEXT
        | _MULTIMODAL_CLASS
        | {
            "name": "gemma4_unified",
            "label": "Gemma 4 12B",
            "model_types": ("gemma4_unified",),
            "text_model_type": "gemma4_unified_text",
            "accepts_loss_kwargs": False,  # modeling: Gemma4UnifiedForConditionalGeneration
        },
        _GEMMA2
        | {
            # A pretrained model only; its vocabulary (256000) is Gemma 2's, whose template serves where one is wanted.
            "name": "vaultgemma",
            "label": "VaultGemma",
            "model_types": ("vaultgemma",),
            "decoder_layer": "VaultGemmaDecoderLayer",
            "norms_per_layer": 2,  # modeling: none after attention and the MLP
            "fp16": "never",  # which is why its stream cannot be rescaled
            "gguf": None,  # llama.cpp has no such architecture
        },
    )
}

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}

# Relatives that are no causal language models of text (or that nothing here can train).
_NOT_SUPPORTED = {
    "paligemma": "PaliGemma is an image-to-text model",
    "recurrent_gemma": "RecurrentGemma is no transformer decoder",
    "t5gemma": "T5Gemma is an encoder-decoder",
    "t5gemma2": "T5Gemma 2 is an encoder-decoder",
    "shieldgemma2": "ShieldGemma 2 is an image classifier",
    "diffusion_gemma": "DiffusionGemma generates by diffusion",
    "embedding_gemma2": "EmbeddingGemma makes embeddings",
    "gemma4_assistant": "this is a drafter for speculative decoding",
    "gemma4_unified_assistant": "this is a drafter for speculative decoding",
}
_SUPPORTED = "Gemma 1, 1.1, 2, 3, 3n and 4, CodeGemma, MedGemma and VaultGemma"


def family_of(config: Mapping[str, Any], where: str = "") -> Family:
    """The row of a checkpoint.

    Args:
        config: the parsed config.json.
        where: shown in an error, e.g. the model's name.

    Raises:
        UserError: the checkpoint is not a Gemma that can be fine-tuned here.
    """
    model_type = config.get("model_type")
    family = _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    if not isinstance(model_type, str):
        what = "config.json has no model_type, so this is not a model that transformers knows"
    elif model_type in _NOT_SUPPORTED:
        what = f"{_NOT_SUPPORTED[model_type]} (model_type '{model_type}'), which cannot be fine-tuned here"
    else:
        what = f"this is no Gemma: its model_type is '{model_type}'"
    raise UserError(what, where=where, fix=f"use one of {_SUPPORTED}, e.g. google/gemma-3-1b-it")


def text_only(family: Family) -> Family:
    """The row of the same generation's text-only class; `family` itself where it is text-only already."""
    return family if family.text_model_type is None else _BY_MODEL_TYPE[family.text_model_type]
