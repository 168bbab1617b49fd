"""Terms of the estimate against real tensors, for each generation: what autograd keeps, and what a KV cache holds.

Small random models; what two more layers keep is divided by two, so that embedding and head drop out.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import layers_of
from gemma_tune.gemma.sizes import shape_of
from gemma_tune.plan.memory import cache_bytes, layer_bytes, layer_copies
from gemma_tune.plan.workload import Workload

ROWS, LENGTH, LAYERS = 2, 48, (2, 4)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0}
GENERATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma1": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 32}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 32}),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            **PER_LAYER,
            "sliding_window": 32,
            "laurel_rank": 16,
            "altup_num_inputs": 4,
            "activation_sparsity_pattern": None,
        },
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {**PER_LAYER, "sliding_window": 32, "global_head_dim": 64},
    ),
}
WORK = Workload(
    device="cpu",
    quantization="none",
    double_quantization=False,
    weight_bytes=2,
    compute_bytes=2,
    autocast=False,
    rank=8,
    targets="all-linear",
    dropout=False,
    dora=False,
    optimizer="adamw_torch",
    rows=ROWS,
    length=LENGTH,
    masked=True,
    attention="sdpa",
    checkpointing=False,
    world_size=1,
)
FP32 = {"weight_bytes": 4, "compute_bytes": 4}


def make(family: str, layers: int, work: Workload) -> torch.nn.Module:
    """A model of `layers` decoder layers, prepared as a run prepares it."""
    config_class, model_class, more = GENERATIONS[family]
    kinds = {"layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"]} if more else {}
    config = getattr(transformers, config_class)(
        **SIZES | more | kinds, num_hidden_layers=layers, attn_implementation=work.attention
    )
    model = getattr(transformers, model_class)(config).to(torch.float32 if work.weight_bytes == 4 else torch.bfloat16)
    if work.rank:
        targets = FAMILIES[family].lora_targets[work.targets]
        lora = LoraConfig(r=work.rank, target_modules=targets, lora_dropout=0.05 * work.dropout, use_dora=work.dora)
        model = get_peft_model(model, lora)
        model.enable_input_require_grads()
    return model.train()


class Kept:
    """A saved tensor, as long as the graph needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.storage = tensor, tensor.untyped_storage()


def kept_bytes(model: torch.nn.Module, autocast: bool) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of the decoder, weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    weights = {tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Kept | torch.Tensor:
        # Autocast's copies of weights are a term of their own.
        if tensor.untyped_storage().data_ptr() in own or (autocast and tuple(tensor.shape) in weights):
            return tensor
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    decoder = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    ids = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % SIZES["vocab_size"]
    positions = torch.arange(LENGTH).expand(ROWS, -1) % (LENGTH // 2)  # two documents in a row
    casting = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: getattr(kept, "tensor", kept)), casting:
        result = decoder(ids, position_ids=positions, use_cache=False).last_hidden_state.float().sum()
    assert result.requires_grad  # and holds the graph, so that what it does not need is gone
    return sum({kept.storage.data_ptr(): kept.storage.nbytes() for kept in alive}.values())


@pytest.mark.parametrize(
    ("family", "changes", "tolerance"),
    [
        ("gemma3_text", {}, 0.05),
        ("gemma3_text", {"dropout": True}, 0.05),
        ("gemma3_text", {"attention": "eager"}, 0.05),
        ("gemma3_text", {"targets": "attention"}, 0.05),
        ("gemma3_text", {"targets": "mlp"}, 0.05),
        ("gemma3_text", {"rank": 64}, 0.05),
        ("gemma3_text", {"dora": True}, 0.1),
        ("gemma3_text", {"dora": True, "dropout": True}, 0.1),
        ("gemma3_text", FP32 | {"dora": True}, 0.1),
        ("gemma3_text", FP32, 0.1),
        ("gemma3_text", FP32 | {"dropout": True}, 0.1),
        ("gemma3_text", {"rank": 0, "weight_bytes": 4, "autocast": True}, 0.1),
        ("gemma3_text", FP32 | {"rank": 0}, 0.1),
        ("gemma1", {}, 0.05),
        ("gemma2", {"attention": "eager"}, 0.05),
        ("gemma4_text", {}, 0.1),
        ("gemma3n_text", {}, 0.15),
    ],
)
def test_what_a_layer_keeps(family, changes, tolerance):
    work = replace(WORK, **changes)
    torch.manual_seed(0)
    few, many = (kept_bytes(make(family, layers, work), work.autocast) for layers in LAYERS)
    measured = (many - few) / (LAYERS[1] - LAYERS[0]) / work.tokens
    config = make(family, 4, work).config.to_dict()
    shape = shape_of(config)
    layers = list(layers_of(shape))
    # The two additional layers are local ones.
    kept = layer_bytes(shape, layers[0], work) + layer_copies(shape, layers[0], work) / work.tokens
    assert kept == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("prompt", [20, 60], ids=["within the window", "beyond it"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("gemma1", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma3n_text", {"num_kv_shared_layers": 2}),
        ("gemma4_text", {"num_kv_shared_layers": 2}),
        ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    ],
)
def test_what_a_cache_holds(family: str, more: dict[str, Any], prompt: int) -> None:
    """Of a batch that is drawn with `generate`: the last token of a response is never put into the cache."""
    config_class, model_class, own = GENERATIONS[family]
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if own else {}
    config = getattr(transformers, config_class)(**SIZES | own | more | kinds, num_hidden_layers=4)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    rows, new = 3, 8
    ids = torch.arange(rows * prompt).reshape(rows, prompt) % 400 + 5
    made = model.generate(
        ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, return_dict_in_generate=True, eos_token_id=None
    )
    held = [tensor for layer in made.past_key_values.layers for tensor in (layer.keys, layer.values)]
    storages = sum(tensor.untyped_storage().nbytes() for tensor in held if tensor is not None)
    assert storages == rows * cache_bytes(shape_of(config.to_dict()), prompt + new - 1, 4)
