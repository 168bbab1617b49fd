"""Verbatim extraction of training rows: the beginning of a row as prompt, and does the model write the rest?

Discoverable memorisation of Carlini et al. 2023 (arXiv 2202.07646) with the lengths of Gemma's reports: 50 tokens of a
training text as prompt, and the next 50 must follow in greedy decoding, exactly or with an edit distance of 10 % at
most. Rows here are often shorter, so lengths are scaled down, and what was held out is measured alike: what a model
writes verbatim of rows that it never saw, it guessed.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from gemma_tune.data.tokens import IGNORED
from gemma_tune.evaluation.rates import rate
from gemma_tune.gemma.families import Family
from gemma_tune.train.evaluate import answers

PROMPT_TOKENS = 50
TARGET_TOKENS = 50
LEAST = 8
"""Tokens that a passage must have: the shorter it is, the more of it is guessed."""
EDITS = 0.1
"""Share of the target's tokens that may be inserted, left out or replaced in an approximate match."""
_TOGETHER = 32


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a row, as the model reads it and as it should go on.

    Attributes:
        prompt: all of the row before the passage, and its first half, 50 tokens at most.
        target: what follows, 50 tokens at most; never a stop token.
        full: whether both have 50 tokens.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    full: bool


def documents(row: Mapping[str, Sequence[int]]) -> Iterator[tuple[list[int], list[int]]]:
    """(ids, labels) of each document in a row, which may be packed."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    positions = row.get("position_ids")
    starts = [place for place, position in enumerate(positions) if position == 0] if positions is not None else [0]
    for start, end in pairwise([*starts, len(ids)]):
        yield ids[start:end], labels[start:end]


def passage(ids: Sequence[int], labels: Sequence[int], stop_ids: Collection[int]) -> Passage | None:
    """The longest stretch of trained tokens of a document without a stop token: a turn of the model, or a plain text.

    None where it has fewer than `LEAST` tokens.
    """
    marks = [label != IGNORED and token not in stop_ids for token, label in zip(ids, labels, strict=True)]
    spans = [(key, list(places)) for key, places in groupby(range(len(ids)), key=marks.__getitem__)]
    longest = max((places for trained, places in spans if trained), key=len, default=[])
    if len(longest) < LEAST:
        return None
    shown = min(PROMPT_TOKENS, len(longest) // 2)
    cut, end = longest[shown], longest[min(shown + TARGET_TOKENS, len(longest)) - 1] + 1
    return Passage(tuple(ids[:cut]), tuple(ids[cut:end]), (shown, end - cut) == (PROMPT_TOKENS, TARGET_TOKENS))


def sample(
    rows: Sequence[Mapping[str, Any]], limit: int, seed: int, stop_ids: Collection[int], without: Collection[tuple]
) -> list[Passage]:
    """Passages of `limit` documents at most, drawn without repetition.

    Args:
        without: ids of documents that are left out (canaries, which are measured by themselves).
    """
    order = random.Random(f"extraction {seed}").sample(range(len(rows)), len(rows))
    found: list[Passage] = []
    for index in order:
        for ids, labels in documents(rows[index]):
            one = None if tuple(ids) in without else passage(ids, labels, stop_ids)
            if one is not None:
                found.append(one)
        if len(found) >= limit:
            break
    return found[:limit]


def continuations(model: Any, tokenizer: Any, family: Family, passages: Sequence[Passage]) -> list[tuple[int, ...]]:
    """What the model writes greedily after each prompt: as many tokens as the target has, fewer where it stops."""
    found: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(passages)), key=lambda index: len(passages[index].target))
    for start in range(0, len(order), _TOGETHER):
        chosen = order[start : start + _TOGETHER]
        prompts = [passages[index].prompt for index in chosen]
        new = max(len(passages[index].target) for index in chosen)
        said = answers(model, tokenizer, family, prompts, max_new_tokens=new, batch_size=_TOGETHER)
        for index, answer in zip(chosen, said, strict=True):
            found[index] = answer.ids[: len(passages[index].target)]
    return [found[index] for index in range(len(passages))]


def extraction(model: Any, tokenizer: Any, family: Family, passages: Sequence[Passage]) -> dict[str, Any]:
    """Rates of exact and approximate matches, with their intervals, as JSON."""
    written = continuations(model, tokenizer, family, passages)
    edits = [edit_distance(one, wanted.target) for one, wanted in zip(written, passages, strict=True)]
    exact = sum(distance == 0 for distance in edits)
    near = sum(distance <= EDITS * len(one.target) for distance, one in zip(edits, passages, strict=True))
    return {
        "exact": rate(exact, len(passages), "rows", "extracted"),
        "approximate": rate(near, len(passages), "rows", "extracted"),
    }


def lengths(passages: Sequence[Passage]) -> dict[str, Any]:
    """What was asked: passages, how many of them with 50 and 50 tokens, and the mean tokens of a target."""
    mean = sum(len(one.target) for one in passages) / len(passages) if passages else None
    return {"rows": len(passages), "full": sum(one.full for one in passages), "mean_target_tokens": mean}


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levenshtein's: how many tokens must be inserted, left out or replaced."""
    above = list(range(len(other) + 1))
    for row, left in enumerate(one, 1):
        here = [row]
        for column, right in enumerate(other, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (left != right)))
        above = here
    return above[-1]
