"""Real human dialogues of the `chitchat-dataset` package (BYU, MIT licence) as rows of UltraChat's schema.

An example of a source that is a function: a recipe names it as `recipes/chitchat.py:rows`.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

MIN_TURNS = 6


def dialogues() -> Iterator[list[str]]:
    """The turns of each dialogue of two speakers who take at least six turns; the one who began speaks first."""
    from chitchat_dataset import Dataset

    for dialogue in Dataset().values():
        lines = [line for block in dialogue["messages"] for line in block if line["text"].strip()]
        # People send several messages in a row: one turn is all that a speaker says before the other one answers.
        turns = [
            (sender, " ".join(line["text"].strip() for line in said))
            for sender, said in groupby(lines, key=lambda line: line["sender"])
        ]
        if len({sender for sender, _ in turns}) == 2 and len(turns) >= MIN_TURNS:
            yield [text for _, text in turns]


def messages(turns: list[str]) -> list[dict[str, str]]:
    """Turns as messages: the first speaker is the user, the second one becomes the assistant."""
    return [{"content": text, "role": "user" if index % 2 == 0 else "assistant"} for index, text in enumerate(turns)]


def rows() -> Iterator[dict[str, Any]]:
    """One row a dialogue.

    Yields `{"prompt": str, "prompt_id": sha256 hex of prompt, "messages": [{"content": str, "role": str}, ...]}`.
    """
    for turns in dialogues():
        kept = messages(turns[: len(turns) // 2 * 2])  # a last question without an answer teaches nothing
        prompt = turns[0]
        yield {"prompt": prompt, "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(), "messages": kept}
