"""Where a run comes from: versions, git, command, data, template. And what must never be written: secrets."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from gemma_tune.console import masked
from gemma_tune.plan.facts import ADAPTER_FILE

_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
)
_SECRET_NAMES = re.compile(r"(TOKEN|API_KEY|SECRET|ACCESS_KEY|PASSWORD)$", re.IGNORECASE)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST_SECRET = 8
_PROBED = 2**20
_DECISIVE = ("config.json", ADAPTER_FILE, "*.safetensors")
"""Files that decide what a model says. The same tensors are another adapter under another alpha."""


def redact(text: str) -> str:
    """`text` with every secret of the environment, and everything shaped like a hub or W&B token, masked."""
    for name, value in os.environ.items():
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET and not value.isdigit():
            text = text.replace(value, "***")
    return _PASSWORD_IN_URL.sub("***", masked(text))


def versions() -> dict[str, str]:
    """gemma-tune's and its libraries' versions, and Python's."""
    found = {"python": platform.python_version(), "gemma-tune": _version("gemma-tune")}
    return found | {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def git_state() -> dict[str, Any] | None:
    """Commit of the repository around the working directory and whether it has changes; None outside of one."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(status)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def fingerprint(folder: Path) -> str:
    """Tells one model or adapter folder from another: its config, and size, head and tail of each weight file.

    Reading all of a large checkpoint would take minutes; weights that were trained further differ everywhere.
    """
    digest = hashlib.sha256()
    for path in sorted(path for name in _DECISIVE for path in folder.glob(name)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_PROBED))
            file.seek(max(0, size - _PROBED))
            digest.update(file.read(_PROBED))
    return f"content-{digest.hexdigest()[:24]}"


def command_line() -> list[str]:
    """The command as it was typed, secrets masked."""
    return [redact(word) for word in sys.argv]


def peak_memory() -> dict[str, int]:
    """Highest memory of this process so far, in bytes: `rss`, and `cuda` (allocated by torch) where there is a GPU."""
    peak = {"rss": _peak_rss()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_rss() -> int:
    """The most that this program has held in memory.

    On Linux not `ru_maxrss`: a process begins with that of whoever started it (`setmax_mm_hiwater_rss` in the kernel's
    fs/exec.c), so that a small run from a large notebook would have the notebook's.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
