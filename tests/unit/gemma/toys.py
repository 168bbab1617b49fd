"""An encoder for tests: one id a character, far above every control id."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_tune.gemma.families import Family

BASE = 1_000_000


class Characters:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.calls += 1
        self.texts += texts
        return [[BASE + ord(character) for character in text] for text in texts]


def decode(ids: Sequence[int], family: Family) -> str:
    """Characters, and control tokens by their spelling."""
    spelling = {token_id: text for text, token_id in family.tokens.items()}
    return "".join(chr(token - BASE) if token >= BASE else spelling[token] for token in ids)
