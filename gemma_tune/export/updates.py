"""Saved adapters -> the change of each weight: W + sum of weight x scale x B A, in fp32.

Handles LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), ranks and scales that differ from layer to
layer, and whole layers that were trained beside it (`modules_to_save`). The formulas are those of the papers; that they
are PEFT's too is what `export.proof` measures on each result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import UserError
from gemma_tune.export.names import core_name
from gemma_tune.export.subject import SavedAdapter
from gemma_tune.export.weights import Weights, header_of, refusing_damage
from gemma_tune.models.lora import CONFIG, WEIGHTS
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.starts import ALTER_THE_BASE

if TYPE_CHECKING:
    import torch

_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(slots=True)
class _Module:
    """Where the parts of one module's update are: core name of the module, and `a`, `b`, `magnitude` -> tensor name."""

    core: str
    parts: dict[str, str] = field(default_factory=dict)


class Adapter:
    """One saved adapter: which weights it changes, and how.

    Raises:
        UserError: it is damaged, incomplete, or of a kind that cannot be written into weights.
    """

    def __init__(self, saved: SavedAdapter) -> None:
        self.folder, self.share = saved.folder, saved.weight
        self.config = dict(read_json(saved.folder / CONFIG))
        self._file = saved.folder / WEIGHTS
        self._modules: dict[str, _Module] = {}
        self._whole: dict[str, str] = {}
        _check_kind(self.config, str(saved.folder))
        self._header = header_of(self._file)
        for name in self._header:
            self._file_away(name)
        for module in self._modules.values():
            self._check_parts(module)
        if not self._modules and not self._whole:
            raise UserError("the adapter has no tensors", where=str(self._file), fix="copy it again, or train again")

    def updated(self) -> list[str]:
        """Core names of the weights that get a low-rank update."""
        return [f"{core}.weight" for core in self._modules]

    def replaced(self) -> list[str]:
        """Core names of the weights that were saved whole."""
        return list(self._whole)

    def shapes(self, core: str) -> tuple[int, int]:
        """(out, in) of the weight that the update of `core` fits."""
        parts = self._modules[core.removesuffix(".weight")].parts
        return self._header[parts["b"]][0][0], self._header[parts["a"]][0][1]

    def shape_of_whole(self, core: str) -> tuple[int, ...]:
        return self._header[self._whole[core]][0]

    def rank(self, core: str) -> int:
        return self._header[self._modules[core.removesuffix(".weight")].parts["a"]][0][0]

    def scale(self, core: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with the module's own alpha and rank where the config has some."""
        from peft.utils.other import get_pattern_key

        patterns = self.config.get("alpha_pattern") or {}
        tensor = self._modules[core.removesuffix(".weight")].parts["a"]
        key = get_pattern_key(list(patterns), tensor.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        alpha = float(patterns.get(key, self.config["lora_alpha"]))
        rank = self.rank(core)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def read(self, name: str) -> torch.Tensor:
        """One tensor of the file, in fp32.

        Raises:
            UserError: it is damaged or not finite.
        """
        import torch
        from safetensors import safe_open

        with refusing_damage(self._file), safe_open(str(self._file), "pt") as file:
            tensor = file.get_tensor(name).float()
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} is not finite", where=str(self._file), fix="train it again, or copy an intact one")
        return tensor

    def whole(self, core: str) -> torch.Tensor:
        """A weight that was saved whole, in fp32."""
        return self.read(self._whole[core])

    def delta(self, core: str) -> torch.Tensor:
        """scale x B A: [out, in] fp32."""
        parts = self._modules[core.removesuffix(".weight")].parts
        return self.scale(core) * (self.read(parts["b"]) @ self.read(parts["a"]))

    def magnitude(self, core: str) -> torch.Tensor | None:
        """DoRA's norm of each row: [out] fp32; None where the module is plain LoRA."""
        name = self._modules[core.removesuffix(".weight")].parts.get("magnitude")
        return None if name is None else self.read(name).flatten()

    def moved(self) -> bool:
        """Whether any B has left zero, or a layer was saved whole."""
        return bool(self._whole) or any(self.read(one.parts["b"]).any() for one in self._modules.values())

    def _file_away(self, name: str) -> None:
        for ending, part in _PARTS.items():
            if name.endswith("." + ending):
                core = core_name(name.removesuffix("." + ending))
                self._modules.setdefault(core, _Module(core)).parts[part] = name
                return
        if "lora_" in name or "token_adapter" in name or not name.endswith(".weight"):
            raise UserError(
                f"its tensor {name} is of a kind that cannot be written into weights here",
                where=str(self._file),
                fix="merge it with PEFT's merge_and_unload",
            )
        self._whole[core_name(name)] = name

    def _check_parts(self, module: _Module) -> None:
        missing = {"a", "b"} - module.parts.keys()
        wanted = "magnitude" in module.parts or not self.config.get("use_dora")
        if missing or not wanted:
            raise UserError(
                f"the update of {module.core} is not complete", where=str(self._file), fix="copy the adapter again"
            )
        down, up = (self._header[module.parts[part]][0] for part in ("a", "b"))
        if len(down) != 2 or len(up) != 2:
            raise UserError(
                f"the update of {module.core} is no pair of matrices",
                where=str(self._file),
                fix="copy the adapter again",
            )
        rank, columns = down[0], up[1]
        if rank != columns:
            raise UserError(
                f"A and B of {module.core} have ranks {rank} and {columns}",
                where=str(self._file),
                fix="copy the adapter again",
            )


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"its kind is {config.get('peft_type')!r}, not LORA", where=where, fix="merge it with the tool that made it"
        )
    if type(config.get("lora_alpha")) not in (int, float):
        raise UserError("lora_alpha is missing", where=f"{where}/{CONFIG}", fix="copy the adapter again")
    if config.get("trainable_token_indices"):
        raise UserError(
            "it holds rows of the embedding (trainable_token_indices)",
            where=where,
            fix="merge it with PEFT's merge_and_unload",
        )
    if config.get("fan_in_fan_out"):
        raise UserError("it is for transposed weights (fan_in_fan_out), which no Gemma has", where=where)
    altered = str(config.get("init_lora_weights")).lower()
    if altered.startswith(ALTER_THE_BASE):
        raise UserError(
            f"its base was altered when it began (init_lora_weights: {altered})",
            where=where,
            fix="convert it to a plain LoRA first: PEFT's `path_initial_model_for_weight_conversion`",
        )


