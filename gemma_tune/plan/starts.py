"""The saved adapters that a training needs: what it begins with, and reward models. Reads no weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family
from gemma_tune.plan.facts import ADAPTER_FILE, read_json
from gemma_tune.recipe.schema import Recipe

WEIGHTS = "adapter_model.safetensors"
REWARD_HEAD = "reward_head.safetensors"
"""Beside the adapter of a reward model: its scalar head."""
STATS_FILE = "reward_stats.json"
"""Beside it as well: what its rewards are like, and what it was trained to read."""

_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_UNSUPPORTED = {
    "modules_to_save": "it holds whole layers beside its updates",
    "trainable_token_indices": "it holds rows of the embedding beside its updates",
    "rank_pattern": "its ranks differ from layer to layer",
    "alpha_pattern": "its scales differ from layer to layer",
}
"""Keys of adapter_config.json that must be empty -> what it means where they are not."""
ALTER_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""What `init_lora_weights` begins with where PEFT changes the base's own weights before it puts the adapter on them."""
_NOT_ADDED = {
    "use_dora": "it is DoRA",
    "use_rslora": "it is rsLoRA",
    "layers_to_transform": "it is on some layers only (layers_to_transform)",
    "exclude_modules": "it leaves out modules by name (exclude_modules)",
    "target_parameters": "it is on parameters beside layers (target_parameters)",
    "lora_bias": "it holds biases beside its updates (lora_bias)",
}
"""The same for an adapter that a new one will stand on: PEFT cannot write the sum of both as one adapter."""


@dataclass(frozen=True, slots=True)
class Start:
    """A saved LoRA adapter.

    Attributes:
        rank, alpha, dropout: as it was trained.
        target_modules: what it is on, as saved: a pattern or a list of names.
        targets: the preset that this is, or for foreign adapters the smallest that covers it.
        rslora, dora: its kind.
    """

    rank: int
    alpha: int
    dropout: float
    target_modules: str | list[str]
    targets: str
    rslora: bool
    dora: bool


def start_of(recipe: Recipe, family: Family) -> Start | None:
    """The adapter that `model.adapter` names; None where it names none.

    Raises:
        UserError: see `read_start`.
    """
    if recipe.model.adapter is None:
        return None
    return read_start(recipe.model.adapter, recipe.model.name, family, stack=recipe.model.adapter_mode == "stack")


def read_start(target: str, base: str, family: Family, *, stack: bool = False) -> Start:
    """The LoRA adapter in `target`.

    Args:
        target: run folder or adapter folder.
        base: `model.name` of the recipe.
        family: the generation of `base`.
        stack: a new adapter will stand on it, and both are saved as one.

    Raises:
        UserError: no adapter there, damaged, a reward model, on another base, or of a kind that is not supported.
    """
    folder = adapter_folder(target)
    where = str(folder)
    if is_reward_model(folder):
        raise UserError(
            "this is a reward model: its adapter rates answers and gives none",
            where=where,
            fix="set model.adapter to the run of an SFT or DPO",
        )
    config = _checked_config(folder, base)
    start = _read(config, family, str(folder / ADAPTER_FILE))
    for key, why in _NOT_ADDED.items():
        if stack and config.get(key) not in (None, False, []):
            raise UserError(
                f"{why}, which cannot be added up with another adapter",
                where=where,
                fix="set model.adapter_mode: continue",
            )
    return start


def rewards_of(recipe: Recipe, family: Family) -> tuple[Start, ...]:
    """The reward models that `ppo.reward` names, in its order; that the files of its functions exist is seen as well.

    Raises:
        UserError: see `read_reward`; or there is no such file.
    """
    if recipe.stage != "ppo":
        return ()
    for one in recipe.ppo.reward:
        file = Path(one.source.partition(":")[0]).expanduser()
        if one.kind == "function" and not file.is_file():
            raise UserError(
                f"there is no file '{file}'", where="ppo.reward", fix="paths are relative to the working directory"
            )
    return tuple(
        read_reward(source, recipe.model.name, family, scaled=recipe.ppo.normalize) for source in recipe.ppo.models
    )


def read_reward(target: str, base: str, family: Family, *, scaled: bool = True) -> Start:
    """The adapter of a reward model.

    Args:
        target: run of `gemma-tune reward`, or its adapter folder.
        base: `model.name` of the recipe.
        family: the generation of `base`.
        scaled: its rewards will be scaled by the mean and the deviation that were measured.

    Raises:
        UserError: no adapter there, no reward model, damaged, on another base, or trained on another rendering.
    """
    folder = adapter_folder(target, where="ppo.reward")
    stats = read_stats(folder)
    config = _checked_config(folder, base)
    check_stats(stats, family, str(folder))
    if scaled:
        scale_of(stats, str(folder / STATS_FILE))
    return _read(config, family, str(folder / ADAPTER_FILE))


