"""What must not matter: what stands in the padding, how much of it, the order of the responses, the processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.train.ppo.advantages import Total, gae, identity, masked_mean, rewards_to_go, whiten
from gemma_tune.train.ppo.losses import explained_variance, policy_terms, value_terms
from gemma_tune.train.ppo.rewards import token_rewards
from tests.unit.train.ppo.ragged import Ragged, close, many, ragged

Tensors = dict[str, torch.Tensor]


def make(batch: Ragged) -> Tensors:
    a, b, c = batch.tokens(), batch.tokens(), batch.tokens()
    return {"a": a, "b": b, "c": c, "near_a": a + 0.3 * b, "scores": batch.responses(), "mask": batch.mask}


def loss_and_gradient(terms: Callable, x: Tensors) -> Tensors:
    """All terms of a loss, and the gradient of its first argument."""
    trained = x["near_a"].clone().requires_grad_()
    made = terms(trained, x["a"], x["c"], x["mask"], clip=0.2)
    made.loss.backward()
    return {name: getattr(made, name).detach().double() for name in made.__slots__} | {"gradient": trained.grad}


def advantages_and_returns(x: Tensors) -> Tensors:
    advantages, returns = gae(x["a"], x["b"], x["mask"], gamma=0.99, lam=0.95)
    return {"advantages": advantages, "returns": returns}


FUNCTIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "masked_mean": lambda x: {"mean": masked_mean(x["a"], x["mask"])},
    "whiten": lambda x: {"whitened": whiten(x["a"], x["mask"])},
    "whiten, not shifted": lambda x: {"whitened": whiten(x["a"], x["mask"], shift_mean=False)},
    "gae": advantages_and_returns,
    "rewards_to_go": lambda x: {"sums": rewards_to_go(x["a"], x["mask"], gamma=0.99)},
    "token_rewards": lambda x: {"rewards": token_rewards(x["scores"], x["a"], x["b"], x["mask"], coefficient=0.1)},
    "policy_terms": lambda x: loss_and_gradient(policy_terms, x),
    "value_terms": lambda x: loss_and_gradient(value_terms, x),
    "explained_variance": lambda x: {
        "share": torch.tensor(explained_variance(x["a"], x["b"], x["mask"]), dtype=torch.float64)
    },
}

each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@each_function
@many
@given(batch=ragged(least_rows=2))
def test_what_stands_in_the_padding_does_not_matter(function: Callable[[Tensors], Tensors], batch: Ragged) -> None:
    ours, clean = function(make(batch)), function(make(replace(batch, garbage=0.0)))
    for name, value in ours.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, clean[name]), name
        if value.dim() == 2:
            assert (value[~batch.mask] == 0).all(), name


@each_function
@many
@given(batch=ragged(least_rows=2), more=st.integers(1, 5))
def test_how_much_padding_there_is_does_not_matter(
    function: Callable[[Tensors], Tensors], batch: Ragged, more: int
) -> None:
    narrow, wide = function(make(batch)), function(make(replace(batch, columns=batch.columns + more)))
    for name, value in wide.items():
        close(value[:, : batch.columns] if value.dim() == 2 else value, narrow[name])
        if value.dim() == 2:
            assert (value[:, batch.columns :] == 0).all(), name


@each_function
@many
@given(batch=ragged(least_rows=2), random=st.randoms(use_true_random=False))
def test_the_order_of_the_responses_does_not_matter(
    function: Callable[[Tensors], Tensors], batch: Ragged, random: object
) -> None:
    order = list(range(len(batch.lengths)))
    random.shuffle(order)
    x = make(batch)
    straight, shuffled = function(x), function({name: tensor[order] for name, tensor in x.items()})
    for name, value in shuffled.items():
        close(value, straight[name][order] if value.dim() == 2 else straight[name])


# --- several processes


def on_two_processes(work: Callable[[int, Total], object]) -> list:
    """`work(rank, total)` in two threads that add up as two processes would: both wait until both have come."""
    barrier = threading.Barrier(2, timeout=10)
    brought: list[torch.Tensor] = [torch.empty(0), torch.empty(0)]

    def total_of(rank: int) -> Total:
        def total(sums: torch.Tensor) -> torch.Tensor:
            brought[rank] = sums
            barrier.wait()
            added = brought[0] + brought[1]
            barrier.wait()
            return added

        return total

    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(work, rank, total_of(rank)) for rank in (0, 1)]
        return [future.result() for future in futures]


OVER_PROCESSES: dict[str, Callable[[Tensors, Total], torch.Tensor]] = {
    "masked_mean": lambda x, total: masked_mean(x["a"], x["mask"], total),
    "whiten": lambda x, total: whiten(x["a"], x["mask"], total=total),
    "whiten, not shifted": lambda x, total: whiten(x["a"], x["mask"], shift_mean=False, total=total),
    "explained_variance": lambda x, total: torch.tensor(
        explained_variance(x["a"], x["b"], x["mask"], total), dtype=torch.float64
    ),
}


@pytest.mark.parametrize("function", OVER_PROCESSES.values(), ids=OVER_PROCESSES.keys())
@many
@given(batch=ragged(least_rows=2), cut=st.integers(1, 4))
def test_two_processes_find_what_one_finds(
    function: Callable[[Tensors, Total], torch.Tensor], batch: Ragged, cut: int
) -> None:
    cut = min(cut, len(batch.lengths) - 1)
    x = make(batch)
    halves = [{k: v[:cut] for k, v in x.items()}, {k: v[cut:] for k, v in x.items()}]
    one = function(x, identity)
    two = on_two_processes(lambda rank, total: function(halves[rank], total))
    if one.dim() == 2:
        close(torch.cat(two), one)
    else:
        close(two[0], one)
        close(two[1], one)


def test_a_process_alone_would_find_something_else() -> None:
    """Otherwise the test above could not fail."""
    x = make(Ragged([3, 5, 2, 4], 5, 0.0, 1))
    half = {k: v[:2] for k, v in x.items()}
    for function in OVER_PROCESSES.values():
        whole, alone = function(x, identity), function(half, identity)
        expected = whole[:2] if whole.dim() == 2 else whole
        assert (alone - expected).abs().max() > 0.01


def test_a_process_without_a_token_counts_for_nothing() -> None:
    x = make(Ragged([3, 5], 5, float("nan"), 1))
    empty = x | {"mask": torch.zeros_like(x["mask"])}
    for function in OVER_PROCESSES.values():
        one = function(x, identity)
        full, without = on_two_processes(lambda rank, total, f=function: f((x, empty)[rank], total))
        close(full, one)
        if without.dim() == 2:
            assert (without == 0).all()
        else:
            close(without, one)
