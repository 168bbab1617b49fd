from __future__ import annotations

import copy
import json
from typing import Any

from tokenizers import Tokenizer

from gemma_tune.gemma.control import protect_control_tokens

CONTROL = {5, 6}


def toy(pairs: bool = True) -> dict[str, Any]:
    """Characters, the word "ab", an ordinary added token, a control token, and one that merges can spell."""
    vocab = {"a": 0, "b": 1, "<": 2, ">": 3, "ab": 4, "<x>": 5, "<ab": 6, "<ab>": 7, "x": 8, "\n": 9, "\n\n": 10}
    merges = [["a", "b"], ["<", "ab"], ["<ab", ">"]]

    def added(token_id: int, text: str) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        return {"id": token_id, "content": text, **flags}

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(5, "<x>"), added(10, "\n\n")],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges if pairs else [" ".join(pair) for pair in merges],
        },
    }


def encode(document: dict[str, Any], text: str) -> list[int]:
    backend = Tokenizer.from_str(json.dumps(document))
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def test_text_reaches_no_control_token_by_matching_or_by_merging() -> None:
    for document in (toy(), toy(pairs=False)):
        assert encode(document, "<x>") == [5], "unprotected, the text is the token"
        assert encode(document, "<ab>") == [7]
        protected = protect_control_tokens(document, CONTROL)
        assert encode(protected, "<x>") == [2, 8, 3]
        assert encode(protected, "<ab>") == [2, 4, 3], "other merges stay"
        assert encode(protected, "a\n\nb") == [0, 10, 1], "other added tokens are still matched"


def test_the_original_is_left_as_it_was() -> None:
    document = toy()
    before = copy.deepcopy(document)
    protect_control_tokens(document, CONTROL)
    assert document == before
