"""From examples to training rows: render, cut at whole turns, label, pack."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from gemma_tune.data.mix import Kept
from gemma_tune.data.pack import pack
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.errors import UserError
from gemma_tune.gemma.chat import Encoder, Rendered, TrainOn, render_many
from gemma_tune.gemma.conversation import Answered, Document, Example
from gemma_tune.gemma.families import Family

E = TypeVar("E", bound=Example | Answered)
R = TypeVar("R")

IGNORED = -100
"""Label of a token that carries no loss (torch's cross entropy)."""
CHUNK = 256
"""Examples in one call of the encoder."""

TrainRow = dict[str, Any]
"""`input_ids`, `labels` and, where packed, `position_ids`: int32 arrays of one length."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Tokens of one example or of a piece of it, at most `max_length`; `repairs` names what was done to the example."""

    ids: Sequence[int]
    trained: Sequence[int]
    repairs: tuple[str, ...] = ()


def fit(rendered: Rendered, max_length: int, on_overlong: str, *, document: bool = False) -> list[Fitted] | Drop:
    """One row of at most `max_length` tokens, or the pieces of a document that is longer.

    A conversation is cut after the last whole turn that fits, so that what is trained ends with its turn end. A
    document has no turns: `split` makes pieces of it, `truncate` cuts it anywhere, and it loses its end token.

    Raises:
        ValueError: it is longer and `on_overlong` is `error`; the text says by how much.
    """
    ids, trained, repairs = rendered.ids, rendered.trained, ()
    if len(ids) > max_length:
        if on_overlong == "error":
            raise ValueError(f"{len(ids):,} tokens, above data.max_length {max_length:,}")
        if on_overlong == "drop":
            return Drop("longer than max_length")
        if document and on_overlong == "split":
            return _pieces(rendered, max_length)
        end = max_length if document else max((turn for turn in rendered.turns if turn <= max_length), default=0)
        if not end:
            return Drop("the first trained answer does not fit max_length")
        ids, trained, repairs = ids[:end], trained[:end], ("cut to max_length",)  # type: ignore[assignment]
    if not any(trained[1:]):
        return Drop("no trained token")
    return [Fitted(ids, trained, repairs)]


def _pieces(rendered: Rendered, max_length: int) -> list[Fitted]:
    """A long document as consecutive rows: full ones, then the rest. Every token but the BOS is in one of them.

    Each row begins with BOS. It is a sequence of its own (attention does not reach back into the row before), and Gemma
    has never seen one that begins otherwise. Only the last row ends with EOS: the others do not end, they go on.
    """
    bos, *text = rendered.ids
    _, *trained = rendered.trained
    size = max_length - 1
    starts = list(range(0, len(text), size))
    if len(text) - starts[-1] == 1:
        starts[-1] -= 1  # EOS alone behind BOS would teach that a text may be empty
    return [
        Fitted([bos, *text[start:end]], [0, *trained[start:end]], () if start else ("text split into rows",))
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True)
    ]


def tokenise(
    kept: Iterable[Kept[Example]],
    family: Family,
    encoder: Encoder,
    policies: Policies,
    *,
    max_length: int,
    train_on: TrainOn,
    workers: int = 1,
) -> Iterator[tuple[Kept[Example], list[Fitted] | Drop]]:
    """Every example with its rows (more than one for a document that was split), in order.

    Lazy: reads a few chunks ahead.

    Raises:
        UserError: an example is too long and `policies.on_overlong` is `error`.
    """

    def render(examples: Sequence[Example]) -> list[Rendered]:
        return render_many(examples, family, encoder, train_on)

    for chunk, rendered in in_chunks(kept, render, workers):
        for one, row in zip(chunk, rendered, strict=True):
            try:
                yield one, fit(row, max_length, policies.on_overlong, document=isinstance(one.example, Document))
            except ValueError as error:
                fix = "raise data.max_length, or set data.on_overlong: split, truncate or drop"
                raise UserError(str(error), where=one.where, fix=fix) from None


def in_chunks(
    kept: Iterable[Kept[E]], render: Callable[[Sequence[E]], list[R]], workers: int = 1
) -> Iterator[tuple[list[Kept[E]], list[R]]]:
    """What is kept, chunk by chunk and in order, with what `render` makes of it."""
    chunks = _chunks(kept)
    if workers == 1:
        for chunk in chunks:
            yield chunk, render([one.example for one in chunk])
        return
    # Threads: the encoder works outside of Python's lock, on all cores. A copy of it in another process would lose the
    # flag that keeps control tokens out of reach of text: `tokenizers` does not pickle it.
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[list[Kept[E]], Future[list[R]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(render, [one.example for one in chunk])))
            if len(waiting) > 2 * workers:
                first, result = waiting.popleft()
                yield first, result.result()
        for first, result in waiting:
            yield first, result.result()


def _chunks(kept: Iterable[Kept[E]]) -> Iterator[list[Kept[E]]]:
    rows = iter(kept)
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


class Documents:
    """Tokens of many documents in two flat arrays: four bytes an id, one a mask entry."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._trained = bytearray()
        self._ends = [0]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, fitted: Fitted) -> None:
        self._ids.extend(fitted.ids)
        self._trained.extend(fitted.trained)
        self._ends.append(len(self._ids))

    def length(self, index: int) -> int:
        return self._ends[index + 1] - self._ends[index]

    def row(self, index: int) -> TrainRow:
        """`input_ids` and `labels` of one document. The first label is never trained: nothing comes before it, and in a
        pack it would be predicted from the document before."""
        start, end = self._ends[index], self._ends[index + 1]
        ids = np.array(self._ids[start:end], dtype=np.int32)
        labels = np.where(np.frombuffer(self._trained[start:end], dtype=np.uint8) != 0, ids, np.int32(IGNORED))
        labels[0] = IGNORED
        return {"input_ids": ids, "labels": labels.astype(np.int32)}

    def packed(self, indices: Sequence[int]) -> TrainRow:
        """Several documents as one row; `position_ids` restart at each."""
        rows = [self.row(index) for index in indices]
        return {
            "input_ids": np.concatenate([row["input_ids"] for row in rows]),
            "labels": np.concatenate([row["labels"] for row in rows]),
            "position_ids": np.concatenate([np.arange(len(row["input_ids"]), dtype=np.int32) for row in rows]),
        }

    def training_rows(self, order: Sequence[int], max_length: int, packing: bool) -> Iterator[TrainRow]:
        """Rows of the documents in `order`."""
        if packing:
            for row in pack([self.length(index) for index in order], max_length):
                yield self.packed([order[place] for place in row])
        else:
            for index in order:
                yield self.row(index)
