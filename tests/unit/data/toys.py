"""What the data tests share: a toy encoder whose ids can be read back, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.data.build import Prepared, build
from gemma_tune.data.pairs import build_pairs
from gemma_tune.data.prompts import build_prompts
from gemma_tune.gemma.conversation import Conversation, Example, Preference
from gemma_tune.gemma.families import FAMILIES, Family

GEMMA1, GEMMA3, GEMMA4 = FAMILIES["gemma1"], FAMILIES["gemma3_text"], FAMILIES["gemma4"]
FIRST_BYTE = 1000


class ByteEncoder:
    """One id a byte, above all control ids."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + FIRST_BYTE for byte in text.encode("utf-8")] for text in texts]


def decoded(ids: Sequence[int], family: Family = GEMMA3) -> str:
    """Text of ids of a `ByteEncoder`; control tokens as they are spelled."""
    spelled = {number: token for token, number in family.tokens.items()}
    return b"".join(
        spelled[number].encode() if number in spelled else bytes([number - FIRST_BYTE]) for number in ids
    ).decode("utf-8")


def chat(*texts: str) -> dict[str, Any]:
    """A `messages` row: user, assistant, user, ..."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def write_jsonl(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepare(rows: Sequence[Any] | str, folder: Path, family: Family = GEMMA3, **settings: Any) -> Prepared[Example]:
    """`build` over rows (or a file), small and without holdout unless asked for."""
    name = rows if isinstance(rows, str) else write_jsonl(folder / "rows.jsonl", rows)
    return build(family, ByteEncoder(), **{"sources": [{"name": name}], "max_length": 512, "holdout": 0} | settings)


def prepare_pairs(
    rows: Sequence[Any] | str, folder: Path | None, family: Family = GEMMA3, **settings: Any
) -> Prepared[Preference]:
    """`build_pairs` over rows (or a file), small and without holdout unless asked for."""
    name = rows if isinstance(rows, str) else write_jsonl(folder / "rows.jsonl", rows)  # type: ignore[operator]
    defaults: dict[str, Any] = {"sources": [{"name": name}], "max_length": 512, "holdout": 0}
    return build_pairs(family, ByteEncoder(), **defaults | settings)


def prepare_prompts(
    rows: Sequence[Any] | str, folder: Path | None, family: Family = GEMMA3, **settings: Any
) -> Prepared[Conversation]:
    """`build_prompts` over rows (or a file), small and without holdout unless asked for."""
    name = rows if isinstance(rows, str) else write_jsonl(folder / "rows.jsonl", rows)  # type: ignore[operator]
    defaults: dict[str, Any] = {"sources": [{"name": name}], "max_length": 512, "holdout": 0}
    return build_prompts(family, ByteEncoder(), **defaults | settings)
