"""What these tests need."""

from __future__ import annotations

import importlib.util

import pytest

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("gguf") is None,
    reason='needs llama-cpp-python and gguf: pip install "gemma-tune[llamacpp,gguf]"',
)