def read_stats(folder: Path) -> dict[str, Any]:
    """reward_stats.json of an adapter folder.

    Raises:
        UserError: it holds no reward model, or the file is missing or damaged.
    """
    if not is_reward_model(folder):
        raise UserError("this is no reward model", where=str(folder), fix="give a run of `gemma-tune reward`")
    for name in (REWARD_HEAD, STATS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{name} is missing", where=str(folder), fix="copy the adapter again, all of its files")
    return dict(read_json(folder / STATS_FILE))


def check_stats(stats: Mapping[str, Any], family: Family, where: str) -> None:
    """Refuse a reward model that would rate another rendering than the one that it was trained on.

    Raises:
        UserError: another generation, template, or token to read the reward at.
    """
    for key, now in (
        ("family", family.name),
        ("template_sha256", family.template_sha256),
        ("token_id", family.turn_end_id),
    ):
        if stats.get(key) != now:
            raise UserError(
                f"the reward model was trained with {key} {stats.get(key)!r}, here it is {now!r}",
                where=where,
                fix="train it again, or use the version of gemma-tune that made it",
            )


def scale_of(stats: Mapping[str, Any], where: str = "ppo.reward") -> tuple[float, float]:
    """(mean, standard deviation) of a reward model's rewards, from its reward_stats.json.

    Raises:
        UserError: they are missing, or no scale.
    """
    mean, std = stats.get("mean"), stats.get("std")
    finite = all(type(value) in (int, float) and math.isfinite(value) for value in (mean, std))  # type: ignore[arg-type]
    if not finite or not std or std < 0:
        raise UserError(
            f"{STATS_FILE} gives no scale: mean {mean!r}, std {std!r}",
            where=where,
            fix="set ppo.normalize: false, or train the reward model again",
        )
    return float(mean), float(std)  # type: ignore[arg-type]


def _checked_config(folder: Path, base: str) -> Mapping[str, Any]:
    """adapter_config.json of a LoRA that can be trained on, whose weights are there."""
    config, where = read_json(folder / ADAPTER_FILE), str(folder)
    _check_base(config, base, where)
    if config.get("peft_type") != "LORA":
        raise _refused(f"its kind is {config.get('peft_type')!r}, not LORA", where)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refused(f"it was trained for {config['task_type']}, not to write (task_type)", where)
    for key, why in _UNSUPPORTED.items():
        if config.get(key):
            raise _refused(f"{why} ({key})", where)
    if config.get("bias", "none") != "none":
        raise _refused("it holds biases beside its updates (bias)", where)
    if str(config.get("init_lora_weights")).lower().startswith(ALTER_THE_BASE):
        raise _refused("its base was altered when it began (init_lora_weights)", where)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{WEIGHTS} is missing", where=where, fix="copy the adapter again, all of its files")
    return config


def is_reward_model(folder: Path) -> bool:
    """Whether an adapter folder is that of a reward model, also where its head was left behind in a copy."""
    return (folder / REWARD_HEAD).is_file() or (folder / STATS_FILE).is_file()


def adapter_folder(target: str | Path, where: str = "model.adapter") -> Path:
    """The folder of the adapter in a run, or the adapter's own.

    Args:
        target: run folder or adapter folder.
        where: what errors point at: the key of the recipe that names it, or the folder.

    Raises:
        UserError: there is none; says what is there instead.
    """
    folder = Path(target).expanduser()
    found = next((one for one in (folder / "adapter", folder) if (one / ADAPTER_FILE).is_file()), None)
    if found is not None:
        return found
    if not folder.exists():
        what = f"there is no folder '{target}'"
        fix = "check the path; an adapter is a folder on this machine, such as the `output` of a finished run"
    elif (folder / "model" / "config.json").is_file():
        what = f"'{target}' is a run that trained all weights"
        fix = f"set model.name: {folder / 'model'}, without an adapter"
    elif (folder / "plan.json").is_file():
        what, fix = f"the run in '{target}' holds no adapter yet", "let it finish, or resume it"
    else:
        what = f"there is no adapter in '{target}'"
        fix = f"give the folder of a finished run, or one that holds {ADAPTER_FILE}"
    raise UserError(what, where=where, fix=fix)


def _check_base(config: Mapping[str, Any], base: str, where: str) -> None:
    saved = config.get("base_model_name_or_path")
    if not isinstance(saved, str) or not saved:
        raise UserError("it names no base model", where=f"{where}/{ADAPTER_FILE}", fix="copy the adapter again")
    if _place(saved) != _place(base):
        raise UserError(
            f"this adapter was trained on {saved}, and model.name is {base}",
            where=where,
            fix=f"set model.name: {saved}, or name an adapter of {base}",
        )


def _place(name: str) -> str:
    """A folder by its whole path, so that `./base` and `/home/me/base` are the same; anything else as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _refused(why: str, where: str) -> UserError:
    return UserError(
        f"an adapter of this kind cannot be trained on: {why}", where=where, fix="begin with a plain LoRA or DoRA"
    )


def _read(config: Mapping[str, Any], family: Family, where: str) -> Start:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    modules = config.get("target_modules")
    named = isinstance(modules, list) and bool(modules) and all(isinstance(name, str) for name in modules)
    good = (
        type(rank) is int
        and rank > 0
        and type(alpha) in (int, float)
        and type(dropout) in (int, float)
        and (named or (isinstance(modules, str) and _is_pattern(modules)))
    )
    if not good:
        what = "r, lora_alpha, lora_dropout or target_modules are missing or of the wrong kind"
        raise UserError(what, where=where, fix="copy the adapter again")
    assert rank is not None and alpha is not None and modules is not None
    return Start(
        rank=rank,
        alpha=alpha,
        dropout=float(dropout),
        target_modules=modules if isinstance(modules, str) else sorted(modules),
        targets=_preset(modules, family),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
    )


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return bool(text)


def _preset(modules: str | list[str], family: Family) -> str:
    """The preset whose pattern this is; for names the smallest that covers them, for a foreign pattern the largest.

    PEFT joins the patterns of two adapters that were added up as `(one)|(other)`.
    """
    if isinstance(modules, str):
        known = family.lora_targets.items()
        same = (name for name, pattern in known if modules in (pattern, f"({pattern})|({pattern})"))
        return next(same, "all-linear")
    ends = {name.rpartition(".")[2] for name in modules}
    return "mlp" if ends <= _MLP else "all-linear" if ends & _MLP else "attention"
