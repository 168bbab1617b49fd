"""tokenizer.json -> scores and types: the same tokens by llama.cpp's rule, and a refusal where they would differ."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    make_vocabulary,
    read_vocabulary,
)
from gemma_tune.gemma.families import FAMILIES
from tests.gguf_tiny import close_merges
from tests.spm import ScoreTokenizer
from tests.tiny import VOCAB, write_tokenizer

GEMMA3 = FAMILIES["gemma3_text"]


@pytest.fixture(scope="module", params=["gemma1", "gemma3_text"])
def generation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = write_tokenizer(request.param, tmp_path_factory.mktemp("tokenizer"))
    return request.param, close_merges(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    folder = write_tokenizer("gemma3_text", tmp_path)
    return copy.deepcopy(close_merges(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))))


def test_scores_find_what_merges_find(generation: tuple[str, dict[str, Any]]) -> None:
    name, document = generation
    ours = ScoreTokenizer(make_vocabulary(document, VOCAB, FAMILIES[name]))
    theirs = Tokenizer.from_str(json.dumps(document))
    draw = random.Random(3)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "the ",
        "question",
        "answer",
        "é",
        "的",
        "<bos>",
        "<unused3>",
        "a",
        "ana",
        "==",
        ".\n\n",
    ]
    for _ in range(400):
        text = "".join(draw.choice(parts) * draw.randrange(1, 9) for _ in range(draw.randrange(1, 7)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, ascii(text)


def test_types(document: dict[str, Any]) -> None:
    found = make_vocabulary(document, VOCAB + 8, GEMMA3)
    ids = {piece: number for number, piece in enumerate(found.pieces)}
    kind = {piece: found.types[number] for piece, number in ids.items()}
    assert [kind[piece] for piece in ("<bos>", "<unk>", "<end_of_turn>", "[multimodal]", "<unused5>")] == [CONTROL] * 5
    assert kind["\n\n"] == USER_DEFINED
    assert kind["▁▁"] == NORMAL, "as USER_DEFINED it would be printed as it is spelled"
    assert kind["<0x41>"] == BYTE and kind["▁the"] == NORMAL
    assert kind[f"[PAD{VOCAB + 7}]"] == UNUSED
    assert len(found.pieces) == len(found.scores) == len(found.types) == VOCAB + 8


def test_what_is_no_added_token_is_not_looked_for(document: dict[str, Any]) -> None:
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "<unused5>"]
    found = make_vocabulary(document, VOCAB, GEMMA3)
    assert found.types[found.pieces.index("<unused5>")] == UNUSED


def test_scores_fall_in_the_order_of_merges(document: dict[str, Any]) -> None:
    found = make_vocabulary(document, VOCAB, GEMMA3)
    score = dict(zip(found.pieces, found.scores, strict=True))
    made = list(dict.fromkeys(left + right for left, right in document["model"]["merges"]))
    assert all(score[first] > score[second] for first, second in itertools.pairwise(made))
    assert min(score[piece] for piece in made) > max(score[piece] for piece in ("a", "<bos>", "<0x00>"))


def test_tokens_beyond_the_rows_are_left_out(document: dict[str, Any]) -> None:
    extra = document["added_tokens"][-1] | {"id": VOCAB, "content": "<another>", "special": True}
    document["added_tokens"].append(extra)
    assert "<another>" not in make_vocabulary(document, VOCAB, GEMMA3).pieces
    longer = make_vocabulary(document, VOCAB + 2, GEMMA3)
    assert longer.pieces[VOCAB] == "<another>" and longer.types[VOCAB] == CONTROL


def _unclosed(document: dict[str, Any]) -> None:
    document["model"]["merges"].pop()


def _scattered(document: dict[str, Any]) -> None:
    made = [left + right for left, right in document["model"]["merges"]]
    several = next(piece for piece in reversed(made) if made.count(piece) > 1)
    document["model"]["merges"].append(document["model"]["merges"].pop(made.index(several)))


def _greedy(document: dict[str, Any]) -> None:
    document["added_tokens"][-1]["lstrip"] = True


def _overlapping(document: dict[str, Any]) -> None:
    document["added_tokens"][-2]["content"] = "<x<y>"
    document["added_tokens"][-1]["content"] = "y>z"


def _normalised(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Prepend", "prepend": "▁"}


def _foreign(document: dict[str, Any]) -> None:
    for token in document["added_tokens"]:
        token["content"] = token["content"].replace("<end_of_turn>", "<|im_end|>")
    vocab = document["model"]["vocab"]
    vocab["<|im_end|>"] = vocab.pop("<end_of_turn>")


def _doubled(document: dict[str, Any]) -> None:
    document["added_tokens"].append(document["added_tokens"][10] | {"id": VOCAB - 1})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unclosed, "llama.cpp would join"),
        (_scattered, "do not stand together"),
        (_greedy, "takes blanks beside it"),
        (_overlapping, "can overlap"),
        (_normalised, "not of Gemma's kind"),
        (_foreign, "<end_of_turn> is not at 106"),
        (_doubled, "spelled alike"),
    ],
)
def test_refusals(document: dict[str, Any], damage: Callable[[dict[str, Any]], None], message: str) -> None:
    damage(document)
    with pytest.raises(UserError, match=message) as caught:
        make_vocabulary(document, VOCAB, GEMMA3, "folder/tokenizer.json")
    assert "folder/tokenizer.json" in str(caught.value) and "fix:" in str(caught.value)


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(UserError, match=r"there is no tokenizer\.json"):
        read_vocabulary(tmp_path, VOCAB, GEMMA3)
