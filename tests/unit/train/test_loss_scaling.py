"""The loss scaler: what is skipped, who hears of it, and when it gives up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from gemma_tune.errors import TrainingError
from gemma_tune.train.loss_scaling import INITIAL, MOST_SKIPPED, LossScaler


@pytest.fixture
def weight() -> Iterator[torch.nn.Parameter]:
    Accelerator(cpu=True)
    yield torch.nn.Parameter(torch.ones(3))


def step(scaler: torch.amp.GradScaler, optimizer: AcceleratedOptimizer, weight: torch.nn.Parameter, to: float) -> None:
    scaler.scale((weight * to).sum()).backward()
    scaler.unscale_(optimizer.optimizer)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_changes_nothing_but_the_scale(weight: torch.nn.Parameter, fused: bool) -> None:
    scaler = LossScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], lr=0.1, fused=fused), scaler=scaler)
    step(scaler, optimizer, weight, 2.0)
    moved = weight.detach().clone()
    assert not torch.equal(moved, torch.ones(3)) and not optimizer.step_was_skipped
    assert scaler.figures() == {"loss_scale": INITIAL, "skipped_steps": 0}
    for skipped in (1, 2):
        step(scaler, optimizer, weight, float("inf"))
        assert torch.equal(weight, moved) and optimizer.step_was_skipped
        assert scaler.figures() == {"loss_scale": INITIAL / 2**skipped, "skipped_steps": skipped}
    step(scaler, optimizer, weight, 2.0)
    assert not torch.equal(weight, moved) and not optimizer.step_was_skipped
    assert (scaler.skipped, scaler.in_a_row) == (2, 0)


def test_the_gradient_is_that_of_the_loss(weight: torch.nn.Parameter) -> None:
    scaler = LossScaler("cpu")
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * 3).sum()).backward()
    assert weight.grad is not None and float(weight.grad[0]) == 3 * INITIAL
    scaler.step(optimizer)  # which divides, where nobody did
    assert torch.equal(weight, torch.full((3,), -2.0))


def test_accelerate_hears_nothing_of_a_fused_kernels_skip(weight: torch.nn.Parameter) -> None:
    """Why `LossScaler.step` does not call the optimizer. Where this fails, accelerate has learnt to ask."""
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight], lr=0.1, fused=True), scaler=scaler)
    step(scaler, optimizer, weight, float("inf"))
    assert torch.equal(weight, torch.ones(3)) and not optimizer.step_was_skipped


def test_it_gives_up(weight: torch.nn.Parameter) -> None:
    scaler = LossScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight]), scaler=scaler)
    for _ in range(MOST_SKIPPED - 1):
        step(scaler, optimizer, weight, float("nan"))
    with pytest.raises(TrainingError, match=f"{MOST_SKIPPED} steps in a row") as caught:
        step(scaler, optimizer, weight, float("nan"))
    assert "model.precision: fp32" in caught.value.problems[0].fix
    assert torch.equal(weight, torch.ones(3))


def test_a_step_in_between_starts_the_count_again(weight: torch.nn.Parameter) -> None:
    scaler = LossScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight]), scaler=scaler)
    for _ in range(3):
        for _ in range(MOST_SKIPPED - 2):
            step(scaler, optimizer, weight, float("inf"))
        step(scaler, optimizer, weight, 0.0)
    assert scaler.skipped == 3 * (MOST_SKIPPED - 2) and scaler.in_a_row == 0


def test_its_state_is_saved(weight: torch.nn.Parameter) -> None:
    scaler = LossScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.AdamW([weight]), scaler=scaler)
    for to in (float("inf"), 1.0, float("inf")):
        step(scaler, optimizer, weight, to)
    again = LossScaler("cpu")
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict() == scaler.state_dict()
    assert again.figures() == {"loss_scale": INITIAL / 4, "skipped_steps": 2} and again.in_a_row == 1


def test_a_checkpoint_with_the_state_of_torchs_own_scaler_is_read() -> None:
    """Runs in plain fp16 of before `LossScaler` have it."""
    before = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    before.scale(torch.zeros(()))
    again = LossScaler("cpu")
    again.load_state_dict(before.state_dict())
    assert again.figures() == {"loss_scale": 2.0**7, "skipped_steps": 0}


def test_switched_off_it_is_not_there(weight: torch.nn.Parameter) -> None:
    scaler = LossScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * 3).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight, torch.full((3,), -2.0)) and scaler.state_dict() == {}
    scaler.load_state_dict({})
