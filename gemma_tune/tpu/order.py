"""The order of the rows of an epoch, as torch's trainer has it, without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def permutation(count: int, seed: int) -> list[int]:
    """`torch.randperm(count, generator=torch.Generator().manual_seed(seed))` on a CPU.

    torch 2.13 (aten/src/ATen/native/TensorFactories.cpp, randperm_cpu) swaps place i with one of those from i on, by
    the remainder of one 32-bit number of a Mersenne twister, which numpy's RandomState seeds in the same way.
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, size=max(count - 1, 0), dtype=np.uint32).tolist()
    order = list(range(count))
    for place, draw in enumerate(draws):
        other = place + draw % (count - place)
        order[place], order[other] = order[other], order[place]
    return order


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Rows of one epoch: accelerate's SeedableRandomSampler seeds each with seed + epoch."""
    return permutation(count, seed + epoch) if shuffle else list(range(count))


def batches(count: int, size: int, seed: int, shuffle: bool, *, first: int, steps: int) -> Iterator[Sequence[int]]:
    """The rows of the steps `first` .. `steps` - 1; the last batch of an epoch holds what is left."""
    an_epoch = -(-count // size)
    order, of = [], -1
    for step in range(first, steps):
        epoch, place = divmod(step, an_epoch)
        if epoch != of:
            order, of = epoch_order(count, seed, epoch, shuffle), epoch
        yield order[place * size : (place + 1) * size]
