"""Which prompts a step takes, on one process or several."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.errors import UserError
from gemma_tune.train.ppo.prompts import PromptOrder, seed_of
from tests.unit.train.ppo.ragged import many


def orders(count: int, size: int, group: int = 1, seed: int = 0, processes: int = 1) -> list[PromptOrder]:
    prompts = [[number] for number in range(count)]
    chats = [[{"role": "user", "content": str(number)}] for number in range(count)]
    return [PromptOrder(prompts, chats, size, group, seed, rank, processes) for rank in range(processes)]


def taken(found: list[PromptOrder], step: int) -> list[int]:
    return [ids[0] for order in found for ids in order.of(step)[0]]


@many
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9))
def test_every_prompt_comes_once_before_any_comes_twice(
    count: int, own: int, group: int, processes: int, seed: int
) -> None:
    found = orders(count, own * group, group, seed, processes)
    steps = 2 * count // (own * processes) + 2
    drawn = [taken(found, step) for step in range(steps)]
    for step in drawn:  # the answers to a prompt stand next to each other
        assert all(step[place] == step[place - place % group] for place in range(len(step)))
    alone = [number for step in drawn for number in step[::group]]
    for start in range(0, len(alone) - count + 1, count):
        assert sorted(alone[start : start + count]) == list(range(count))
    assert alone[:count] == list(range(count)), "the first time as they were prepared"
    assert found[0].steps_in_epoch == count / (own * processes)


@many
@given(st.integers(1, 30), st.sampled_from([1, 2, 4]), st.integers(0, 9), st.integers(0, 20))
def test_several_processes_share_what_one_takes(count: int, processes: int, seed: int, step: int) -> None:
    one, several = orders(count, 8, 2, seed), orders(count, 8 // processes, 2, seed, processes)
    assert taken(several, step) == taken(one, step)


def test_later_passes_have_orders_of_their_own_that_the_seed_gives() -> None:
    [first], [again], [other] = orders(40, 40), orders(40, 40), orders(40, 40, seed=1)
    passes = [taken([first], step) for step in range(4)]
    assert len({tuple(one) for one in passes}) == 4
    assert [taken([again], step) for step in (3, 1)] == [passes[3], passes[1]], "whatever was asked before"
    assert taken([other], 1) != passes[1]


def test_conversations_go_with_their_prompts() -> None:
    [order] = orders(7, 6, 2)
    for step in range(5):
        ids, chats = order.of(step)
        assert [chat[0]["content"] for chat in chats] == [str(one[0]) for one in ids]


def test_nobody_can_change_the_prompts_through_a_step() -> None:
    [order] = orders(3, 3)
    order.of(0)[0][0].append(99)
    assert order.of(0)[0][0] == [0]


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="whole groups of 4"):
        orders(10, 6, 4)


def test_seeds_differ_with_each_of_their_numbers() -> None:
    numbers = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
    assert len({seed_of(*one) for one in numbers}) == len(numbers)
    assert all(0 <= seed_of(*one) < 2**32 for one in numbers)
