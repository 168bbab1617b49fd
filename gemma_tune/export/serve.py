"""The commands that serve what was merged or exported, ready to be pasted into a shell.

Where each flag is described:
  vLLM          `vllm serve`: docs.vllm.ai, configuration/engine_args (--generation-config, --chat-template) and
                features/lora (--enable-lora, --lora-modules); its ranks: vllm/config/lora.py, MaxLoRARanks
  SGLang        docs.sglang.io, advanced_features/server_arguments and advanced_features/lora
  llama.cpp     tools/server/README.md: -m, --lora
  Ollama        docs.ollama.com, modelfile: `ollama create NAME -f FILE`
  transformers  5.23, cli/serve.py (FORCE_MODEL). It has no way for an adapter, and none for the GGUF of a Gemma:
                cli/serving/model_manager.py reads `config.architectures[0]`, which is None there

A server that is given base and adapter takes chat template and stop ids from the base, and a pretrained Gemma has no
template and does not stop at <end_of_turn>; so both are pointed to the adapter's files where the server can be told.
SGLang cannot be told where to stop: that goes into each request.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.export.papers import Kind
from gemma_tune.export.subject import Subject
from gemma_tune.models.lora import CONFIG
from gemma_tune.models.reference import ModelSource
from gemma_tune.plan.facts import read_json

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank; versions from 0.14 on take 1 as well."""

_TEMPLATE = "chat_template.jinja"


def serve_commands(path: Path, kind: Kind, subject: Subject) -> list[tuple[str, str]]:
    """What serves the result, and how.

    Args:
        path: the folder that was written; for GGUF the file, or the folder that holds one.
        kind: what it holds.
        subject: what it was made from; its base is named where a server needs it beside an adapter.

    Returns:
        (label, command) in the order in which they should be shown. A server that cannot take the result is not there.
    """
    return [(label, shlex.join(words)) for label, words in _commands(path, kind, subject)]


def _commands(path: Path, kind: Kind, subject: Subject) -> Iterator[tuple[str, list[str]]]:
    if kind == "merged":
        yield "vLLM", ["vllm", "serve", str(path)]
        yield "SGLang", ["python", "-m", "sglang.launch_server", "--model-path", str(path)]
        if _can_be_named(path):
            yield "transformers", ["transformers", "serve", str(path)]
        yield "gemma-tune", ["gemma-tune", "chat", str(path)]
    elif kind == "adapter":
        yield from _adapter(path, subject)
        yield "gemma-tune", ["gemma-tune", "chat", str(path)]
    elif kind == "ollama":
        name = _name(path, subject).lower()
        yield "Ollama, once", ["ollama", "create", name, "-f", str(path / "Modelfile")]
        yield "Ollama", ["ollama", "run", name]
    elif kind == "lora-gguf":
        yield "llama.cpp, with the base as BASE.gguf", ["llama-server", "-m", "BASE.gguf", "--lora", str(_gguf(path))]
    else:
        yield "llama.cpp", ["llama-server", "-m", str(_gguf(path))]
        yield "gemma-tune", ["gemma-tune", "chat", str(_gguf(path))]


def _adapter(folder: Path, subject: Subject) -> Iterator[tuple[str, list[str]]]:
    config = read_json(folder / CONFIG)
    rank = vllm_rank(config)
    if rank is None or not _is_served(config, subject):
        return
    named = f"{_name(folder, subject)}={folder}"
    # vLLM splits at `=` and at `,`, but takes JSON as well (vllm/entrypoints/openai/cli_args.py, LoRAParserAction).
    odd = set("=,") & set(str(folder))
    as_json = json.dumps({"name": _name(folder, subject), "path": str(folder)}, ensure_ascii=False)
    where, revision = _place(subject.source)
    at = ["--revision", revision] if revision else []
    template = ["--chat-template", str(folder / _TEMPLATE)] if (folder / _TEMPLATE).is_file() else []
    stops = ["--generation-config", str(folder)] if (folder / "generation_config.json").is_file() else []
    lora = ["--enable-lora", "--lora-modules", as_json if odd else named, "--max-lora-rank", str(rank)]
    yield "vLLM", ["vllm", "serve", where, *at, *lora, *template, *stops]
    server = ["python", "-m", "sglang.launch_server", "--model-path", where, *at]
    if odd or isinstance(config.get("target_modules"), str):
        return  # a pattern, as a run has it: SGLang raises (sglang/srt/lora/utils.py)
    label = f'SGLang (with "stop_token_ids": {list(subject.trained.stop_ids)} in each request)'
    yield label, [*server, "--enable-lora", "--lora-paths", named, *template]


def _is_served(config: Mapping[str, Any], subject: Subject) -> bool:
    """Whether servers take an adapter of this kind, and would find its modules.

    A run on the text-only class of a multimodal Gemma saves names that no server's class has; an export renames them.
    """
    from gemma_tune.export.adapter import check_served  # which knows our ranks

    raw = isinstance(config.get("target_modules"), str)
    if raw and (subject.trained is not subject.family or subject.planned("model").get("text_only")):
        return False
    try:
        check_served(config, "")
    except UserError:
        return False
    return True


def vllm_rank(config: Mapping[str, Any]) -> int | None:
    """The smallest rank that vLLM can be told and that holds the adapter; None where it is too large.

    Args:
        config: adapter_config.json. Ranks of single layers count (rank_pattern).
    """
    highest = max(int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values()), 0)
    return next((rank for rank in VLLM_RANKS if rank >= highest), None)


def _place(base: ModelSource) -> tuple[str, str | None]:
    """What a server can load: the hub id with its commit, else the folder on this disk."""
    commit = re.fullmatch(r"[0-9a-f]{40}", base.revision or "")
    return (base.name, base.revision) if commit else (str(base.path), None)


def _gguf(path: Path) -> Path:
    if path.is_dir():
        return next(iter(sorted(path.glob("*.gguf"))), path)
    return path


def _can_be_named(path: Path) -> bool:
    """transformers serve reads `name@revision` and `name:file.gguf` in one word (cli/serving/utils.py)."""
    return "@" not in str(path) and ":" not in str(path)


def _name(folder: Path, subject: Subject) -> str:
    """What it is called in requests: as its run if it lies there, else as its folder, without what would end a word."""
    folder = folder.absolute()
    if subject.run_folder is not None and folder.parent == subject.run_folder.absolute():
        return subject.name
    own = folder.parent.name if folder.name in ("adapter", "model") else folder.name
    return re.sub(r"[^\w.-]+", "-", own, flags=re.ASCII).strip("-.") or "gemma"
