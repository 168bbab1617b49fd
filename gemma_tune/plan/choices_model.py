"""How the base is loaded and what is trained on it: types, attention, quantisation, adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_tune.gemma.families import RESIDUAL_EXPONENT, Family
from gemma_tune.plan.machine import Machine
from gemma_tune.plan.stages import continues, written
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Recipe

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp16_rescaled": "float16"}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Precision:
    """The types of a run.

    Attributes:
        weights: type in which the base is loaded (what is not quantised of it).
        compute: type of the matrix products.
        autocast: type of torch.autocast, None where no autocast is needed.
        why: reason for `compute`.
        why_weights: reason for `weights`.
        why_autocast: reason for `autocast`.
        residual_exponent: the residual stream is multiplied by two to this power (`models.rescale`); 0 for none.
    """

    weights: str
    compute: str
    autocast: Literal["bf16", "fp16"] | None
    why: str
    why_weights: str
    why_autocast: str
    residual_exponent: int = 0

    @property
    def loss_scaling(self) -> bool:
        """Whether the loss is scaled before the backward pass: small gradients underflow fp16."""
        return self.compute == "float16"


def choose_precision(recipe: Recipe, machine: Machine, family: Family) -> Precision:
    """Types that this Gemma trains in without overflow on this machine."""
    compute, why, exponent = _compute_type(recipe, machine, family)
    if recipe.adapter is None:
        # bf16 has 8 bits of mantissa: an update below 1/256 of a weight is lost, so weights are kept in fp32.
        autocast: Literal["bf16", "fp16"] | None = {"bfloat16": "bf16", "float16": "fp16"}.get(compute)  # type: ignore[assignment]
        if autocast is None:
            return Precision("float32", compute, None, why, "as computed", "everything is fp32")
        weights = "fp32 masters: small updates would be lost in 16 bits"
        why_autocast = f"matrix products in {autocast} on fp32 masters"
        return Precision("float32", compute, autocast, why, weights, why_autocast, exponent)
    if compute == "float16" and not exponent:
        # Small gradients underflow fp16, so the loss is scaled; the Trainer scales only under autocast.
        return Precision(
            compute, compute, "fp16", why, why, "fp16 gradients need loss scaling, which comes with autocast"
        )
    # peft casts what enters an adapter to the adapter's fp32 and its result back (peft 0.21, lora/bnb.py, layer.py), so
    # a 16-bit base and fp32 adapters work together as they are: less memory and faster than autocast on an fp32 base.
    no_autocast = "the base is loaded in its compute type and peft casts around the fp32 adapters"
    return Precision(compute, compute, None, why, why, no_autocast, exponent)


def _compute_type(recipe: Recipe, machine: Machine, family: Family) -> tuple[str, str, int]:
    """Type of the matrix products, the reason for it, and what the residual stream is multiplied by."""
    asked = recipe.model.precision
    if asked != "auto":
        return DTYPES[asked], "recipe", RESIDUAL_EXPONENT if asked == "fp16_rescaled" else 0
    if machine.bf16:
        return "bfloat16", f"Gemma is published in bf16 and {machine.name} multiplies it natively", 0
    if machine.device == "cpu":
        slow = f"{machine.name} has no bf16 instructions (AVX512-BF16, AMX): emulating them is slower than fp32"
        return "float32", slow, 0
    if family.fp16 == "plain":
        return "float16", f"{machine.name} has no bf16, and nobody reported {family.label} to overflow fp16 here", 0
    if family.fp16 == "rescaled":
        why = f"fp16_rescaled: {machine.name} has no bf16, and {family.label} overflows plain fp16"
        return "float16", why, RESIDUAL_EXPONENT
    return "float32", f"{machine.name} has no bf16, and {family.label} overflows fp16: slower, but it trains", 0


def choose_attention(recipe: Recipe, family: Family) -> Choice:
    """The recipe's attention, or the first that is right for this generation."""
    if recipe.model.attention != "auto":
        return Choice(recipe.model.attention, "recipe")
    first = family.attention[0]
    if family.attention_softcap is not None:
        return Choice(
            first, f"{family.label} caps attention scores at {family.attention_softcap:g}, which sdpa cannot do"
        )
    return Choice(first, f"exact for {family.label}, packed rows too, and no extra package")


