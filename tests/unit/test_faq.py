"""docs/faq.md quotes messages as the code writes them."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import gemma_tune
from tests.pages import PAGES, blocks

QUOTED = [
    line.strip().removeprefix("fix: ") for block in blocks(PAGES["docs/faq.md"], "text") for line in block.splitlines()
]
LEAST = 10
"""Letters of its own that a message needs, so that a text made of values alone matches nothing."""


@functools.cache
def messages() -> list[re.Pattern[str]]:
    """Every text in the code, with a gap for each value in it."""
    found: dict[str, None] = {}
    for file in Path(gemma_tune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            if sum(len(text) for text in texts if isinstance(text, str)) < LEAST:
                continue
            pattern = "".join(re.escape(text) if isinstance(text, str) else ".*" for text in texts)
            # A message may go on below its first line, or be the first half of a text.
            found[pattern.partition("\\\n")[0].removesuffix("\\ ")] = None
    return [re.compile(pattern) for pattern in found]


def literal(pattern: re.Pattern[str]) -> int:
    return len(re.sub(r"\\(.)", r"\1", pattern.pattern.replace(".*", "")))


def is_of_the_code(text: str) -> bool:
    return any(one.fullmatch(text) and literal(one) >= max(LEAST, len(text) // 8) for one in messages())


def test_there_are_messages() -> None:
    assert len(QUOTED) > 30 and len(messages()) > 500


@pytest.mark.parametrize("text", QUOTED)
def test_a_quoted_message_is_of_the_code(text: str) -> None:
    assert is_of_the_code(text)


def test_an_invented_message_would_be_seen() -> None:
    assert not is_of_the_code("the model is too tired to be trained today")
    assert not is_of_the_code("this repository is gated, and no token is set")
