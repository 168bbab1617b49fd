"""Real human dialogues of the `chitchat-dataset` package (BYU, MIT licence) as rows of UltraChat's schema.

An example of sources that are functions: a recipe names them as `recipes/chitchat.py:rows` (sft) and
`recipes/chitchat.py:prompts` (ppo).
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

MIN_TURNS = 6
CONTEXT = 3
"""Turns of a prompt; odd, so that the user has the last word. The first ones are often no more than greetings."""


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


def prompts() -> Iterator[dict[str, Any]]:
    """The beginning of each dialogue, which the second speaker is to go on with: `recipes/chitchat.py:prompts`.

    Yields `{"messages": [{"content": str, "role": str}, ...], "group": str}`; the last message is the user's. Each
    dialogue is a group of its own, also where many begin with the same greeting.
    """
    for number, turns in enumerate(dialogues()):
        yield {"messages": messages(turns[:CONTEXT]), "group": f"dialogue {number}"}
