"""Keeps control tokens out of reach of text: an edit of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def protect_control_tokens(tokenizer_json: dict[str, Any], control_ids: Collection[int]) -> dict[str, Any]:
    """A copy of a tokenizer in which no text can become one of `control_ids`.

    Two ways lead from text to a control token, and both are closed. The tokenizer matches added tokens in the text: all
    control tokens are flagged special, and with `encode_special_tokens = True` (set it on the backend that is made of
    this) special tokens are not matched. And its merges could spell one: merges into a control token are left out.
    Other added tokens (newlines, runs of blanks, HTML tags) are matched as ever.

    Args:
        tokenizer_json: the parsed file of a fast tokenizer (BPE). It is not changed.
        control_ids: `Family.control_ids`; ids that this tokenizer does not have are ignored.

    Returns:
        The edited tokenizer, which shares what it did not change with the original. It adds no BOS.
    """
    control = frozenset(control_ids)
    model = tokenizer_json["model"]
    spellings = {text for text, token_id in model["vocab"].items() if token_id in control}
    return tokenizer_json | {
        "added_tokens": [
            token | {"special": True} if token["id"] in control else token for token in tokenizer_json["added_tokens"]
        ],
        "model": model | {"merges": [merge for merge in model["merges"] if _merged(merge) not in spellings]},
        "post_processor": None,
    }


def _merged(merge: str | list[str]) -> str:
    """Result of a merge, written as a pair or (older files) as "left right"."""
    return "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)
