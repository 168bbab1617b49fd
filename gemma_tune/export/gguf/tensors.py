"""Names, types and bytes of the tensors of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.facts import Decoder
from gemma_tune.export.names import core_name
from gemma_tune.models.remedies import is_tower

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import MODEL_ARCH, GGMLQuantizationType

Kind = Literal["f32", "f16", "bf16", "q8_0"]

_HEAD = "lm_head.weight"
_SLAB = 1 << 23
"""Elements that are converted at once: 32 MiB in fp32."""


def arch_of(decoder: Decoder) -> MODEL_ARCH:
    """The number of the architecture in the `gguf` package."""
    import gguf

    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == decoder.facts.arch)


def gguf_names(names: Sequence[str], decoder: Decoder, where: str) -> dict[str, str]:
    """Name in the checkpoint -> name in the file, of every tensor that goes into it, in the order of the file.

    Towers stay out, and so does the head where it is the embedding.

    Raises:
        UserError: a tensor that llama.cpp has no place for, or one that it needs and that is missing.
    """
    import gguf

    table = gguf.get_tensor_name_map(arch_of(decoder), decoder.layers)
    placed: dict[str, str] = {}
    for name in names:
        core = core_name(name)
        if is_tower(name) or (core == _HEAD and decoder.tied):
            continue
        found = table.get_name(core if core == _HEAD else f"model.{core}", try_suffixes=(".weight",))
        if found is None:
            raise UserError(
                f"llama.cpp has no place for the tensor {name} in the architecture {decoder.facts.arch}",
                where=where,
                fix="export it as safetensors",
            )
        placed[name] = found
    _check_complete(set(placed.values()), decoder, where)
    return dict(sorted(placed.items(), key=lambda item: _place(item[1])))


def _check_complete(found: set[str], decoder: Decoder, where: str) -> None:
    import gguf

    needed = set()
    for tensor in gguf.MODEL_TENSORS[arch_of(decoder)]:
        pattern = gguf.TENSOR_NAMES[tensor]
        if tensor != gguf.MODEL_TENSOR.OUTPUT or not decoder.tied:
            numbers = range(decoder.layers) if "{bid}" in pattern else range(1)
            needed |= {f"{pattern.format(bid=number)}.weight" for number in numbers}
    if missing := sorted(needed - found):
        raise UserError(
            f"{len(missing)} tensors are missing, e.g. what llama.cpp calls {missing[0]}",
            where=where,
            fix="use a complete checkpoint of the base's architecture",
        )


def _place(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block.group(1)) if block else -1, name)


def type_of(shape: Sequence[int], kind: Kind) -> GGMLQuantizationType:
    """The type in which a tensor is stored: vectors in F32; what Q8_0 cannot hold (rows not of 32s) in F16."""
    from gguf import GGMLQuantizationType as Types

    if len(shape) == 1:
        return Types.F32
    if kind == "q8_0" and shape[-1] % 32:
        return Types.F16
    return Types[kind.upper()]


def size_of(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor of that type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = 1
    for length in shape:
        count *= length
    return count // block * size


def encode(tensor: torch.Tensor, kind: GGMLQuantizationType, *, offset: float = 0.0, where: str = "") -> np.ndarray:
    """The bytes of a tensor, with `offset` added in fp32 first.

    Args:
        tensor: of any floating type; one or two dimensions.

    Returns:
        uint8, as many as `size_of` says. Beside it and the tensor, only a slab of rows is held.

    Raises:
        UserError: a value is not finite, or becomes so in F16.
    """
    import gguf
    import numpy as np
    import torch

    rows = tensor.reshape(-1, tensor.shape[-1])
    out = np.empty((rows.shape[0], size_of(rows.shape[1:], kind)), dtype=np.uint8)
    step = max(1, _SLAB // rows.shape[1])
    largest = float(np.finfo(np.float16).max) if kind == gguf.GGMLQuantizationType.F16 else float("inf")
    for start in range(0, rows.shape[0], step):
        slab = rows[start : start + step].to(torch.float32) + offset
        if not bool(torch.isfinite(slab).all()) or float(slab.abs().max()) > largest:
            finite = bool(torch.isfinite(slab).all())
            raise UserError(
                f"{where} holds values that do not fit into f16" if finite else f"{where} is not finite",
                where="gguf",
                fix="choose bf16 or q8_0" if finite else "train it again, or copy an intact one",
            )
        encoded = gguf.quants.quantize(np.ascontiguousarray(slab.numpy()), kind)
        out[start : start + step] = encoded.view(np.uint8).reshape(slab.shape[0], -1)
    return out.reshape(-1)
