from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.pack import MEGABATCH, alike, pack


@given(lengths=st.lists(st.integers(1, 64), max_size=80))
def test_each_document_once_and_no_row_too_long(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 64 for row in rows)


@given(lengths=st.lists(st.integers(1, 64), max_size=80))
def test_equal_to_the_plain_loop(lengths: list[int]) -> None:
    """Best-fit decreasing, written as it is defined."""
    plain: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [(64 - sum(lengths[i] for i in row), number) for number, row in enumerate(plain)]
        fitting = [room for room, _ in rooms if room >= lengths[index]]
        if fitting:
            number = max(number for room, number in rooms if room == min(fitting))
            plain[number].append(index)
        else:
            plain.append([index])
    assert sorted(sum(lengths[i] for i in row) for row in pack(lengths, 64)) == sorted(
        sum(lengths[i] for i in row) for row in plain
    )


def test_rows_keep_the_order_of_their_documents() -> None:
    rows = pack([5, 9, 5, 1, 9], 10)
    assert rows == [[0, 2], [1], [3, 4]]


def test_no_document_gives_no_row() -> None:
    assert pack([], 8) == []


@pytest.mark.parametrize("length", [0, 9])
def test_what_cannot_fit_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 8"):
        pack([3, length], 8)


def test_20000_documents_in_seconds() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(10, 2048) for _ in range(20_000)]
    start = time.process_time()
    rows = pack(lengths, 2048)
    assert time.process_time() - start < 5
    assert sum(lengths) / (len(rows) * 2048) > 0.98


def test_alike_keeps_every_row_and_needs_less_padding() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(10, 250) for _ in range(1003)]
    order = draw.sample(range(1003), 1003)
    found = alike(order, lengths, 8, seed=0)
    assert sorted(found) == list(range(1003)) and found[-3:] == order[-3:]

    def padded(rows: list[int]) -> int:
        return sum(len(rows[i : i + 8]) * max(lengths[row] for row in rows[i : i + 8]) for i in range(0, 1003, 8))

    assert padded(order) > 1.6 * sum(lengths) and padded(found) < 1.05 * sum(lengths)
    assert alike(order, lengths, 8, seed=0) == found != alike(order, lengths, 8, seed=1)
    means = [sum(lengths[row] for row in found[i : i + 8]) / 8 for i in range(0, 1000, 8)]
    assert means != sorted(means), "short and long batches alternate"


def test_alike_leaves_rows_near_their_place() -> None:
    size = 4 * MEGABATCH
    found = alike(range(3 * size), [1] * (3 * size), 4, seed=0)
    for share in range(3):
        assert set(found[share * size : (share + 1) * size]) == set(range(share * size, (share + 1) * size))
    assert alike([1, 0], [5, 5], 4, seed=0) == [1, 0]
