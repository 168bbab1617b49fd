"""Real human dialogues of the `chitchat-dataset` package (BYU, MIT licence) as rows of UltraChat's schema.

An example of a source that is a function: a recipe names it as `recipes/chitchat.py:rows`.
"""

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

MIN_TURNS = 6


def rows() -> Iterator[dict[str, Any]]:
    """Dialogues of two speakers and at least six turns, one row each; the second speaker becomes the assistant.

    Yields `{"prompt": str, "prompt_id": sha256 hex of prompt, "messages": [{"content": str, "role": str}, ...]}`.
    """
    from chitchat_dataset import Dataset

    for dialogue in Dataset().values():
        lines = [line for block in dialogue["messages"] for line in block if line["text"].strip()]
        # People send several messages in a row: one turn is all that a speaker says before the other one answers.
        turns = [
            (sender, " ".join(line["text"].strip() for line in said))
            for sender, said in groupby(lines, key=lambda line: line["sender"])
        ]
        if len({sender for sender, _ in turns}) != 2 or len(turns) < MIN_TURNS:
            continue
        turns = turns[: len(turns) // 2 * 2]  # a last question without an answer teaches nothing
        messages = [
            {"content": text, "role": "user" if index % 2 == 0 else "assistant"}
            for index, (_, text) in enumerate(turns)
        ]
        prompt = messages[0]["content"]
        yield {"prompt": prompt, "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(), "messages": messages}
