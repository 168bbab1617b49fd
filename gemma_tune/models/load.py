"""Open a Gemma for training or for talking to it: the one place where weights come in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import RESIDUAL_EXPONENT, Family, family_of, text_only
from gemma_tune.models import remedies
from gemma_tune.models.reference import ModelSource, quiet_transformers, resolve
from gemma_tune.models.rescale import rescale_residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_KEYS = {r"^(?:language_model\.model|model\.language_model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}
"""Names of the decoder's tensors in multimodal checkpoints -> in the text-only class.

Without it transformers loads a multimodal Gemma into the text-only class with random weights and a warning.
"""

_SHOWN = 3


def load_base(
    model: Mapping[str, Any], quantization: Mapping[str, Any], family: Family, *, device: str | None = None
) -> PreTrainedModel:
    """The base model, on the device of this process, ready for an adapter or a full fine-tune.

    Args:
        model: `Plan.values("model")`: name, revision, text_only, dtype, attn_implementation, residual_exponent.
        quantization: keywords of BitsAndBytesConfig; empty for none.
        family: the generation that the plan was made for.
        device: another one than this process's own, such as `cpu` for weights that go to a GPU in parts.

    Returns:
        The model in evaluation mode, towers frozen, caching off, with every stop id of the generation in its
        generation_config. `source_of(model)` tells where it came from.

    Raises:
        UserError: not this Gemma, tensors missing or of another shape, attention that does not fit.
        AccessError: no CUDA device, no memory, or a package that the class needs is missing.
    """
    source = resolve(model["name"], model.get("revision"))
    only_text = bool(model.get("text_only"))
    _check_family(source, family, only_text)
    attention = str(model.get("attn_implementation") or family.attention[0])
    remedies.check_attention(attention, family)
    loaded, report = _from_pretrained(
        source,
        only_text,
        dtype=dtype_named(model.get("dtype") or "bfloat16"),
        attn_implementation=attention,
        quantization_config=_quantization(quantization, family),
        device_map={"": device} if device else device_map(),
    )
    check_report(report, source.name, only_text)
    prepare(loaded, family, model.get("residual_exponent") or 0)
    object.__setattr__(loaded, "_gemma_tune_source", source)
    return loaded


def source_of(model: Any) -> ModelSource:
    """Where a model of `load_base` came from; also through a PEFT model around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    source: ModelSource = base._gemma_tune_source
    return source


def _check_family(source: ModelSource, family: Family, only_text: bool) -> None:
    config = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    found = family_of(config, where=source.name)
    if family.name not in {found.name, text_only(found).name if only_text else found.name}:
        raise UserError(
            f"this is {found.label}, but the plan was made for {family.label}",
            where=source.name,
            fix="plan again: the model's folder or revision has changed",
        )


def _from_pretrained(source: ModelSource, only_text: bool, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    remedies.import_bitsandbytes()
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(source.path), local_files_only=True, trust_remote_code=False)
            if only_text and config.get_text_config() is not config:
                config = config.get_text_config()
                kwargs["key_mapping"] = TEXT_KEYS
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(source.path),
                config=config,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                **kwargs,
            )
    except ImportError as exc:
        # The vision tower of Gemma 3n is a timm model.
        missing = "timm" if "timm" in str(exc) else (exc.name or "a package")
        raise AccessError(
            f"the class of this model needs {missing}, which is not installed",
            where=source.name,
            fix=f"pip install {missing}" + ("; or set model.text_only: true" if missing == "timm" else ""),
        ) from exc
    except RuntimeError as exc:
        raise _load_error(exc, source.name) from exc
    model, report = loaded
    return model, report


def _load_error(exc: RuntimeError, where: str) -> Exception:
    """transformers reports tensors of another shape as a RuntimeError; anything else passes through."""
    text = str(exc)
    if "size mismatch" in text or "mismatched" in text.lower() or "shape" in text:
        return UserError(
            "tensors in the file have other shapes than config.json says",
            where=where,
            fix="config.json and the weights belong to different models: download both again",
        )
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return AccessError(
            "the model does not fit into memory",
            where=where,
            fix="see `gemma-tune check` for what it needs; use quantization: nf4 or a smaller model",
        )
    return exc


