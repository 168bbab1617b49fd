"""How the responses of a step are dealt out, padded, and laid back in rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.train.ppo.passes import arrange, collate, spread
from gemma_tune.train.ppo.rollout import body, cut_at_stop
from gemma_tune.train.ppo.types import Rollout
from tests.ppo_batches import some_rollout
from tests.ppo_rig import FAMILY
from tests.unit.train.ppo.ragged import many

lengths_of_rows = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@many
@given(lengths_of_rows, st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))
def test_every_response_is_learnt_from_once_an_epoch(
    lengths: list[int], epochs: int, minibatches: int, micro: int, seed: int
) -> None:
    minibatches = min(minibatches, len(lengths))
    plan = arrange(lengths, epochs=epochs, minibatches=minibatches, micro=micro, seed=seed)
    assert len(plan) == epochs and {len(epoch) for epoch in plan} == {minibatches}
    for epoch in plan:
        assert sorted(row for minibatch in epoch for rows in minibatch for row in rows) == list(range(len(lengths)))
        sizes = [sum(map(len, minibatch)) for minibatch in epoch]
        assert max(sizes) - min(sizes) <= 1
        for minibatch in epoch:
            assert all(len(rows) == micro for rows in minibatch[:-1]) and 1 <= len(minibatch[-1]) <= micro
            in_order = [lengths[row] for rows in minibatch for row in rows]
            assert in_order == sorted(in_order, reverse=True), "the longest first: that pass must fit"


@many
@given(lengths_of_rows, st.integers(1, 4), st.integers(1, 7), st.integers(0, 99))
def test_what_a_minibatch_holds_does_not_depend_on_the_size_of_a_pass(
    lengths: list[int], minibatches: int, micro: int, seed: int
) -> None:
    minibatches = min(minibatches, len(lengths))
    one, other = (
        arrange(lengths, epochs=2, minibatches=minibatches, micro=size, seed=seed) for size in (micro, len(lengths))
    )
    for mine, theirs in zip((m for epoch in one for m in epoch), (m for epoch in other for m in epoch), strict=True):
        assert [row for rows in mine for row in rows] == theirs[0]


def test_each_epoch_and_each_seed_deals_anew() -> None:
    plan = arrange([5] * 32, epochs=2, minibatches=2, micro=16, seed=1)
    again = arrange([5] * 32, epochs=2, minibatches=2, micro=16, seed=1)
    other = arrange([5] * 32, epochs=2, minibatches=2, micro=16, seed=2)
    assert plan == again != other and plan[0] != plan[1]


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_a_pass_predicts_each_token_of_a_response_from_the_place_before_it(rows: list[int]) -> None:
    rollout = Rollout([[2, 10], [2], [2, 30, 31]], [[40, 41, 1], [50], [60, 1]], torch.tensor([True, False, True]))
    found = collate(rollout, rows, pad_id=0)
    whole = [[*rollout.prompts[row], *rollout.responses[row]] for row in rows]
    for place, ids in enumerate(whole):
        assert found.input_ids[place].tolist() == ids + [0] * (found.input_ids.shape[1] - len(ids))
        assert found.attention_mask[place].tolist() == [1] * len(ids) + [0] * (found.input_ids.shape[1] - len(ids))
    assert found.labels.tolist() == [token for row in rows for token in rollout.responses[row]]
    following = torch.roll(found.input_ids, -1, dims=1)
    assert following[found.places].tolist() == found.labels.tolist()
    assert found.rows.tolist() == rows


def test_spread_lays_the_tokens_back_in_their_rows_and_keeps_the_gradient() -> None:
    rollout = some_rollout(6)
    one = collate(rollout, [4, 0, 3], pad_id=0)
    flat = one.labels.float().requires_grad_()
    found = spread(flat, rollout.mask[one.rows])
    for place, row in enumerate([4, 0, 3]):
        length = len(rollout.responses[row])
        assert found[place, :length].tolist() == rollout.responses[row] and not found[place, length:].any()
    found.square().sum().backward()
    assert flat.grad is not None and flat.grad.tolist() == (2 * flat).tolist()


def test_the_mask_has_a_place_for_each_token() -> None:
    rollout = some_rollout(6)
    assert rollout.mask.sum(-1).tolist() == [len(response) for response in rollout.responses]
    assert rollout.tokens == int(rollout.mask.sum()) + sum(map(len, rollout.prompts))
    assert rollout.mask.shape[1] == max(map(len, rollout.responses))


@pytest.mark.parametrize(
    ("made", "response", "without"),
    [
        ([5, 6, 1, 0, 0], [5, 6, 1], [5, 6]),
        ([5, 6, 7], [5, 6, 7], [5, 6, 7]),
        ([1, 0, 0], [1], []),
        ([5, 0, 6, 1], [5, 0, 6, 1], [5, 0, 6]),  # a padding token that was drawn is a token like others
        ([5, 1, 1], [5, 1], [5]),
    ],
)
def test_a_response_ends_with_its_first_stop_token(made: list[int], response: list[int], without: list[int]) -> None:
    assert cut_at_stop(made, FAMILY) == response
    assert body(response, FAMILY) == without
