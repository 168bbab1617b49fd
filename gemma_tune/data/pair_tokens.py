"""From preferences to rows of token ids: render, fit, store."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gemma_tune.data.mix import Kept
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.tokens import TrainRow, in_chunks
from gemma_tune.errors import UserError
from gemma_tune.gemma.chat import Encoder, RenderedPair, render_preferences
from gemma_tune.gemma.conversation import Preference
from gemma_tune.gemma.families import Family

PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns of a prepared row, each a list of int32 ids."""


@dataclass(frozen=True, slots=True)
class FittedPair:
    """A preference whose two sequences have at most `max_length` tokens, and what was done to it for that."""

    preference: Preference
    rendered: RenderedPair
    repairs: tuple[str, ...] = ()


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

    def render(pairs: Sequence[Preference]) -> list[RenderedPair]:
        return render_preferences(pairs, family, encoder)

    for chunk, rendered in in_chunks(kept, render, workers):
        for one, pair in zip(chunk, rendered, strict=True):
            longest = length(pair)
            if longest <= max_length:
                yield one, FittedPair(one.example, pair)
            elif policies.on_overlong == "drop":
                yield one, Drop("longer than max_length")
            elif policies.on_overlong == "error":
                raise UserError(
                    f"{longest:,} tokens, above data.max_length {max_length:,}",
                    where=one.where,
                    fix="raise data.max_length, or set data.on_overlong: truncate or drop",
                )
            else:
                yield one, with_shorter_prompt(one.example, family, encoder, max_length)


def length(pair: RenderedPair) -> int:
    """Tokens of the longer one of its two sequences."""
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


def with_shorter_prompt(preference: Preference, family: Family, encoder: Encoder, max_length: int) -> FittedPair | Drop:
    """The pair without as many of the oldest exchanges of its prompt as must go.

    The system turn stays, and the prompt still begins with a user turn. An answer is never cut: its turn end would be
    lost, and the score or the log-probability of half an answer is not that of the answer.
    """
    first = preference.prompt[0]
    system = (first,) if first.role == "system" else ()
    begins = [place for place, message in enumerate(preference.prompt) if message.role == "user"]
    for place in begins[1:]:
        shorter = replace(preference, prompt=(*system, *preference.prompt[place:]))
        (pair,) = render_preferences([shorter], family, encoder)
        if length(pair) <= max_length:
            return FittedPair(shorter, pair, ("oldest turns of the prompt left out",))
    return Drop("prompt and answer longer than max_length")


class Pairs:
    """Ids of many pairs in flat arrays: four bytes an id."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._ends = [0]  # of each part of each pair, in the order of PARTS
        self._margins = array("f")

    def __len__(self) -> int:
        return len(self._ends) // len(PARTS)

    def append(self, pair: RenderedPair, margin: float = 0.0) -> None:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            self._ids.extend(ids)
            self._ends.append(len(self._ids))
        self._margins.append(margin)

    def length(self, index: int) -> int:
        """Tokens of the prompt with the longer answer."""
        start, prompt, chosen, rejected = self._ends[index * len(PARTS) : (index + 1) * len(PARTS) + 1]
        return prompt - start + max(chosen - prompt, rejected - chosen)

    def row(self, index: int) -> TrainRow:
        """`prompt_ids`, `chosen_ids`, `rejected_ids` (int32 arrays) and `margin`."""
        places = range(index * len(PARTS), (index + 1) * len(PARTS))
        parts = {
            name: np.array(self._ids[self._ends[place] : self._ends[place + 1]], dtype=np.int32)
            for name, place in zip(PARTS, places, strict=True)
        }
        return {**parts, "margin": self._margins[index]}
