"""Which prompts a step takes, and the seed of everything random in it.

Both are functions of the step, so that nothing of them has to be saved for a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gemma_tune.errors import UserError

Chat = list[dict[str, str]]
"""A conversation as `{"role", "content"}` messages."""


def seed_of(*numbers: int) -> int:
    """A 32-bit seed of (the recipe's seed, step, process)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class PromptOrder:
    """Prompts of each step, for one of `world_size` processes.

    All prompts come once before any comes twice; each pass over them has an order of its own, but for the first, in
    which they come as they were prepared.

    Args:
        prompts: token ids of each.
        conversations: the same prompts as reward functions get them; empty where none asks.
        size: responses that this process draws in a step.
        group: responses to each prompt; they stand next to each other.
        seed: of the orders.
        rank, world_size: of the process.

    Raises:
        UserError: `group` does not divide `size`.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        conversations: Sequence[Chat],
        size: int,
        group: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if size % group:
            raise UserError(
                f"a process draws {size} responses a step, which are no whole groups of {group}",
                where="ppo.samples_per_prompt",
                fix="let it divide batch.size / processes",
            )
        self._prompts = prompts
        self._conversations = conversations
        self._own = size // group
        self._group = group
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    @property
    def steps_in_epoch(self) -> float:
        """Steps in which every prompt comes once."""
        return len(self._prompts) / (self._own * self._world_size)

    def of(self, step: int) -> tuple[list[list[int]], list[Chat]]:
        """(token ids, conversations) of step `step`, counted from 0; `size` of each."""
        first = (step * self._world_size + self._rank) * self._own
        ids: list[list[int]] = []
        conversations: list[Chat] = []
        for place in range(first, first + self._own):
            epoch, within = divmod(place, len(self._prompts))
            row = int(_order(self._seed, epoch, len(self._prompts))[within])
            ids += [list(self._prompts[row])] * self._group
            if self._conversations:
                conversations += [self._conversations[row]] * self._group
        return ids, conversations


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    if not epoch:
        return np.arange(count)
    return np.random.default_rng([seed, epoch]).permutation(count)
