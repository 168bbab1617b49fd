"""What prepared data is made of, as a key: the same key, the same rows.

The fingerprint of `data.build` says what came out, and needs all rows to be read. The key says what goes in, and needs
only hashes: of the settings, of the tokenizer, of our own code between a row and its tokens, and of each source.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import gemma_tune
from gemma_tune.data.build import source_identity
from gemma_tune.data.sources import place_of
from gemma_tune.gemma.families import Family

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OWN = ("data/*.py", "gemma/*.py", "models/tokenizer.py")
"""Modules of ours that make tokens of rows."""
_LIBRARIES = ("tokenizers", "datasets")
_FREE = frozenset({"workers", "progress"})
"""Keywords that change how fast, but not what is made."""
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Content:
    """What a preparation reads.

    Attributes:
        key: sha256 over all that decides about the rows.
        functions: sources that are functions of the user's. Their files are part of the key, but a function may read
            what it likes, so that an equal key does not promise equal rows.
        commits: hub sets, by name, with the commit that is meant.
    """

    key: str
    functions: tuple[str, ...]
    commits: Mapping[str, str]


def content_of(kind: str, family: Family, tokenizer: str, keywords: Mapping[str, Any]) -> Content | None:
    """The content of what `keywords` describe; None where it cannot be told.

    That is so for a stream, for a file that is not there, and for a hub set whose commit nobody knows: without a
    network, and never downloaded. Building the data says what is wrong, if anything.

    Args:
        kind: name of the function that makes the rows (`build`, `build_pairs`, ...).
        family: of the model.
        tokenizer: content hash (`GemmaEncoder.sha256`).
        keywords: those of that function.
    """
    if keywords.get("streaming"):
        return None
    functions: list[str] = []
    commits: dict[str, str] = {}
    sources: list[Any] = []
    for source in keywords["sources"]:
        place, name = place_of(source["name"])
        if place == "hub":
            found = commit_of(name, source.get("revision"))
            if found is not None:
                commits[source["name"]] = found
        else:
            if place == "function":
                functions.append(source["name"])
            found = _sha256(Path(name))
        if found is None:
            return None
        sources.append([source_identity(source), found])
    described = {
        "kind": kind,
        "family": [family.name, family.template_sha256],
        "tokenizer": tokenizer,
        "code": code(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "settings": {key: value for key, value in keywords.items() if key not in _FREE | {"sources"}},
        "sources": sources,
    }
    key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return Content(key, tuple(functions), commits)


def commit_of(hub: str, revision: str | None) -> str | None:
    """The commit that `revision` of a hub dataset means: as written, as the hub says, or as it said the last time.

    None where nobody can tell; why the hub did not answer is said by whoever needs its data.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if not constants.HF_HUB_OFFLINE:
        try:
            return HfApi().dataset_info(hub, revision=revision, timeout=_ANSWER_SECONDS).sha
        except Exception:  # httpx's errors are plain Exceptions, and a hub without an answer is no error here
            pass
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub, repo_type="dataset")
    try:
        return (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


@cache
def code() -> str:
    """sha256 of our modules between a row and its tokens: a corrected renderer makes other rows of the same recipe."""
    digest = hashlib.sha256()
    for path in _modules():
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _modules() -> Iterator[Path]:
    root = Path(gemma_tune.__file__).parent
    for pattern in _OWN:
        yield from sorted(root.glob(pattern))


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
