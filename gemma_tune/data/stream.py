"""Training rows from sources that are read as they are trained: nothing is kept but a shuffle buffer.

Each pass over a `Stream` reads the sources from their beginning and gives the same rows in the same order, which is
what resuming a run relies on.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.data.mix import Kept, read_examples
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.report import Tally
from gemma_tune.data.tokens import Documents, Fitted, tokenise
from gemma_tune.errors import UserError
from gemma_tune.gemma.chat import Encoder, TrainOn
from gemma_tune.gemma.conversation import Example
from gemma_tune.gemma.families import Family

WINDOW = 1024
"""Documents that are packed together: enough for nearly full rows."""


@dataclass(frozen=True)
class Stream:
    """How the stream is read. The first `holdout` usable rows behind the shuffle buffer are held out.

    Rows that begin with the same user turn as a held-out row are dropped, so that no prompt is on both sides.
    """

    family: Family
    encoder: Encoder
    policies: Policies
    sources: tuple[Mapping[str, Any], ...]
    max_length: int
    packing: bool
    train_on: TrainOn
    deduplicate: bool
    buffer: int
    holdout: int
    seed: int

    def held_out(self) -> tuple[Tally, Documents, list[Example]]:
        """The held-out rows, and what was counted while they were read.

        Raises:
            UserError: no row is left for training behind them.
        """
        tally, documents = Tally(), Documents()
        examples: list[Example] = []
        for one, fitted in self._fitted(tally):
            if len(documents) == self.holdout:
                return tally, documents, examples
            documents.append(fitted)
            if not examples or examples[-1] is not one.example:
                examples.append(one.example)
        raise UserError(
            f"no row is left to train on behind {len(documents):,} held-out rows: {tally.why_empty()}",
            where="data.holdout",
            fix="lower data.holdout, or change the policy that drops the rows",
        )

    def training_rows(self) -> Iterator[dict[str, list[int]]]:
        """Rows as lists of ints, from the first one."""
        window = Documents()
        for fitted in self._training():
            window.append(fitted)
            if len(window) == WINDOW:
                yield from self._rows(window)
                window = Documents()
        if len(window):
            yield from self._rows(window)

    def _rows(self, window: Documents) -> Iterator[dict[str, list[int]]]:
        for row in window.training_rows(range(len(window)), self.max_length, self.packing):
            yield {name: values.tolist() for name, values in row.items()}

    def _training(self) -> Iterator[Fitted]:
        tally = Tally()
        held: set[bytes] = set()
        for number, (one, fitted) in enumerate(self._fitted(tally)):
            if number < self.holdout:
                held.add(one.group)
            elif one.group not in held:
                yield fitted

    def _fitted(self, tally: Tally) -> Iterator[tuple[Kept[Example], Fitted]]:
        kept = read_examples(
            self.sources,
            self.family,
            self.policies,
            tally,
            deduplicate=self.deduplicate,
            streaming=True,
            seed=self.seed,
        )
        shuffled = _buffered(kept, self.buffer, self.seed)
        rows = tokenise(
            shuffled, self.family, self.encoder, self.policies, max_length=self.max_length, train_on=self.train_on
        )
        for one, pieces in rows:
            if isinstance(pieces, Drop):
                tally.drop(pieces.reason, one.where)
                continue
            for piece in pieces:
                for name in piece.repairs:
                    tally.repair(name, one.where)
                yield one, piece


def _buffered(kept: Iterable[Kept[Example]], size: int, seed: int) -> Iterator[Kept[Example]]:
    """Shuffle within a buffer of `size` rows; a buffer of one keeps the order."""
    draw = random.Random(f"shuffle {seed}")
    buffer: list[Kept[Example]] = []
    for one in kept:
        if len(buffer) < size:
            buffer.append(one)
            continue
        index = draw.randrange(size)
        yield buffer[index]
        buffer[index] = one
    draw.shuffle(buffer)
    yield from buffer
