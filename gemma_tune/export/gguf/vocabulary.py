"""tokenizer.json -> the vocabulary of a GGUF file, with which llama.cpp finds the same tokens.

llama.cpp has no merges for Gemma 1 to 3: it joins the two neighbours whose joint text is the piece of the highest
score (llama.cpp, src/llama-vocab.cpp, llm_tokenizer_spm). The merges of Google's tokenizer.json came from such scores:
every pair of pieces that makes a piece is among them, and those of one piece stand together. So the place of a piece
among the merges is its score, and nothing else is needed. Where a tokenizer.json is not of this kind, it is refused.

Its own rules for tokens that are looked up in the raw text before that:

    CONTROL        only where the caller asks for control tokens (`parse_special`)
    USER_DEFINED   always; printed as they are spelled
    NORMAL         never
    UNUSED         never, and never printed

Runs of blanks ("▁▁") are added tokens in tokenizer.json, spelled with U+2581; as USER_DEFINED ones they would be
printed so. They are NORMAL here: their scores, the highest, make the same tokens of blanks. What remains different:
runs of the character U+2581 itself next to blanks, and for Gemma 1 and 2 more than 31 of them; and `</s>`, an HTML tag
to Gemma, which llama.cpp takes for the end of a generation whatever the file says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family
from gemma_tune.plan.facts import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""Token types of GGUF (gguf.TokenType)."""

_BLANK = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FIX = "use the tokenizer of the base model as it was published"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One entry a row of the embedding.

    Attributes:
        pieces: spelling; `[PADn]` where the tokenizer has no token for a row.
        scores: the higher, the earlier two neighbours are joined into this piece.
        types: `NORMAL`, `CONTROL`, ...
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]


def read_vocabulary(folder: Path, rows: int, family: Family) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder`, for an embedding with that many rows.

    Raises:
        UserError: there is no tokenizer.json, or one whose tokens llama.cpp would not find.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            "there is no tokenizer.json; tokenizer.model alone finds other tokens in long runs of blanks",
            where=str(folder),
            fix="copy the tokenizer.json of the base model there",
        )
    return make_vocabulary(read_json(file), rows, family, str(file))


def make_vocabulary(document: Mapping[str, Any], rows: int, family: Family, where: str = "") -> Vocabulary:
    """`read_vocabulary` of a parsed tokenizer.json."""
    _check_kind(document, where)
    vocab: Mapping[str, int] = document["model"]["vocab"]
    added = {token["id"]: token for token in document["added_tokens"] if token["id"] < rows}
    _check_added(added, where)
    order = _order(_merges(document), where)
    _check_closed(vocab, order, _merges(document), where)
    pieces = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    spelled = {number: piece for piece, number in vocab.items()} | {i: token["content"] for i, token in added.items()}
    for number, piece in spelled.items():
        if number < rows:
            pieces[number] = piece
            types[number] = _type_of(number, piece, added, family)
    # A piece that nothing is joined into (a character, a control token) is never asked for its score.
    scores = [-float(order.get(piece, len(order) + number)) for number, piece in enumerate(pieces)]
    _check_ids(pieces, family, where)
    return Vocabulary(tuple(pieces), tuple(scores), tuple(types))


def _merges(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = document["model"]["merges"]
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]


def _type_of(number: int, piece: str, added: Mapping[int, Mapping[str, Any]], family: Family) -> int:
    if number not in added and number in family.control_ids:
        return UNUSED  # transformers does not look for it in a text
    if number in family.control_ids or (number in added and added[number]["special"]):
        return CONTROL
    if number in added and not _is_run(piece, _BLANK):
        return USER_DEFINED
    return BYTE if _BYTE.fullmatch(piece) else NORMAL


def _order(merges: list[tuple[str, str]], where: str) -> dict[str, int]:
    """piece -> how many pieces come before it among the merges."""
    order: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        # Gemma 3: the merges of runs come first, the longest left part first, which is how scores find runs as well.
        if piece != last and piece in order and not _is_run(piece):
            raise UserError(f"its merges into '{piece}' do not stand together", where=where, fix=_FIX)
        order.setdefault(piece, len(order))
        last = piece
    return order


_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
_NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
# Gemma 3 splits at blanks, of which the normalizer has left none; Gemma 1 and 2 do not split.
_PRE_TOKENIZERS = (
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
)


def _check_kind(document: Mapping[str, Any], where: str) -> None:
    model = document.get("model")
    if (
        not isinstance(model, dict)
        or not isinstance(document.get("added_tokens"), list)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
        or model.get("type") != "BPE"
        or not model.get("byte_fallback")
        or any(model.get(key) for key in ("ignore_merges", "dropout", *_AFFIXES))
        or document.get("normalizer") != _NORMALIZER
        or document.get("pre_tokenizer") not in _PRE_TOKENIZERS
    ):
        raise UserError("this tokenizer.json is not of Gemma's kind: BPE with bytes as fallback", where=where, fix=_FIX)


def _check_added(added: Mapping[int, Mapping[str, Any]], where: str) -> None:
    """llama.cpp looks for the longest token first, transformers for the first in the text: they may not overlap."""
    odd = ("lstrip", "rstrip", "single_word")
    for token in added.values():
        if any(token.get(flag) for flag in odd):
            raise UserError(
                f"its token '{token['content']}' takes blanks beside it with it, or stands only as a word",
                where=where,
                fix=_FIX,
            )
    contents = [token["content"] for token in added.values()]
    heads = {content[:size]: content for content in contents for size in range(1, len(content))}
    for content in contents:
        for size in range(1, len(content)):
            other = heads.get(content[-size:])
            if other is not None and not (_is_run(content) and _is_run(other)):
                raise UserError(f"its tokens '{content}' and '{other}' can overlap", where=where, fix=_FIX)


def _check_closed(
    vocab: Mapping[str, int], order: Mapping[str, int], merges: list[tuple[str, str]], where: str
) -> None:
    """llama.cpp joins any two neighbours that make a piece; each such pair has to be a merge."""
    known = set(merges)
    for piece in vocab:
        for left, right in _splits(piece):
            possible = (left in vocab or len(left) == 1) and (right in vocab or len(right) == 1)
            if possible and (left, right) not in known:
                raise UserError(
                    f"llama.cpp would join '{left}' and '{right}', which this tokenizer does not", where=where, fix=_FIX
                )
    if missing := next((piece for piece in order if piece not in vocab), None):
        raise UserError(f"its merges make '{missing}', which it does not know", where=where, fix=_FIX)


def _splits(piece: str) -> Iterator[tuple[str, str]]:
    return ((piece[:size], piece[size:]) for size in range(1, len(piece)))


def _check_ids(pieces: list[str], family: Family, where: str) -> None:
    for piece, number in family.tokens.items():
        if pieces[number : number + 1] != [piece]:
            raise UserError(
                f"{piece} is not at {number}: this tokenizer is not {family.label}'s", where=where, fix=_FIX
            )
    if len(set(pieces)) != len(pieces):
        raise UserError("two of its tokens are spelled alike", where=where, fix=_FIX)


def _is_run(piece: str, characters: str = "\n\t" + _BLANK) -> bool:
    return piece[0] in characters and piece == piece[0] * len(piece)
