"""LoRA: put an adapter on a base, save it, and open a finished run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_tune.errors import GemmaTuneError, TrainingError, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.models import remedies
from gemma_tune.models.card import write_card
from gemma_tune.models.load import set_stop_ids, source_of
from gemma_tune.models.modes import follow_umask
from gemma_tune.models.roles import REFERENCE, TRAINED, belongs, speak_as, speaking
from gemma_tune.plan.starts import adapter_folder, is_reward_model

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What was found in an adapter's tensors.

    Attributes:
        tensors, parameters: how many.
        moved: how many B matrices have left zero. Untrained, all of them are zero.
        matrices: how many B matrices there are.
    """

    tensors: int
    parameters: int
    moved: int
    matrices: int


def attach(model: PreTrainedModel, lora: Mapping[str, Any], family: Family) -> PeftModel:
    """Put a LoRA adapter on the base. Its weights are fp32, whatever the base is.

    Args:
        model: from `load_base`.
        lora: `Plan.values("lora")`, keywords of peft.LoraConfig.

    Raises:
        UserError: no module of the model matches the targets.
    """
    from peft import LoraConfig, get_peft_model

    source = source_of(model)
    config = LoraConfig(**lora)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as exc:
        if "not found in the base model" not in str(exc) and "No modules were targeted" not in str(exc):
            raise
        raise UserError(
            f"no layer of {family.label} matches the LoRA targets",
            where="adapter.targets",
            fix="use all-linear, attention or mlp",
        ) from exc
    # For who opens the adapter later: the name that the user wrote, not the cache folder that it was loaded from.
    active = adapted.peft_config[TRAINED]
    active.base_model_name_or_path = source.name
    active.revision = source.revision if _is_commit(source.revision) else None
    modules = adapted_modules(adapted)
    if inside := [name for name in modules if remedies.is_tower(name)]:
        raise GemmaTuneError(f"the adapter reached into a tower: {inside[0]}; the targets of {family.name} are wrong")
    keep_fp32(adapted)
    return adapted


def begin_with(
    model: PreTrainedModel,
    start: str | Path,
    lora: Mapping[str, Any],
    family: Family,
    *,
    mode: Literal["continue", "stack"] = "continue",
    keep_frozen: bool = False,
) -> PeftModel:
    """Put a saved adapter on the base and train on from there.

    Args:
        model: from `load_base`.
        start: run or adapter folder; its tensors must be those of this base.
        lora: keywords of peft.LoraConfig for the new adapter of `stack`; `continue` has those of the saved one.
        mode: `continue` trains the saved adapter; `stack` freezes it and trains a new one on top.
        keep_frozen: with `continue`, hold a frozen copy as well (the reference of DPO), named `roles.REFERENCE`.

    Returns:
        A model whose adapter `roles.TRAINED` is trained, in fp32.

    Raises:
        UserError: no adapter there, a reward model, or an adapter of another base.
    """
    from peft import LoraConfig

    folder = adapter_folder(start)
    if is_reward_model(folder):
        raise UserError("it is a reward model", where=str(folder), fix="begin with the adapter of an SFT or DPO run")
    source = source_of(model)
    if mode == "continue":
        adapted = open_adapter(model, folder, trained=True)
        if keep_frozen:
            adapted.load_adapter(str(folder), REFERENCE, is_trainable=False)
        speak_as(adapted, [TRAINED])
    else:
        adapted = open_adapter(model, folder, name=REFERENCE)
        frozen: Any = adapted.peft_config[REFERENCE]
        frozen.target_modules = _as_pattern(frozen.target_modules)  # PEFT adds no list to the pattern of the new one
        adapted.add_adapter(TRAINED, LoraConfig(**lora))
        speak_as(adapted, [REFERENCE, TRAINED])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad = belongs(name, TRAINED)
    active = adapted.peft_config[TRAINED]
    active.inference_mode = False
    active.base_model_name_or_path = source.name
    active.revision = source.revision if _is_commit(source.revision) else None
    keep_fp32(adapted)
    return adapted


def _as_pattern(modules: str | Collection[str]) -> str:
    """Names of modules as the pattern that finds the same ones: each is a module's whole name, or the end of it."""
    if isinstance(modules, str):
        return modules
    return rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(modules)))})"


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40


