"""Tiny Gemmas with a tokenizer that a GGUF file can hold, and one way to write such a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gemma_tune.export.gguf.tensors import Kind
from gemma_tune.export.gguf.write import Written, write_gguf
from gemma_tune.export.weights import CheckpointFiles
from gemma_tune.gemma.families import family_of

ABOUT = {
    "name": "Tiny",
    "license": "gemma",
    "tags": ["test"],
    "languages": ["en"],
    "base_models": [{"name": "Base", "organization": "Somebody", "repo_url": "https://huggingface.co/somebody/base"}],
}

SIX = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
"""Layers in the order of the published Gemma 3."""


def close_merges(document: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose merges are all pairs of pieces that make a piece, runs first, as Google's are."""
    vocab = document["model"]["vocab"]
    runs = sorted((piece for piece in vocab if piece[0] in "\n▁" and len({*piece}) == 1 < len(piece)), key=len)
    made = [left + right for left, right in document["model"]["merges"]]
    merges = [
        [piece[:size], piece[size:]]
        for piece in dict.fromkeys([*reversed(runs), *made])
        for size in range(len(piece) - 1, 0, -1)
        if piece[:size] in vocab and piece[size:] in vocab
    ]
    return document | {"model": document["model"] | {"merges": merges}}


def with_closed_merges(folder: Path, into: Path) -> Path:
    """A copy of a tiny Gemma whose tokenizer can be written as GGUF."""
    shutil.copytree(folder, into)
    file = into / "tokenizer.json"
    closed = close_merges(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(closed, ensure_ascii=False), encoding="utf-8")
    return into


def write_tiny(folder: Path, file: Path, kind: Kind = "f32") -> Written:
    """The model in `folder` as a GGUF file."""
    family = family_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return write_gguf(CheckpointFiles(folder), folder, folder, file, family=family, kind=kind, about=ABOUT)