def check_report(report: Mapping[str, Any], where: str, only_text: bool) -> None:
    """Refuse a model that is in part random; say what was left over."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"{len(missing)} tensors are missing in the weights and would be random: {_some(missing)}",
            where=where,
            fix="fetch the complete model; an adapter or a head alone is not a model",
        )
    if report["mismatched_keys"]:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
        raise UserError(
            f"{len(names)} tensors have other shapes than config.json says: {_some(names)}",
            where=where,
            fix="config.json and the weights belong to different models: download both again",
        )
    left = sorted(name for name in report["unexpected_keys"] if not (only_text and remedies.is_tower(name)))
    if left:
        console.note(f"{where}: {len(left)} tensors of the file have no place in the model: {_some(left)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def prepare(model: PreTrainedModel, family: Family, residual_exponent: int = 0) -> None:
    """What every model needs after it was loaded, whatever it was loaded from."""
    if residual_exponent:
        rescale_residual(model, family, residual_exponent)
    remedies.keep_gradient_after_eval(model)
    remedies.keep_head_input_contiguous(model)
    remedies.keep_masks_finite(model)
    remedies.check_quantised_modules(model, family)
    remedies.forbid_reentrant_checkpointing(model, family)
    remedies.freeze_towers(model)
    # A cache is of no use in training, and a checkpointed layer would write to it twice. Generation asks for its own.
    model.config.use_cache = False
    set_stop_ids(model, family)
    model.eval()


def set_stop_ids(model: PreTrainedModel, family: Family) -> None:
    """Let generation stop at the turn end too: published base models name only `<eos>`, and never stop in a chat."""
    generation = model.generation_config
    generation.eos_token_id = list(family.stop_ids)
    generation.pad_token_id = family.pad_id
    generation.bos_token_id = family.bos_id
    generation.use_cache = True


def dtype_of_machine(family: Family) -> str:
    """For a model without a plan: bf16 where the GPU has it, else a type in which this Gemma does not overflow."""
    import torch

    if not on_gpu() or torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32" if family.fp16 == "never" else "float16"


def residual_exponent_of(dtype: str, family: Family, planned: int = 0) -> int:
    """`residual_exponent` of the model section of what is opened again, which keeps it finite in `dtype`.

    Args:
        dtype: the type it is opened in.
        family: its generation.
        planned: that of the training's plan, where it is opened in the type that was trained in. A full fine-tune in
            fp16 has weights in fp32, and overflows under the autocast in which it is evaluated, as in its training.
    """
    if family.fp16 != "rescaled":
        return 0
    return RESIDUAL_EXPONENT if dtype == "float16" else planned


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def dtype_named(name: str) -> Any:
    """The torch type of a plan's `dtype`."""
    import torch

    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise UserError(f"'{name}' is no torch dtype", where="model.precision", fix="use bf16, fp16, fp32 or auto")
    return value


def _quantization(quantization: Mapping[str, Any], family: Family) -> Any:
    if not quantization:
        return None
    from transformers import BitsAndBytesConfig

    # The default list of transformers is dropped as soon as one is given: the family's list holds lm_head too.
    return BitsAndBytesConfig(**{"llm_int8_skip_modules": list(family.skip_quantization), **quantization})


def device_map() -> dict[str, Any]:
    """All of the model on this process's device: a split model cannot be trained with DDP or FSDP."""
    import torch

    if torch.cuda.is_available():
        return {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return {"": "cpu"}


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
    """Every id that text or the renderer can produce has a row in the embedding.

    Ids of image placeholders may lie beyond it: the official tokenizer of Gemma 3 has one that its text models lack.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    reachable = (number for number in tokenizer.get_vocab().values() if number not in family.control_ids)
    highest = max((*reachable, *family.stop_ids, family.turn_start_id))
    if highest >= rows:
        raise UserError(
            f"the tokenizer has ids up to {highest}, the embedding only {rows} rows",
            where="model.tokenizer",
            fix="use the tokenizer that belongs to the model",
        )