def adapted_modules(model: PeftModel) -> list[str]:
    """Names of the modules that carry an adapter, e.g. `base_model.model.model.layers.0.mlp.up_proj`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def keep_fp32(model: torch.nn.Module) -> int:
    """Give every trainable parameter fp32, whatever the base or the saved adapter has.

    An update below 1/256 of a weight's size is rounded away in bf16, so that at small learning rates most of A never
    moves. `train.trainer.sheltered` keeps TRL from casting them down again.

    Returns:
        How many tensors were cast.
    """
    import torch

    cast = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
            cast += 1
    return cast


def inspect_adapter(state: Mapping[str, torch.Tensor], where: str = "adapter") -> AdapterReport:
    """Refuse an adapter that is empty or not finite; count what moved.

    Raises:
        TrainingError: no tensors, an empty tensor (a sharded save that lost them), or NaN and infinity.
    """
    import torch

    if not state:
        raise TrainingError("the adapter has no tensors", where=where, fix="train at least one layer")
    for name, tensor in state.items():
        if tensor.numel() == 0:
            raise TrainingError(
                f"the adapter's tensor {name} is empty", where=where, fix="gather the shards before saving"
            )
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"the adapter's tensor {name} is not finite",
                where=where,
                fix="lower optim.learning_rate, or resume from an earlier checkpoint",
            )
    matrices = [tensor for name, tensor in state.items() if ".lora_B." in name]
    moved = sum(bool(tensor.any()) for tensor in matrices)
    return AdapterReport(len(state), sum(tensor.numel() for tensor in state.values()), moved, len(matrices))


def save_adapter(
    model: PeftModel, folder: str | Path, family: Family, tokenizer: PreTrainedTokenizerBase | None = None
) -> AdapterReport:
    """Write the adapter as PEFT does, so that PEFT, vLLM and the hub open it; with what inference needs beside it.

    Files: adapter_model.safetensors, adapter_config.json, generation_config.json (all stop ids), README.md, NOTICE and
    LICENSE.txt, and the tokenizer's if one is given. Modes follow the umask. The network is not asked.

    Returns:
        What was saved; `moved` is below `matrices` where training did not reach all layers.

    Raises:
        TrainingError: see `inspect_adapter`. Nothing is written then.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    with _one_adapter(model) as name:
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        report = inspect_adapter(state, str(folder))
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        if name != TRAINED:  # PEFT gives every other name a folder of its own
            for file in (folder / name).iterdir():
                file.replace(folder / file.name)
            (folder / name).rmdir()
    base: Any = model.get_base_model()
    set_stop_ids(base, family)
    base.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_card(folder, model.peft_config[TRAINED].base_model_name_or_path or "", family, adapter=True)
    follow_umask(file for file in folder.iterdir() if file.is_file())
    return report


@contextmanager
def _one_adapter(model: PeftModel) -> Iterator[str]:
    """The name of the adapter to save: of two that speak together, one that is both, of the sum of their ranks.

    Concatenated ranks add up to exactly the sum of both updates, so that whoever loads the result needs one adapter.
    """
    names = speaking(model)
    if len(names) == 1:
        yield names[0]
        return
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(names, [1.0] * len(names), "stacked", combination_type="cat")
    whole = model.peft_config["stacked"]
    whole.base_model_name_or_path = model.peft_config[TRAINED].base_model_name_or_path
    whole.revision = model.peft_config[TRAINED].revision
    try:
        yield "stacked"
    finally:
        model.delete_adapter("stacked")
        speak_as(model, names)


def open_adapter(base: PreTrainedModel, folder: Path, *, name: str = TRAINED, trained: bool = False) -> PeftModel:
    """Put a saved adapter on its base. PEFT only warns where tensors are missing or left over; here it is an error."""
    from peft import PeftModel

    with _refusing_foreign(folder) as saved:
        model = PeftModel.from_pretrained(base, str(folder), adapter_name=name, is_trainable=trained)
    _check_tensors(model, folder, name, saved)
    return model.eval()


def add_saved(model: PeftModel, folder: Path, name: str) -> None:
    """Put a further saved adapter beside those that `model` has; what speaks and what is trained is up to the caller.

    Raises:
        UserError: as `open_adapter`.
    """
    with _refusing_foreign(folder) as saved:
        model.load_adapter(str(folder), name, is_trainable=False)
    _check_tensors(model, folder, name, saved)


@contextmanager
def _refusing_foreign(folder: Path) -> Iterator[set[str]]:
    """The names of the saved tensors; what PEFT raises when it loads them says what to do about it."""
    from safetensors import SafetensorError, safe_open

    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{WEIGHTS} is missing", where=str(folder), fix="an adapter in pickle form is refused")
    try:
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            saved = set(file.keys())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # said below, as an error
            yield saved
    except SafetensorError as exc:
        raise UserError(f"it is damaged: {exc}", where=str(folder / WEIGHTS), fix="copy the adapter again") from exc
    except (RuntimeError, ValueError) as exc:
        raise UserError(
            "this adapter does not fit the base model", where=str(folder), fix="use the base that it was trained on"
        ) from exc


def _check_tensors(model: PeftModel, folder: Path, name: str, saved: set[str]) -> None:
    import torch
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if saved != state.keys():
        odd = sorted(saved ^ state.keys())
        # A multimodal checkpoint that is loaded for text alone calls its layers by shorter names.
        alike = {name.replace(".language_model", "") for name in saved} == {
            name.replace(".language_model", "") for name in state
        }
        raise UserError(
            f"{len(odd)} tensors of the adapter and the base model do not pair, e.g. {odd[0]}",
            where=str(folder),
            fix="set model.text_only as in the run that made it" if alike else "use the base that it was trained on",
        )
    for tensor in sorted(state):
        if not torch.isfinite(state[tensor]).all():
            raise UserError(
                f"{tensor} is not finite", where=str(folder / WEIGHTS), fix="train it again, or copy an intact one"
            )
