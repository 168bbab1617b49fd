"""Defects of the libraries below us, each mended in one named place.

Every remedy says which versions have the defect and where it was reported. `tests/seams/test_traps.py` shows each
defect without its remedy, so that a test fails on the day it is no longer needed.

Three more remedies live elsewhere, because no loaded model shows them:
- Multimodal Gemma 3n and 4 claim `accepts_loss_kwargs = False`, so the Trainer averages each accumulation step by
  itself and weights rows wrongly (transformers 5.23). `train/` sets `model_accepts_loss_kwargs` on its trainer.
- TRL 1.16 casts the adapters of a quantised model to bf16. `train.trainer.sheltered` keeps them from it.
- A list of module names as LoRA targets fails on Gemma 4 and reaches into vision towers (peft#3129). The targets of
  `gemma.families` are one regular expression over whole names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.gemma.families import Family

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def keep_gradient_after_eval(model: nn.Module) -> int:
    """Stop bitsandbytes from repacking 4-bit weights for its CPU inference kernel.

    On CPUs with AVX512-BF16, `Linear4bit.forward` repacks its weight at the first forward pass in evaluation mode and
    keeps it so. From then on the layer computes through `gemv_4bit`, which has no backward: the loss looks normal, but
    no gradient reaches what lies below the layer. One evaluation or one sample during the training is enough.

    Defect: bitsandbytes 0.49 to at least 0.50.2; the kernel came with bitsandbytes#1804.

    Returns:
        How many layers were told not to.
    """
    count = 0
    for layer in _linear_4bit(model):
        layer.support_avx512bf16_for_cpu = False
        count += 1
    return count


def import_bitsandbytes() -> None:
    """Import bitsandbytes without letting it fetch compiled code from the hub. Call it before peft or trl are imported.

    On CPUs with AVX512-BF16, importing bitsandbytes 0.50 loads `kernels-community/quantization-bitsandbytes` from the
    hub and runs it, if the package `kernels` is installed; without that package it logs a warning that looks like a
    fault. The kernel speeds up inference on the path that `keep_gradient_after_eval` closes, so nothing is lost.
    Where bitsandbytes was imported already, or is not installed, nothing happens.
    """
    import importlib.util
    import logging
    import sys

    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, known = logger.level, "kernels" in sys.modules
    logger.setLevel(logging.ERROR)
    if not known:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # "not installed", as far as imports can tell
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)
        if not known:
            del sys.modules["kernels"]


def keep_head_input_contiguous(model: PreTrainedModel) -> None:
    """Hand the (frozen) output projection a contiguous hidden state.

    `generate` asks for the logits of the last position only: `hidden[:, -1:]` of a prompt is a strided view [B, 1, D].
    Where the weight needs no gradient, `torch.matmul` does not fold such a view into a matrix but multiplies batch by
    batch, and on a CPU copies the weight once for each row of the batch. With Gemma's 262,144 x 640 head and 16 prompts
    that took 5 GiB and 10 s, where the product of a contiguous input takes 0.02 s. On a GPU it was not measured.
    A single prompt is a view that counts as contiguous, yet has the strides of a longer one and is not folded either:
    3 s a token on one thread. So the strides are made anew, without a copy.

    Defect: `should_fold` in aten/src/ATen/native/LinearAlgebra.cpp, torch up to at least 2.13.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _, given: (given[0].flatten().view(given[0].shape), *given[1:]))


_LOWEST_MASK = -(2.0**15)  # far below every score, and far enough above -65,504 for a score to be added


def keep_masks_finite(model: PreTrainedModel) -> None:
    """Raise the lowest number in additive masks of fp16, so that mask and score do not add up to minus infinity.

    transformers masks eager attention with the lowest number of its type. In fp16, -65,504 and a score below -16 are
    minus infinity. A row of which all scores are so (a query of left padding may have such) becomes NaN, and with it
    the whole sequence, since a weight of 0 times a value of NaN is NaN. bf16 and fp32 have room below; masks of sdpa
    are boolean.

    Defect: `eager_mask` (masking_utils.py) with `eager_attention_forward` of Gemma, transformers up to at least 5.23.
    """
    import torch

    if model.dtype != torch.float16:
        return

    def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.dtype != torch.float16:
            return None
        return args, {**kwargs, "attention_mask": mask.clamp(min=_LOWEST_MASK)}

    for name, module in model.named_modules():
        if name.endswith(".self_attn") and not is_tower(name):
            module.register_forward_pre_hook(clamp, with_kwargs=True)


