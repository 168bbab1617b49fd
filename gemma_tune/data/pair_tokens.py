"""From preferences, judged answers and prompts to rows of token ids: render, fit, store."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from gemma_tune.data.mix import Kept
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.tokens import TrainRow, in_chunks
from gemma_tune.errors import UserError
from gemma_tune.gemma.chat import (
    Encoder,
    RenderedAnswer,
    RenderedPair,
    RenderedPrompt,
    render_judged,
    render_preferences,
    render_prompts,
)
from gemma_tune.gemma.conversation import Answered, Conversation, Judged, Message, Preference
from gemma_tune.gemma.families import Family

PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of a prepared pair, each a list of int32 ids."""
JUDGED_PARTS = ("prompt_ids", "completion_ids")
"""Those of a judged answer."""
PROMPT_PARTS = ("prompt_ids",)
"""That of a prompt."""

A = TypeVar("A", bound=Answered | Conversation)
R = TypeVar("R", bound=RenderedPair | RenderedAnswer | RenderedPrompt)


@dataclass(frozen=True, slots=True)
class Fitted(Generic[A, R]):
    """What has at most `max_length` tokens in each of its sequences, and what was done to it for that."""

    example: A
    rendered: R
    repairs: tuple[str, ...] = ()


FittedPair = Fitted[Preference, RenderedPair]
FittedAnswer = Fitted[Judged, RenderedAnswer]
FittedPrompt = Fitted[Conversation, RenderedPrompt]


def tokenise_pairs(
    kept: Iterable[Kept[Preference]],
    family: Family,
    encoder: Encoder,
    policies: Policies,
    *,
    max_length: int,
    workers: int = 1,
) -> Iterator[tuple[Kept[Preference], FittedPair | Drop]]:
    """Every pair with its ids, in order.

    Lazy: reads a few chunks ahead.

    Raises:
        UserError: a pair is too long and `policies.on_overlong` is `error`.
    """
    render = partial(render_preferences, family=family, encoder=encoder)
    return _tokenise(kept, render, policies, max_length, workers)


def tokenise_judged(
    kept: Iterable[Kept[Judged]],
    family: Family,
    encoder: Encoder,
    policies: Policies,
    *,
    max_length: int,
    workers: int = 1,
) -> Iterator[tuple[Kept[Judged], FittedAnswer | Drop]]:
    """Every judged answer with its ids, as `tokenise_pairs` does it for pairs."""
    render = partial(render_judged, family=family, encoder=encoder)
    return _tokenise(kept, render, policies, max_length, workers)


def tokenise_prompts(
    kept: Iterable[Kept[Conversation]],
    family: Family,
    encoder: Encoder,
    policies: Policies,
    *,
    max_length: int,
    workers: int = 1,
) -> Iterator[tuple[Kept[Conversation], FittedPrompt | Drop]]:
    """Every prompt with its ids, as `tokenise_pairs` does it for pairs; nothing is added for the response."""
    render = partial(render_prompts, family=family, encoder=encoder)
    return _tokenise(kept, render, policies, max_length, workers)


def _tokenise(
    kept: Iterable[Kept[A]],
    render: Callable[[Sequence[A]], list[R]],
    policies: Policies,
    max_length: int,
    workers: int,
) -> Iterator[tuple[Kept[A], Fitted[A, R] | Drop]]:
    for chunk, rendered in in_chunks(kept, render, workers):
        for one, row in zip(chunk, rendered, strict=True):
            longest = length(row)
            if longest <= max_length:
                yield one, Fitted(one.example, row)
            elif policies.on_overlong == "drop":
                yield one, Drop("longer than max_length")
            elif policies.on_overlong == "error":
                raise _too_long(row, max_length, one.where)
            else:
                yield one, _shortened(one.example, render, max_length)


def _too_long(rendered: RenderedPair | RenderedAnswer | RenderedPrompt, max_length: int, where: str) -> UserError:
    limit, remedy = f"data.max_length {max_length:,}", "raise data.max_length"
    if isinstance(rendered, RenderedPrompt):
        limit = f"the {max_length:,} that data.max_length leaves a prompt"
        remedy += ", lower ppo.max_new_tokens"
    return UserError(
        f"{length(rendered):,} tokens, above {limit}",
        where=where,
        fix=f"{remedy}, or set data.on_overlong: truncate or drop",
    )


def length(rendered: RenderedPair | RenderedAnswer | RenderedPrompt) -> int:
    """Tokens of its longest sequence."""
    return len(rendered.prompt) + max(map(len, rendered.answers), default=0)


def with_shorter_prompt(preference: Preference, family: Family, encoder: Encoder, max_length: int) -> FittedPair | Drop:
    """The pair without as many of the oldest exchanges of its prompt as must go.

    The system turn stays, and the prompt still begins with a user turn. An answer is never cut: its turn end would be
    lost, and the score or the log-probability of half an answer is not that of the answer.
    """
    return _shortened(preference, partial(render_preferences, family=family, encoder=encoder), max_length)


def _shortened(row: A, render: Callable[[Sequence[A]], list[R]], max_length: int) -> Fitted[A, R] | Drop:
    turns = row.messages if isinstance(row, Conversation) else row.prompt
    system = turns[:1] if turns[0].role == "system" else ()
    begins = [place for place, message in enumerate(turns) if message.role == "user"]
    for place in begins[1:]:
        shorter = _asking(row, (*system, *turns[place:]))
        (rendered,) = render([shorter])
        if length(rendered) <= max_length:
            return Fitted(shorter, rendered, ("oldest turns of the prompt left out",))
    return Drop(f"{'prompt' if isinstance(row, Conversation) else 'prompt and answer'} longer than max_length")


def _asking(row: A, turns: tuple[Message, ...]) -> A:
    return replace(row, messages=turns) if isinstance(row, Conversation) else replace(row, prompt=turns)


class AnswerRows:
    """Ids of many prompts with their answers in flat arrays: four bytes an id, and a number a row.

    Args:
        parts: columns of ids, the prompt's first.
        number: column of the number: a margin, or a label.
    """

    def __init__(self, parts: Sequence[str], number: str) -> None:
        self._parts = tuple(parts)
        self._number = number
        self._ids = array("i")
        self._ends = [0]  # of each part of each row, in order
        self._numbers = array("f")

    def __len__(self) -> int:
        return len(self._numbers)

    def append(self, rendered: RenderedPair | RenderedAnswer | RenderedPrompt, number: float = 0.0) -> None:
        for ids in (rendered.prompt, *rendered.answers):
            self._ids.extend(ids)
            self._ends.append(len(self._ids))
        self._numbers.append(number)

    def length(self, index: int) -> int:
        """Tokens of the prompt with its longest answer."""
        size = len(self._parts)
        start, prompt, *answers = self._ends[index * size : (index + 1) * size + 1]
        begins = (prompt, *answers)
        return prompt - start + max((end - begin for begin, end in zip(begins, answers, strict=False)), default=0)

    def row(self, index: int) -> TrainRow:
        """The ids as int32 arrays, and the number."""
        size = len(self._parts)
        places = range(index * size, (index + 1) * size)
        parts = {
            name: np.array(self._ids[self._ends[place] : self._ends[place + 1]], dtype=np.int32)
            for name, place in zip(self._parts, places, strict=True)
        }
        return {**parts, self._number: self._numbers[index]}
