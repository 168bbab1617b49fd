"""An adapter with the names of the class that a server loads, and the check that every one of them is a module of it.

A server that finds no module by an adapter's name loads the adapter all the same and answers as the base does (vLLM:
vllm#34186, #48019, both open in August 2026). A run with `model.text_only` on a multimodal Gemma makes such names:
`model.layers.0...`, where servers and `AutoModelForCausalLM` have `model.language_model.layers.0...`.

What servers want beyond PEFT:
  - tensors `...lora_A.weight` and `...lora_B.weight` alone; vLLM takes the modules from these names and does not look
    at `target_modules` (vllm/lora/lora_model.py, `from_local_checkpoint`);
  - `target_modules` as a list: SGLang raises at a pattern (sglang/srt/lora/utils.py, `get_normalized_target_modules`)
    and reads the last part of each name. Whole names serve both, and PEFT, which bare ones lead into towers;
  - one rank and one scale for all modules: vLLM reads `r` and `lora_alpha` and nothing else (vllm/lora/peft_helper.py).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.export.names import core_name
from gemma_tune.export.serve import VLLM_RANKS, vllm_rank
from gemma_tune.export.subject import SavedAdapter, Subject
from gemma_tune.export.updates import Adapter
from gemma_tune.export.weights import CheckpointFiles, Weights, header_of
from gemma_tune.gemma.families import Family
from gemma_tune.models.lora import CONFIG, WEIGHTS
from gemma_tune.models.remedies import is_tower
from gemma_tune.plan.facts import read_json

_PEFT = "base_model.model."
_ENDINGS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_SHOWN = 3

_NOT_SERVED = {
    "use_dora": "it is DoRA, which vLLM refuses",  # vllm/lora/peft_helper.py, lora_model.py
    "modules_to_save": "it holds whole layers, which vLLM refuses",  # vllm/lora/peft_helper.py
    "trainable_token_indices": "it holds rows of the embedding, which vLLM refuses",  # `is unsupported LoRA weight`
    "target_parameters": "it is on parameters beside layers, whose names no server reads as PEFT does",  # vllm#41754
    "layer_replication": "it repeats layers of the base, which no server does",
    "lora_bias": "it holds biases, which vLLM refuses",  # vllm/lora/peft_helper.py
    "rank_pattern": "its ranks differ from layer to layer; vLLM would scale all by one",  # vllm/lora/peft_helper.py
    "alpha_pattern": "its scales differ from layer to layer; vLLM would take one for all",  # the same
}
"""Keys of adapter_config.json that must be empty -> why."""

_BESIDE = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class AdapterCheck:
    """What was found in an adapter that fits.

    Attributes:
        modules: names of the adapted modules in the class of the base, without PEFT's prefix.
        renamed: how many of them the adapter had under another name.
        rank: of its matrices.
        max_lora_rank: the smallest value of vLLM's `--max-lora-rank` that holds it.
    """

    modules: tuple[str, ...]
    renamed: int
    rank: int
    max_lora_rank: int


def server_adapter(subject: Subject, out: Path) -> AdapterCheck:
    """Write the adapter as servers, PEFT and `AutoModelForCausalLM` open it on the base.

    Args:
        subject: with one adapter.
        out: folder to write into; made where it is missing.

    Returns:
        What was written, after it was read again and checked against the base.

    Raises:
        UserError: no single adapter, one that servers refuse, or one that does not fit the base.
    """
    import torch
    from safetensors.torch import save

    saved = _single(subject)
    config = dict(read_json(saved.folder / CONFIG))
    check_served(config, str(saved.folder))
    adapter = Adapter(saved)
    names = {name: class_name(name, subject.family) for name in header_of(saved.folder / WEIGHTS)}
    tensors: dict[str, torch.Tensor] = {f"{_PEFT}{new}": adapter.read(old) for old, new in names.items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    modules = sorted({_module(name) for name in names.values()})
    text = json.dumps(_served_config(config, modules, subject), indent=2, sort_keys=True)
    (out / CONFIG).write_text(text + "\n", encoding="utf-8")
    _copy_beside(saved.folder, subject, out)
    check = check_adapter_names(out, CheckpointFiles(subject.source.path), subject.family)
    renamed = {_module(new) for old, new in names.items() if old != f"{_PEFT}{new}"}
    return AdapterCheck(check.modules, len(renamed), check.rank, check.max_lora_rank)


def check_adapter_names(adapter: Path, weights: Weights, family: Family) -> AdapterCheck:
    """Make sure that each module of an adapter is one of the class that the base is served in, with fitting shapes.

    Args:
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        weights: of the base.
        family: generation and class of the base, as its config.json names them.

    Raises:
        UserError: modules without counterpart, all of them or some; matrices that do not fit; a rank that no server
            takes.
    """
    file = adapter / WEIGHTS
    config = read_json(adapter / CONFIG)
    shapes = _matrices(file)
    served = class_weights(weights, family)
    missing = sorted(module for module in shapes if module not in served)
    if missing:
        raise UserError(
            _unmatched(missing, len(shapes), family),
            where=str(file),
            fix=_remedy(missing[0], served, family),
        )
    odd = [name for name, (a, b) in shapes.items() if (b[0], a[1]) != served[name] or b[1] != a[0]]
    if odd:
        a, b = shapes[odd[0]]
        raise UserError(
            f"{odd[0]} is {list(served[odd[0]])} in the base, and the adapter has A {list(a)} and B {list(b)}"
            + (f", and {len(odd) - 1} more do not fit" if len(odd) > 1 else ""),
            where=str(file),
            fix="use the base that it was trained on",
        )
    rank = max(a[0] for a, _ in shapes.values())
    allowed = vllm_rank(config)
    if allowed is None or rank > allowed:
        raise UserError(
            f"its rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at most",
            where=str(adapter / CONFIG),
            fix="merge it: gemma-tune merge",
        )
    return AdapterCheck(tuple(sorted(shapes)), 0, rank, allowed)


def check_served(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that servers refuse, or serve as another one.

    Args:
        config: adapter_config.json.

    Raises:
        UserError: it is of such a kind.
    """
    reasons = [why for key, why in _NOT_SERVED.items() if config.get(key)]
    if config.get("bias") not in (None, "none"):
        reasons.append(_NOT_SERVED["lora_bias"])
    if reasons:
        raise UserError("; ".join(reasons), where=where, fix="merge it into the base instead: gemma-tune merge")