def _linear_4bit(model: nn.Module) -> Iterator[Any]:
    import sys

    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.nn import Linear4bit

    yield from (module for module in model.modules() if isinstance(module, Linear4bit))


def check_attention(attention: str, family: Family) -> None:
    """Refuse an attention implementation that is wrong for this generation, with the reason.

    transformers 5.23 raises a bare ValueError for Gemma 2 with sdpa, which cannot cap its scores (transformers#32309);
    flash-attention 2 ends at heads of 256, Gemma 4 has heads of 512 (LlamaFactory#10736).
    """
    if attention not in family.attention:
        raise UserError(
            f"{family.label} does not work with attention '{attention}'",
            where="model.attention",
            fix=f"use one of {', '.join(family.attention)}, or auto",
        )


def check_quantised_modules(model: nn.Module, family: Family) -> None:
    """Make sure that what must keep 16 bits has them.

    Gemma 3n clamps the weight of its AltUp predictor in place during the training, and its AltUp and Laurel maps are
    narrower than a block of 64 values. transformers 5.23 quantises them unless they are named.
    """
    names = family.skip_quantization
    for name, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes") and _is_named(name, names):
            raise GemmaTuneError(f"{name} was quantised, although {family.label} needs it in 16 bits: this is a bug")


def _is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """The rule of transformers.quantizers: a pattern from the start up to a module's border, or a suffix."""
    return any(re.match(rf"(?:{key})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(key) for key in patterns)


def forbid_reentrant_checkpointing(model: PreTrainedModel, family: Family) -> None:
    """Make the model refuse reentrant gradient checkpointing where layers share keys and values (3n, Gemma 4 E2B, E4B).

    The reentrant kind recomputes layers in reverse order and drops the gradient that flows through the shared keys and
    values: the loss is right, gradients of the layers that make them are off by half (unsloth-zoo#813, transformers up
    to at least 5.23). Plans never ask for it, but TRL 1.16 forces it under PEFT with DeepSpeed ZeRO-3.
    """
    if not family.kv_shared:
        return
    original: Any = model._set_gradient_checkpointing

    def checked(enable: bool = True, gradient_checkpointing_func: Any = None, **others: Any) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise UserError(
                f"reentrant gradient checkpointing computes wrong gradients for {family.label}",
                where="gradient checkpointing",
                fix="leave use_reentrant false; instead of DeepSpeed ZeRO-3 use FSDP, or no sharding with QLoRA",
            )
        given = (
            {} if gradient_checkpointing_func is None else {"gradient_checkpointing_func": gradient_checkpointing_func}
        )
        original(enable=enable, **given, **others)

    # On this instance, around every way in: the trainer's, PEFT's, and the method's old name.
    object.__setattr__(model, "_set_gradient_checkpointing", checked)


def freeze_towers(model: PreTrainedModel) -> int:
    """Take gradients from everything that is no part of the text decoder, e.g. for a full fine-tune.

    A tower that sees no image gets no gradient; left trainable, it costs optimizer memory and stops DDP with
    "marked ready twice" or "unused parameters".

    Returns:
        How many parameters (tensors) were frozen.
    """
    frozen = 0
    for name, parameter in model.named_parameters():
        if is_tower(name) and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen += 1
    return frozen


_TOWER = re.compile(
    r"(?:^|\.)(?:vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder|multi_modal_projector)(?:\.|$)"
)


def is_tower(name: str) -> bool:
    """Whether a module or parameter belongs to the image or audio side of a multimodal Gemma."""
    return _TOWER.search(name) is not None