def model_choices(recipe: Recipe, family: Family, precision: Precision) -> dict[str, Choice]:
    """Keywords of `models.load`."""
    model = recipe.model
    text_only = written(recipe, "model.text_only")
    if model.text_only and family.text_model_type is None:
        text_only = Choice(True, f"recipe, without effect: {family.label} has no towers")
    return {
        "name": written(recipe, "model.name"),
        "revision": Choice(
            model.revision, "recipe" if model.revision else "default: the newest; run.json records the commit"
        ),
        "tokenizer": Choice(model.tokenizer, "recipe" if model.tokenizer else "default: the model's own"),
        "text_only": text_only,
        "dtype": Choice(precision.weights, precision.why_weights),
        "attn_implementation": choose_attention(recipe, family),
        **_residual(family, precision),
    }


def _residual(family: Family, precision: Precision) -> dict[str, Choice]:
    """Where it is left as it is, nothing: runs of before have the same plan."""
    exponent = precision.residual_exponent
    if not exponent:
        return {}
    why = f"the residual stream of {family.label} overflows fp16; times a power of two its RMS norms give the same"
    return {"residual_exponent": Choice(exponent, why)}


def quantization_choices(recipe: Recipe, family: Family, precision: Precision) -> dict[str, Choice]:
    """Keywords of `transformers.BitsAndBytesConfig`; empty where the base is not quantised."""
    skip = Choice(list(family.skip_quantization), f"modules of {family.label} that must keep 16 bits")
    if recipe.model.quantization == "nf4":
        return {
            "load_in_4bit": Choice(True, "model.quantization: nf4"),
            "bnb_4bit_quant_type": Choice("nf4", "QLoRA (arXiv 2305.14314): made for normally distributed weights"),
            "bnb_4bit_use_double_quant": written(recipe, "model.double_quantization"),
            "bnb_4bit_compute_dtype": Choice(precision.compute, precision.why),
            "bnb_4bit_quant_storage": Choice(
                precision.weights, "FSDP shards packed weights only in the type of the others"
            ),
            "llm_int8_skip_modules": skip,
        }
    if recipe.model.quantization == "int8":
        return {
            "load_in_8bit": Choice(True, "model.quantization: int8"),
            "llm_int8_threshold": Choice(6.0, "LLM.int8() (arXiv 2208.07339): larger inputs are multiplied in 16 bits"),
            "llm_int8_skip_modules": skip,
        }
    return {}


def lora_choices(recipe: Recipe, family: Family, start: Start | None) -> dict[str, Choice]:
    """Keywords of `peft.LoraConfig`; empty for a full fine-tune. An adapter that is continued keeps its own."""
    if recipe.adapter is None:
        return {}
    if start is not None and continues(recipe):
        return _saved(recipe, start) | _FIXED
    return new_lora(recipe, family)


_FIXED = {
    "bias": Choice("none", "Gemma's linear layers have none"),
    "task_type": Choice("CAUSAL_LM", "what is trained"),
}


def _saved(recipe: Recipe, start: Start) -> dict[str, Choice]:
    why = f"of the adapter in {recipe.model.adapter}, which is trained on"
    silent = "" if recipe.stage == "sft" else f"; switched off in {recipe.stage}"
    return {
        "r": Choice(start.rank, why),
        "lora_alpha": Choice(start.alpha, why),
        "lora_dropout": Choice(start.dropout, why + silent),
        "target_modules": Choice(start.target_modules, why),
        "use_rslora": Choice(start.rslora, why),
        "use_dora": Choice(start.dora, why),
    }


def new_lora(recipe: Recipe, family: Family) -> dict[str, Choice]:
    """Keywords of `peft.LoraConfig` for an adapter as the recipe's `adapter` wants it."""
    targets = written(recipe, "adapter.targets").value
    return {
        "r": written(recipe, "adapter.r"),
        "lora_alpha": written(recipe, "adapter.alpha"),
        "lora_dropout": written(recipe, "adapter.dropout"),
        "target_modules": Choice(
            family.lora_targets[targets], f"{targets} of the text decoder; a list of names reaches the towers"
        ),
        "use_rslora": written(recipe, "adapter.rslora"),
        "use_dora": written(recipe, "adapter.dora"),
    } | _FIXED