def class_name(name: str, family: Family) -> str:
    """Name of a decoder's tensor or module in the class that `AutoModelForCausalLM` loads, e.g. `model.layers.0...`.

    Args:
        name: in a checkpoint or in an adapter, of whatever class.
    """
    core = core_name(name)
    if is_tower(name) or core.partition(".")[0] == "lm_head":
        return core
    return family.adapter_prefix.removesuffix("layers") + core


def class_weights(weights: Weights, family: Family) -> dict[str, tuple[int, ...]]:
    """Module name in the class -> shape [out, in] of its weight, for everything of the text decoder that is a matrix.

    A tied head, which no checkpoint holds, has the shape of the embedding.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in weights.names():
        if name.endswith(".weight") and not is_tower(name) and len(weights.shape(name)) == 2:
            found[class_name(name, family).removesuffix(".weight")] = weights.shape(name)
    embedding = found.get(class_name("embed_tokens", family))
    if embedding is not None:
        found.setdefault("lm_head", embedding)
    return found


def _single(subject: Subject) -> SavedAdapter:
    if len(subject.adapters) != 1 or subject.adapters[0].weight != 1.0:
        raise UserError(
            "there is no adapter" if not subject.adapters else "servers take one adapter, with its own scale",
            where=subject.target,
            fix="export a run that trained one" if not subject.adapters else "choose one, or merge: gemma-tune merge",
        )
    return subject.adapters[0]


def _module(name: str) -> str:
    for ending in _ENDINGS:
        name = name.removesuffix(ending)
    return name


def _served_config(config: Mapping[str, Any], modules: list[str], subject: Subject) -> dict[str, Any]:
    """adapter_config.json for the new names. rsLoRA becomes the plain LoRA that it is, with another alpha."""
    served = dict(config) | {
        "target_modules": modules,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "base_model_name_or_path": subject.source.name,
        "revision": subject.hub_revision(),
        "inference_mode": True,
    }
    if config.get("use_rslora"):
        served |= {"use_rslora": False, "lora_alpha": config["lora_alpha"] * math.sqrt(config["r"])}
    return served


def _copy_beside(folder: Path, subject: Subject, out: Path) -> None:
    """The tokenizer of the adapter, else of the base, and the ids at which answers end."""
    source = folder if (folder / "tokenizer.json").is_file() else subject.source.path
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
        return
    family = subject.trained
    stops = {"bos_token_id": family.bos_id, "eos_token_id": list(family.stop_ids), "pad_token_id": family.pad_id}
    (out / "generation_config.json").write_text(json.dumps(stops, indent=2) + "\n", encoding="utf-8")


def _matrices(file: Path) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Module name, as the file has it but for PEFT's prefix -> shapes of A and B."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (shape, _) in header_of(file).items():
        ending = next((one for one in _ENDINGS if name.endswith(one)), None)
        if ending is None or not name.startswith(_PEFT) or len(shape) != 2:
            raise UserError(
                f"its tensor {name} is no matrix of a LoRA, and servers refuse it",
                where=str(file),
                fix="merge it into the base instead: gemma-tune merge",
            )
        found.setdefault(_module(name).removeprefix(_PEFT), {})[_ENDINGS[ending]] = shape
    if not found:
        raise UserError("the adapter has no tensors", where=str(file), fix="copy it again, or train again")
    if halves := sorted(name for name, parts in found.items() if len(parts) < 2):
        raise UserError(f"the update of {halves[0]} is not complete", where=str(file), fix="copy the adapter again")
    return {name: (parts["A"], parts["B"]) for name, parts in found.items()}


def _unmatched(missing: list[str], count: int, family: Family) -> str:
    shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    if len(missing) == count:
        return (
            f"none of its {count} modules is in {family.label} as servers load it, which would take the adapter "
            f"and answer as the base does: {shown}"
        )
    return f"{len(missing)} of its {count} modules are not in the base as servers load it: {shown}"


def _remedy(name: str, served: Mapping[str, Any], family: Family) -> str:
    right = class_name(name, family)
    if right in served:
        return f"its name there is {right}: write it anew with `gemma-tune export RUN --format adapter`"
    return "use the base that it was trained on"
