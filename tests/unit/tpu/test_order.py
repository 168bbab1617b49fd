"""The order of rows on a TPU is torch's."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from gemma_tune.tpu.order import batches, epoch_order, permutation


@pytest.mark.parametrize("count", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("seed", [0, 1, 42, 2**31])
def test_a_permutation_is_that_of_torch(count: int, seed: int) -> None:
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert permutation(count, seed) == drawn.tolist()


def test_epochs_have_an_order_each_and_the_last_batch_holds_what_is_left() -> None:
    found = [list(rows) for rows in batches(10, 4, seed=3, shuffle=True, first=0, steps=6)]
    assert [len(rows) for rows in found] == [4, 4, 2, 4, 4, 2]
    first, second = [*chain(*found[:3])], [*chain(*found[3:])]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert first == epoch_order(10, 3, 0, True) and second == epoch_order(10, 4, 0, True)


def test_a_resumed_run_sees_the_rows_that_are_left() -> None:
    whole = list(batches(10, 4, seed=3, shuffle=True, first=0, steps=6))
    for step in range(6):
        assert list(batches(10, 4, seed=3, shuffle=True, first=step, steps=6)) == whole[step:]


def test_without_shuffling_rows_come_as_they_lie() -> None:
    assert list(batches(5, 2, seed=0, shuffle=False, first=0, steps=3)) == [[0, 1], [2, 3], [4]]
