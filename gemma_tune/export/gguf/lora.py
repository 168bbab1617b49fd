"""A LoRA adapter alone as GGUF, for `llama-cli --lora`, `llama-server --lora` or Ollama's ADAPTER.

llama.cpp adds alpha / r * B A to a weight, with one alpha for the file and r the rank of each pair (llama.cpp,
src/llama-adapter.h, get_scale). What PEFT does beyond that (rsLoRA, alphas or ranks by pattern, a share in a
combination) is a factor of each pair: it goes into alpha where all pairs have the same one, and otherwise into B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.facts import Decoder, read_decoder
from gemma_tune.export.gguf.tensors import arch_of
from gemma_tune.export.gguf.write import Written, add_general, check_gguf, writing
from gemma_tune.export.names import core_name
from gemma_tune.export.weights import header_of, refusing_damage
from gemma_tune.gemma.families import Family
from gemma_tune.models.lora import CONFIG, WEIGHTS
from gemma_tune.models.remedies import is_tower
from gemma_tune.plan.facts import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

_MERGE = "merge it into its base and export the whole model: --format gguf"

# Settings of peft.LoraConfig that change what the two matrices mean. All are falsy in a plain LoRA.
_BEYOND = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the adapter (modules_to_save)",
    "trainable_token_indices": "trained rows of the embedding (trainable_token_indices)",
    "target_parameters": "adapted parameters that are no linear layers (target_parameters)",
    "layer_replication": "replicated layers",
    "lora_bias": "biases (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron layers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two matrices of one weight: names in adapter_model.safetensors, shapes, and the factor of B A."""

    down: str
    up: str
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]
    factor: float

    @property
    def alpha(self) -> float:
        """With which llama.cpp has this factor."""
        return self.factor * self.down_shape[0]


def write_lora_gguf(
    adapter: Path,
    model: Path,
    file: Path,
    *,
    family: Family,
    about: Mapping[str, Any],
    weight: float = 1.0,
) -> Written:
    """Write an adapter for the GGUF file of its base. Matrices are F32.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        model: folder with the config.json of the base.
        file: is overwritten.
        family: the row of the base.
        about: as in `write_gguf`.
        weight: by which the whole adapter is multiplied.

    Raises:
        UserError: the adapter holds what llama.cpp cannot express, or does not belong to such a base.
        AccessError: the package `gguf` is missing.
    """
    check_gguf()
    decoder = read_decoder(model, family)
    config = read_json(adapter / CONFIG)
    _check_plain(config, adapter)
    pairs = _pairs(adapter, config, decoder, weight)
    alphas = [pair.alpha for pair in pairs.values()]
    alpha = alphas[0]
    with writing(file, decoder) as writer:
        add_general(writer, about, "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        _add_pairs(writer, adapter / WEIGHTS, pairs, alpha)
    return Written(file, 2 * len(pairs), 0, file.stat().st_size)


def _check_plain(config: Mapping[str, Any], adapter: Path) -> None:
    where = str(adapter / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"llama.cpp reads LoRA adapters, not {config.get('peft_type')}", where=where, fix=_MERGE)
    beyond = [name for key, name in _BEYOND.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append(f"trained biases (bias: {config['bias']})")
    if beyond:
        raise UserError(f"llama.cpp has no adapters with {', '.join(beyond)}", where=where, fix=_MERGE)


def _pairs(adapter: Path, config: Mapping[str, Any], decoder: Decoder, weight: float) -> dict[str, _Pair]:
    """Name of the weight in the base's file -> its pair, in the order of the layers."""
    import gguf

    header = header_of(adapter / WEIGHTS)
    where = str(adapter / WEIGHTS)
    table = gguf.get_tensor_name_map(arch_of(decoder), decoder.layers)
    pairs: dict[str, _Pair] = {}
    for name, (shape, _) in header.items():
        if ".lora_A.weight" not in name and ".lora_B.weight" not in name:
            raise UserError(f"llama.cpp has no place for the tensor {name}", where=where, fix=_MERGE)
        if ".lora_B.weight" in name:
            continue
        module = name.removesuffix(".lora_A.weight")
        found = None if is_tower(module) else table.get_name(f"model.{core_name(module)}")
        if found is None or not found.startswith("blk."):
            raise UserError(f"llama.cpp puts no adapter on {core_name(module)}", where=where, fix=_MERGE)
        up = f"{module}.lora_B.weight"
        if up not in header or header[up][0][1] != shape[0]:
            raise UserError(f"{name} has no {up} of its rank", where=where, fix="copy the adapter again")
        factor = weight * _scaling(config, module.removeprefix("base_model.model."), shape[0])
        pairs[f"{found}.weight"] = _Pair(name, up, shape, header[up][0], factor)
    if not pairs or any(pair.factor == 0 for pair in pairs.values()):
        raise UserError("the adapter changes nothing", where=where, fix="train at least one layer")
    return dict(sorted(pairs.items(), key=lambda item: (int(item[0].split(".")[1]), item[0])))


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A with (peft, tuners/lora/layer.py, update_layer)."""
    from peft.utils.other import get_pattern_key

    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _add_pairs(writer: GGUFWriter, file: Path, pairs: Mapping[str, _Pair], alpha: float) -> None:
    import numpy as np
    import torch
    from safetensors import safe_open

    for name, pair in pairs.items():
        for half, shape in (("a", pair.down_shape), ("b", pair.up_shape)):
            writer.add_tensor_info(f"{name}.lora_{half}", shape, np.dtype(np.float32), 4 * shape[0] * shape[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with refusing_damage(file), safe_open(str(file), "pt") as tensors:
        for pair in pairs.values():
            # Equal alphas leave B as it is, to the bit.
            rest = 1.0 if math.isclose(pair.alpha, alpha, rel_tol=1e-12) else pair.alpha / alpha
            for name, factor in ((pair.down, 1.0), (pair.up, rest)):
                tensor = tensors.get_tensor(name).to(torch.float32)
                if not bool(torch.isfinite(tensor).all()):
                    raise UserError(f"{name} is not finite", where=str(file), fix="train it again")
                writer.write_tensor_data((tensor * factor if factor != 1.0 else tensor).contiguous().numpy())