class Updates:
    """What one adapter, or several together, make of the weights of a base.

    Args:
        adapters: of one base.
        base: the weights that they are for.

    Raises:
        UserError: an adapter changes a weight that the base does not have or that has another shape, or several cannot
            be combined.
    """

    def __init__(self, adapters: Sequence[SavedAdapter], base: Weights) -> None:
        self.adapters = [Adapter(one) for one in adapters]
        self._check_combination()
        shapes = {core_name(name): base.shape(name) for name in base.names()}
        shapes.setdefault(HEAD, shapes.get(EMBEDDING, ()))
        for one in self.adapters:
            _check_fit(one, shapes)
        self.replaced = {core for one in self.adapters for core in one.replaced()}
        self.updated = {core for one in self.adapters for core in one.updated()}
        if HEAD in self.updated or EMBEDDING in self.updated:
            raise UserError(
                "it updates the embedding or the head by low ranks, which tied weights cannot hold",
                where=", ".join(str(one.folder) for one in self.adapters),
                fix="train without adapters on embed_tokens and lm_head, as the recipes do",
            )

    def apply(self, core: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight after the update, in fp32; the same tensor where nothing changes it.

        Args:
            core: core name, e.g. `layers.0.mlp.up_proj.weight`.
            weight: the base's, any type.
        """
        for one in self.adapters:
            if core in one.replaced():
                return one.whole(core)
        if core not in self.updated:
            return weight
        whole = weight.float()
        for one in self.adapters:
            if core in one.updated():
                magnitude = one.magnitude(core)
                whole = whole + one.share * one.delta(core)
                if magnitude is not None:
                    whole = (magnitude / whole.norm(dim=1)).unsqueeze(1) * whole
        return whole

    def moved(self) -> bool:
        return any(one.share != 0 and one.moved() for one in self.adapters)

    def _check_combination(self) -> None:
        if len(self.adapters) < 2 and all(one.share == 1.0 for one in self.adapters):
            return
        for one in self.adapters:
            why = "it is DoRA" if one.config.get("use_dora") else "it holds whole layers (modules_to_save)"
            if one.config.get("use_dora") or one.replaced():
                raise UserError(
                    f"{why}, which has no weighted sum with others", where=str(one.folder), fix="merge it alone"
                )


def _check_fit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    where = str(adapter.folder)
    wanted: dict[str, tuple[int, ...]] = {core: adapter.shapes(core) for core in adapter.updated()}
    wanted |= {core: adapter.shape_of_whole(core) for core in adapter.replaced()}
    missing = sorted(core for core in wanted if not shapes.get(core))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(wanted)} weights that it changes are not in the base, e.g. {missing[0]}",
            where=where,
            fix="use the base that it was trained on; names of another class or prefix match nothing",
        )
    odd = sorted(core for core, shape in wanted.items() if shapes[core] != shape)
    if odd:
        raise UserError(
            f"{odd[0]} is {list(wanted[odd[0]])} in the adapter and {list(shapes[odd[0]])} in the base",
            where=where,
            fix="use the base that it was trained on, with its own vocabulary",
        )


def adapter_names(adapters: Sequence[SavedAdapter]) -> list[str]:
    """What adapters are called in a record: the run's folder, without the place of it on a machine."""
    folders = [one.folder.absolute() for one in adapters]
    return [one.parent.name if one.name == "adapter" else one.name for one in folders]
