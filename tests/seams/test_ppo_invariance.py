"""What PPO learns from a minibatch does not depend on passes, padding, order, or the number of processes.

In fp64, but for what is fp32 by design: log-probabilities, values and the critic's head. In fp32 the gradients of
different passes differ by 1e-6 of their size, by the rounding of the products.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Experience, Pass, Rollout
from tests.ppo_batches import deviation, experience_of, gradients, parts, some_rollout, stir, whole
from tests.ppo_rig import FAMILY, small_actors, small_trainer
from tests.ppo_worker import COUNT, ESTIMATORS, step_on

CLOSE = 1e-6


class Step:
    """A step in its middle: the policy and the critic have moved since the rollout."""

    def __init__(self, folder: Path, critic: Any) -> None:
        self.trainer: PpoTrainer = small_trainer(
            folder,
            lambda _: [],
            actors=stir(small_actors(dtype=torch.float64, critic=critic), 1),
            size=16,
            micro=16,
            critic=critic,
            entropy=0.01,
        )
        self.rollout: Rollout = some_rollout(16)
        self.experience: Experience = experience_of(self.trainer, self.rollout)
        stir(self.trainer.actors, 2, 0.05)
        self.gradients, self.metrics = self.learn(whole(16))

    def learn(self, plan: Any, rollout: Rollout | None = None, experience: Experience | None = None) -> Any:
        return gradients(self.trainer, rollout or self.rollout, experience or self.experience, plan)

    def expect(self, found: Any) -> None:
        """The same gradients and losses."""
        theirs, metrics = found
        assert deviation(theirs, self.gradients) <= CLOSE
        assert metrics == pytest.approx(self.metrics, rel=CLOSE, abs=CLOSE)


@pytest.fixture(params=["adapter", "head"])
def step(request: Any, tmp_path: Path) -> Step:
    found = Step(tmp_path, request.param)
    # It would be no test if nothing was clipped, or no ratio was far from 1.
    assert 0.05 < found.metrics["policy/clipfrac_avg"] < 0.95 and 0.05 < found.metrics["val/clipfrac_avg"] < 0.95
    assert abs(found.metrics["val/ratio"] - 1) > 0.01 and found.metrics["val/ratio_max"] > 1.5
    return found


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 8])
def test_the_size_of_a_pass_does_not_matter(step: Step, micro: int) -> None:
    step.expect(step.learn(whole(16, micro)))


def test_what_padding_is_filled_with_does_not_matter(step: Step) -> None:
    for pad_id in (1, 7, 63):
        step.trainer.family = replace(FAMILY, pad_id=pad_id)
        step.expect(step.learn(whole(16)))


@pytest.mark.parametrize("sides", [(0, 9), (5, 0), (40, 40)], ids=["right", "left", "beyond the sliding window"])
def test_the_length_of_padding_does_not_matter(step: Step, sides: tuple[int, int]) -> None:
    own = step.trainer._collate

    def padded(rollout: Rollout, rows: Any) -> Pass:
        one = own(rollout, rows)
        fields = ("input_ids", "attention_mask", "places")
        return replace(one, **{name: pad(getattr(one, name), sides) for name in fields})

    step.trainer._collate = padded  # type: ignore[method-assign]
    step.expect(step.learn(whole(16)))


def test_longer_rows_of_what_was_seen_do_not_matter(step: Step) -> None:
    seen = step.experience
    longer = {name: pad(getattr(seen, name), (0, 5)) for name in Experience.__slots__}
    step.expect(step.learn(whole(16), experience=Experience(**longer)))


def test_the_order_of_the_responses_does_not_matter(step: Step) -> None:
    """Neither within a pass nor over the passes; from the rollout on."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    step.expect(step.learn([[[order[:5], order[5:]]]]))
    step.expect(
        step.learn(whole(16, 6), rollout=parts(step.rollout, order), experience=step.experience.of(torch.tensor(order)))
    )


def test_the_order_does_not_matter_to_advantages_and_returns(tmp_path: Path) -> None:
    actors = stir(small_actors(dtype=torch.float64), 1)
    trainer = small_trainer(tmp_path, lambda _: [], actors=actors, size=16, micro=16, whiten_rewards=True)
    rollout, scores = some_rollout(16), torch.linspace(-2, 3, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    expected = experience_of(trainer, rollout, scores).of(order)
    found = experience_of(trainer, parts(rollout, order.tolist()), scores[order])
    for name in Experience.__slots__:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=CLOSE, rtol=CLOSE)


# --- processes


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes learnt from its half."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.Popen(
        [*command, "-m", "tests.ppo_worker", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
    assert process.returncode == 0, printed
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_processes_learn_what_one_does(tmp_path: Path, both: list[dict[str, Any]], estimator: str) -> None:
    alone = step_on(tmp_path, estimator, 0, 1)
    assert alone["metrics"]["policy/grad_norm"] > 0.1, "it is clipped, and a clip before the sum would show"
    for rank, one in enumerate(found[estimator] for found in both):
        assert deviation(one["gradients"], alone["gradients"]) <= CLOSE
        assert deviation(one["moved"], alone["moved"]) <= 4 * CLOSE, "in four steps"
        assert one["metrics"] == pytest.approx(alone["metrics"], rel=CLOSE, abs=CLOSE)
        own = slice(rank * COUNT // 2, (rank + 1) * COUNT // 2)
        for name in ("advantages", "returns"):
            width = one[name].shape[1]
            torch.testing.assert_close(one[name], alone[name][own, :width], atol=CLOSE, rtol=CLOSE)
    first, second = (found[estimator] for found in both)
    assert all(torch.equal(first["moved"][name], second["moved"][name]) for name in first["moved"])
    assert first["metrics"] == second["metrics"]
