"""Little padding: several documents in one training row, or rows of like length in one batch.

Packing is best-fit decreasing: the longest document first, each into the fullest row that has room for it. At most
11/9 of the least possible number of rows, plus one (Johnson, 1973). Pure and deterministic.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents share a row.

    Args:
        lengths: tokens of each document, each in 1 .. `capacity`.
        capacity: tokens in a row.

    Returns:
        Rows of indices into `lengths`. Each index is there once. Inside a row indices rise, and rows are ordered by
        their first index, so that the order of the documents (shuffled by the caller) is kept as far as it can be.

    Raises:
        ValueError: a document is empty or does not fit a row.
    """
    if any(not 1 <= length <= capacity for length in lengths):
        raise ValueError(f"a document has not between 1 and {capacity} tokens")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> rows that have exactly so many
    rooms: list[int] = []  # the keys of with_room, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        found = bisect_left(rooms, length)
        if found < len(rooms):
            room = rooms[found]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[found]
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return sorted(sorted(row) for row in rows)


MEGABATCH = 50
"""Batches that are sorted together: enough to find rows of like length, few enough to stay a mix (as transformers')."""


def alike(order: Sequence[int], lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """`order` with rows of like length next to each other, so that each run of `batch` rows needs little padding.

    The order is worked off in shares of `MEGABATCH` batches: each is sorted by length and cut into batches, and the
    batches of a share are shuffled. Rows that do not fill a batch stay at the end.

    Args:
        order: row numbers, shuffled before.
        lengths: of each row number.
        batch: rows in an optimizer step.
        seed: of the order of the batches.
    """
    draw = random.Random(f"alike {seed}")
    whole = len(order) // batch * batch
    found: list[int] = []
    for start in range(0, whole, batch * MEGABATCH):
        share = sorted(order[start : min(start + batch * MEGABATCH, whole)], key=lambda index: (lengths[index], index))
        batches = [share[place : place + batch] for place in range(0, len(share), batch)]
        draw.shuffle(batches)
        found += [index for one in batches for index in one]
    return [*found, *order[whole:]]
