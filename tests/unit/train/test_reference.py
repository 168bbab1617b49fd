"""What tells the kept scores of one reference from those of another."""

from __future__ import annotations

import pytest

from gemma_tune.train import provenance
from gemma_tune.train.reference import cache_key

IDENTITY = {
    "stage": "dpo",
    "family": "gemma3_text",
    "model.name": "google/gemma-3-270m",
    "model.revision": "r1",
    "model.dtype": "bfloat16",
    "quantization.load_in_4bit": True,
    "data.fingerprint": "abc",
    "adapter.start": "content-1",
    "trainer.beta": 0.1,
    "lora.r": 16,
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("family", "gemma4"),
        ("model.name", "google/gemma-3-1b-it"),
        ("model.revision", "r2"),
        ("model.dtype", "float32"),
        ("quantization.load_in_4bit", None),
        ("data.fingerprint", "abd"),
        ("adapter.start", None),
    ],
)
def test_another_reference_has_another_key(key: str, value: object) -> None:
    assert cache_key(IDENTITY | {key: value}) != cache_key(IDENTITY)


@pytest.mark.parametrize(("key", "value"), [("trainer.beta", 0.5), ("lora.r", 8)])
def test_what_is_trained_is_not_the_references(key: str, value: object) -> None:
    assert cache_key(IDENTITY | {key: value}) == cache_key(IDENTITY)


def test_another_library_is_another_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release may mend the forward pass; the policy is always computed by the one that is installed."""
    before = cache_key(IDENTITY)
    monkeypatch.setattr(provenance, "versions", lambda: {"transformers": "0"})
    assert cache_key(IDENTITY) != before
