"""Preference pairs with a ground truth: the turn with which a real dialogue goes on, against one of another dialogue.

The dialogues are those of recipes/chitchat.py, which must lie beside this file. They come in couples. At one place of
both dialogues the true answers are exchanged, which makes two pairs: in each context its own answer is the chosen one
and the other dialogue's is the rejected one. So every text is chosen as often as it is rejected, and nothing about the
answer alone, its length least of all, tells which it is: only how it fits the context does.

Both pairs share a `group`, so that no text of a held-out pair is seen in the training.
"""

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTEXT = 5
"""Turns before the answer, at most; odd, so that the first one is the user's."""
MIN_WORDS = 3
"""An answer of fewer words fits nearly everywhere."""
MAX_WORDS = 80
"""One in a hundred answers is longer; the longest is a prank of six thousand words."""


def pairs(places: int = 1, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Two pairs for each couple of dialogues and each place.

    Args:
        places: how many places of a couple are used, those with the longest answers first.
        seed: of the order of the dialogues, and so of who meets whom.

    Yields `{"prompt": [messages], "chosen": [message], "rejected": [message], "group": str}`; the answer is always the
    second speaker's.
    """
    chitchat = _beside("chitchat")
    dialogues = list(chitchat.dialogues())
    random.Random(seed).shuffle(dialogues)
    for couple, (first, second) in enumerate(zip(dialogues[::2], dialogues[1::2], strict=False)):
        for place in _places(first, second)[:places]:
            for own, other in ((first, second), (second, first)):
                turns = chitchat.messages(own)
                yield {
                    "prompt": turns[max(0, place - CONTEXT) : place],
                    "chosen": [turns[place]],
                    "rejected": [{"content": other[place], "role": "assistant"}],
                    "group": f"couple {couple}",
                }


def pairs_all() -> Iterator[dict[str, Any]]:
    """As `pairs`, from up to five places of each couple."""
    return pairs(places=5)


def pairs_first() -> Iterator[dict[str, Any]]:
    """Those of `pairs` that come from every second couple of dialogues: for a reward model that is trained against."""
    return _half(0)


def pairs_second() -> Iterator[dict[str, Any]]:
    """The others: for a reward model that has seen none of the first one's dialogues, and watches."""
    return _half(1)


def _half(which: int) -> Iterator[dict[str, Any]]:
    return (pair for pair in pairs() if int(pair["group"].split()[-1]) % 2 == which)


def _places(first: list[str], second: list[str]) -> list[int]:
    """Where both dialogues have an answer of the second speaker with something before it; the longest answers first."""
    found = []
    for place in range(3, min(len(first), len(second)), 2):
        shorter, longer = sorted((len(first[place].split()), len(second[place].split())))
        if shorter >= MIN_WORDS and longer <= MAX_WORDS and first[place] != second[place]:
            found.append((-shorter, place))
    return [place for _, place in sorted(found)]


def _beside(name: str) -> Any:
    """The module `name` in the folder of this file, wherever that was copied to."""
    spec = importlib.util.spec_from_file_location(f"_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
