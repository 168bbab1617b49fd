"""Fixed responses for the PPO trainer of `tests.ppo_rig`, roles that all say something, and what a step did to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemma_tune.models.actors import Actors
from gemma_tune.train.ppo.passes import Plan
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Experience, Rollout
from tests.ppo_rig import VOCAB, prompts_of

STOP = 1


def some_rollout(count: int = 16, seed: int = 0, longest: int = 8) -> Rollout:
    """Random responses of 1 to `longest` tokens to random prompts; every other one ends with the stop token."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    responses = [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    for response in responses[::2]:
        response[-1] = STOP
    return Rollout(prompts_of(count, seed), responses, torch.arange(count) % 2 == 0)


def some_scores(rollout: Rollout, seed: int = 0) -> torch.Tensor:
    """[B]."""
    return torch.randn(len(rollout), generator=torch.Generator().manual_seed(seed))


def parts(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """These rows of it, in this order."""
    return Rollout(
        [rollout.prompts[row] for row in rows], [rollout.responses[row] for row in rows], rollout.stopped[list(rows)]
    )


def stir(actors: Actors, seed: int, spread: float = 0.1, *, only: str = "") -> Actors:
    """Move B of every adapter whose name has `only` in it, and the critic's head: so that no role repeats the base."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in actors.model.named_parameters():
            if "lora_B" in name and only in name:
                parameter.add_(spread * torch.randn(parameter.shape, generator=draw).to(parameter))
        if actors.value_head is not None and not only:
            for parameter in actors.value_head.parameters():
                parameter.add_(spread * torch.randn(parameter.shape, generator=draw).to(parameter))
    return actors


def whole(count: int, micro: int | None = None) -> Plan:
    """One epoch of one minibatch, in passes of `micro`."""
    rows, size = list(range(count)), micro or count
    return [[[rows[start : start + size] for start in range(0, count, size)]]]


def experience_of(trainer: PpoTrainer, rollout: Rollout, scores: torch.Tensor | None = None) -> Experience:
    """What the trainer sees in it before it learns."""
    seen = trainer.observe(rollout, whole(len(rollout)))
    return trainer.estimate(seen, some_scores(rollout) if scores is None else scores)


def gradients(
    trainer: PpoTrainer, rollout: Rollout, experience: Experience, plan: Plan
) -> tuple[dict[str, torch.Tensor], Mapping[str, float]]:
    """Of one minibatch, at the moment when the optimizer would take its step; it takes none. And the metrics."""
    trainer._take_step = lambda *_: {}  # type: ignore[method-assign]
    trainer.optimizer.zero_grad()
    metrics = trainer.learn(rollout, experience, plan)
    found = {
        name: parameter.grad.clone()
        for name, parameter in trained(trainer.actors).items()
        if parameter.grad is not None
    }
    trainer.optimizer.zero_grad()
    del trainer._take_step  # the class's own again
    return found, metrics


def trained(actors: Actors) -> dict[str, torch.nn.Parameter]:
    """Every parameter that a loss may move, by name."""
    named: dict[str, Any] = dict(actors.model.named_parameters())
    if actors.value_head is not None:
        named |= {f"value_head.{name}": parameter for name, parameter in actors.value_head.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def tensors(actors: Actors) -> dict[str, torch.Tensor]:
    """A copy of everything that the model and its heads hold."""
    named = dict(actors.model.state_dict())
    for name, head in heads(actors).items():
        named |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
    return {name: value.clone() for name, value in named.items()}


def heads(actors: Actors) -> dict[str, torch.nn.Module]:
    found = {f"reward_head {source}": role.head for source, role in actors.rewards.items()}
    return found if actors.value_head is None else {**found, "value_head": actors.value_head}


def deviation(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest relative one: |a - b| / |b| of each tensor, by the Euclidean norm."""
    assert found.keys() == expected.keys() and found
    return max(
        float((found[name].double() - expected[name].double()).norm() / expected[name].double().norm())
        for name in expected
    )
