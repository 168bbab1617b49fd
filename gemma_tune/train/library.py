"""Prepared data that outlives a run: what `gemma-tune data prepare` made, found again by its key.

    ROOT/<first half of the key>/   see `data.prepared`, sealed like a checkpoint

Only that command adds to it. A run looks here first and reads what it finds; the rows are the same either way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.data.build import Prepared
from gemma_tune.data.content import Content
from gemma_tune.data.prepared import read_prepared, write_prepared
from gemma_tune.models.reference import cache_folder
from gemma_tune.train import checkpoint

VARIABLE = "GEMMA_TUNE_PREPARED"
"""Names another root, such as a folder that all nodes of a cluster see."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One preparation in the library.

    Attributes:
        folder: where it is.
        prepared: its contents, mapped into memory.
        made: when, by which recipe, from what (`keep`).
    """

    folder: Path
    prepared: Prepared[Any]
    made: Mapping[str, Any]


def library_folder() -> Path:
    """The root: GEMMA_TUNE_PREPARED, else `prepared` in the folder of converted weights."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).expanduser()
    return cache_folder() / "prepared"


def place_for(content: Content, root: Path | None = None) -> Path:
    """The folder of `content` below `root` (default: the library's), whether it is there or not."""
    return (root or library_folder()) / content.key[:32]


def find(content: Content, root: Path | None = None) -> Kept | None:
    """What was prepared of `content`, every file compared with its hash; None where nothing was.

    Raises:
        checkpoint.Damaged: it is there and must not be used.
    """
    folder = place_for(content, root)
    if not folder.is_dir():
        return None
    key, made = _about(checkpoint.verify(folder))
    if key != content.key:
        raise checkpoint.Damaged("it was made of something else")
    return Kept(folder, read_prepared(folder), made)


def made_of(folder: Path) -> Mapping[str, Any]:
    """`at`, `recipe`, `stage` and `rows` of what stands in `folder`; its files are not looked at.

    Raises:
        checkpoint.Damaged: there is no prepared data, or not whole.
    """
    return _about(checkpoint.read_manifest(folder))[1]


def _about(manifest: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    key, made = manifest.get("key"), manifest.get("made")
    kinds = {"at": str, "recipe": str, "stage": str, "rows": int}
    sound = isinstance(made, dict) and all(isinstance(made.get(name), kind) for name, kind in kinds.items())
    if not isinstance(key, str) or not isinstance(made, dict) or not sound:
        raise checkpoint.Damaged("it is no prepared data")
    return key, made


def keep(prepared: Prepared[Any], folder: Path, content: Content, made: Mapping[str, Any]) -> None:
    """Fill `folder`, which is empty and gets its final name later, and seal it; `made` as `made_of` gives it."""
    write_prepared(prepared, folder)
    checkpoint.seal(folder, {"key": content.key, "made": dict(made)})


def shelves(root: Path | None = None) -> Iterator[tuple[Path, int]]:
    """(folder, bytes) of everything below the root, in order of the name; what is half done begins with a dot."""
    root = root or library_folder()
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.is_dir():
            yield folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
