"""Tensors in and out: a Gemma's safetensors as arrays on the host, an adapter as PEFT's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gemma_tune.errors import TrainingError, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.models.card import write_card
from gemma_tune.plan.facts import read_json

_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
"""In front of a decoder's names: text classes, multimodal ones, and those as they were published."""


class Tensors:
    """Callable: (name behind the prefix, shape) -> the tensor, mapped from its file and in its type.

    safetensors' own reader for numpy has no bfloat16, and its reader for JAX puts each tensor on the first chip.

    Raises:
        UserError: a tensor is missing, of another shape, or of a type that is no float.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        names = read_json(index)["weight_map"].values() if index.is_file() else ["model.safetensors"]
        self._place: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for file in sorted({folder / name for name in names}):
            with open(file, "rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(size))
            self._place |= {name: (file, 8 + size, of) for name, of in header.items() if name != "__metadata__"}

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        known = next((prefix + name for prefix in _PREFIXES if prefix + name in self._place), None)
        if known is None:
            raise UserError(f"the tensor {name} is missing", where=str(self.folder), fix="fetch the model again")
        file, begin, of = self._place[known]
        if tuple(of["shape"]) != shape or of["dtype"] not in _TYPES:
            raise UserError(
                f"the tensor {known} is {of['dtype']} of {of['shape']}, not a float of {list(shape)}",
                where=str(file),
                fix="use the original 16-bit model",
            )
        return np.memmap(file, _TYPES[of["dtype"]], "r", begin + of["data_offsets"][0], shape)


def save_adapter(
    folder: Path,
    params: Mapping[str, Any],
    lora: Mapping[str, Any],
    family: Family,
    *,
    base: str,
    revision: str | None,
    tokenizer: Any,
) -> dict[str, int]:
    """Write the adapter as PEFT does, with what `models.lora.save_adapter` puts beside it.

    Returns:
        How many `tensors` and `parameters`, and how many B of how many `matrices` have `moved` from zero.

    Raises:
        TrainingError: there are no tensors, or one is not finite. Nothing is written then.
    """
    inside = family.adapter_prefix.removesuffix("layers")
    state = {
        f"base_model.model.{inside}{name}.weight": np.ascontiguousarray(np.asarray(value, np.float32))
        for name, value in params.items()
    }
    bad = [name for name, value in state.items() if not value.size or not np.isfinite(value).all()]
    if bad or not state:
        what = f"the adapter's tensor {bad[0]} is empty or not finite" if bad else "the adapter has no tensors"
        raise TrainingError(what, where=str(folder), fix="lower optim.learning_rate, or resume an earlier checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **lora,
    }
    _write(folder / "adapter_config.json", config)
    special = {"bos_token_id": family.bos_id, "pad_token_id": family.pad_id}
    _write(folder / "generation_config.json", {**special, "eos_token_id": list(family.stop_ids)})
    tokenizer.save_pretrained(str(folder))
    write_card(folder, base, family, adapter=True)
    matrices = [value for name, value in state.items() if ".lora_B." in name]
    return {
        "tensors": len(state),
        "parameters": sum(value.size for value in state.values()),
        "moved": sum(bool(value.any()) for value in matrices),
        "matrices": len(matrices),
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
