"""Open what was saved: a run, an adapter folder or a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family, family_of, text_only
from gemma_tune.models.gguf_files import find_gguf, open_gguf
from gemma_tune.models.load import dtype_of_machine, load_base, on_gpu, residual_exponent_of
from gemma_tune.models.lora import CONFIG, open_adapter
from gemma_tune.models.reference import ModelSource, resolve
from gemma_tune.models.tokenizer import load_tokenizer, open_tokenizer
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.starts import is_reward_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Saved:
    """A run, an adapter folder or a plain model, as found on disk."""

    name: str
    revision: str | None
    adapter: Path | None
    plan: Mapping[str, Any]

    def section(self, name: str, *keys: str) -> dict[str, Any]:
        """Bare values of a section of the run's plan.json; empty without a plan."""
        choices = self.plan.get(name, {})
        return {key: choices[key]["value"] for key in (keys or choices) if key in choices}


def load_run(target: str | Path, **changes: Any) -> tuple[Any, PreTrainedTokenizerBase, Family]:
    """Open a finished run, an adapter folder, or a plain model, to talk to it.

    Args:
        target: run folder (with plan.json and adapter/ or model/), adapter folder, model folder, GGUF file or the
            folder that holds it alone, hub id or packaged weights.
        changes: replace keywords of the plan's model section, e.g. `dtype="float32"`.

    Returns:
        The model in evaluation mode, the tokenizer with its official template, and the family.

    Raises:
        UserError: nothing there that could be opened, or an adapter that does not fit its base.
    """
    gguf = find_gguf(target)
    if gguf is not None:
        return open_gguf(gguf, changes)
    saved = find_saved(target)
    if saved.adapter is not None and is_reward_model(saved.adapter):
        raise UserError(
            "this is a reward model: it rates answers and gives none",
            where=str(saved.adapter),
            fix="load it with gemma_tune.models.reward.load_reward, or talk to the run of an SFT or DPO",
        )
    return open_saved(saved, **changes)


def load_adapted(folder: str | Path, **changes: Any) -> tuple[Any, PreTrainedTokenizerBase, Family]:
    """As `load_run`, whatever the adapter is for."""
    return open_saved(find_saved(folder), **changes)


def open_saved(saved: Saved, **changes: Any) -> tuple[Any, PreTrainedTokenizerBase, Family]:
    source = resolve(saved.name, saved.revision, need="config")
    family = family_of(read_json(source.path / "config.json"), where=source.name)
    recorded = saved.section("model", "dtype", "attn_implementation", "text_only")
    planned = saved.section("model", "dtype", "residual_exponent")
    quantization = saved.section("quantization") if saved.adapter else {}
    if recorded.get("dtype") == "float16" and "dtype" not in changes and not on_gpu():
        recorded["dtype"] = dtype_of_machine(family)
        console.note(
            f"{saved.name}: this run computed in fp16, which a CPU only emulates; here it is {recorded['dtype']}"
        )
        if "bnb_4bit_compute_dtype" in quantization:
            quantization["bnb_4bit_compute_dtype"] = recorded["dtype"]
    model = {"dtype": dtype_of_machine(family), **recorded, **changes, "name": saved.name, "revision": saved.revision}
    as_trained = planned.get("dtype") == model["dtype"]
    exponent = planned.get("residual_exponent", 0) if as_trained else 0
    model["residual_exponent"] = residual_exponent_of(model["dtype"], family, exponent)
    if model.get("text_only"):
        family = text_only(family)
    base = load_base(model, quantization, family)
    tokenizer = _tokenizer_of(saved, family)
    return (open_adapter(base, saved.adapter) if saved.adapter else base), tokenizer, family


def find_saved(target: str | Path) -> Saved:
    folder = Path(target).expanduser()
    adapter = next((one for one in (folder / "adapter", folder) if (one / CONFIG).is_file()), None)
    plan = _plan_of(folder.parent if adapter == folder else folder)
    if adapter is not None:
        config = read_json(adapter / CONFIG)
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str):
            raise UserError("it names no base model", where=str(adapter / CONFIG), fix="copy the adapter again")
        return Saved(base, config.get("revision"), adapter, plan)
    if (folder / "model" / "config.json").is_file():
        return Saved(str(folder / "model"), None, None, plan)
    if plan:
        raise UserError("this run holds no adapter and no model yet", where=str(folder), fix="let it finish, or resume")
    return Saved(str(target), None, None, {})


def _plan_of(folder: Path) -> Mapping[str, Any]:
    file = folder / "plan.json"
    return read_json(file) if file.is_file() else {}


def _tokenizer_of(saved: Saved, family: Family) -> PreTrainedTokenizerBase:
    if saved.adapter is not None and (saved.adapter / "tokenizer.json").is_file():
        return open_tokenizer(ModelSource(str(saved.adapter), saved.adapter, None), family)
    other = saved.section("model", "tokenizer").get("tokenizer")
    return load_tokenizer(other or saved.name, None if other else saved.revision, family)
