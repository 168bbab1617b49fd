"""The trainer's rewards, advantages, losses and figures against `tests.ppo_reference`, written by other eyes.

Both are given the same log-probabilities, values and scores, in fp64. The trainer's methods are called as a step calls
them; only its forward passes are replaced by the numbers of the batch.

The reference adds 1e-8 to the standard deviation, ours to the variance: with a deviation of 0.1 the advantages differ
by a millionth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma_tune.train.ppo import trainer as trainer_module
from gemma_tune.train.ppo.passes import Plan
from gemma_tune.train.ppo.rewards import shape_scores
from gemma_tune.train.ppo.scores import Scores
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Experience, Pass, Rollout
from tests import ppo_reference
from tests.ppo_reference import Response, Settings, random_batch, reference
from tests.ppo_rig import small_actors, small_trainer

SEEDS = range(4)
CLOSE = {"rel": 1e-6, "abs": 1e-6}

SETTINGS = {
    "usual": Settings(),
    "everything else": Settings(
        kl=0.3, gamma=0.97, lam=0.8, clip=0.1, value_clip=0.35, score_clip=2.0, missing_stop_penalty=1.5
    ),
    "no value clip, lambda 1": Settings(lam=1.0, value_clip=None, score_clip=1.0),
    "lambda 0": Settings(lam=0.0, gamma=0.9),
    "rloo": Settings(estimator="rloo", group_size=2, missing_stop_penalty=1.0),
    "rloo of four": Settings(estimator="rloo", group_size=4, kl=0.2, clip=0.1, score_clip=2.0),
    "reinforce_pp": Settings(estimator="reinforce_pp", missing_stop_penalty=1.0),
    "reinforce_pp, discounted": Settings(estimator="reinforce_pp", gamma=0.9, kl=0.2, clip=0.3),
}


class Told:
    """A trainer whose policy, reference and critic say what the batch says."""

    def __init__(self, folder: Path, batch: Sequence[Response], settings: Settings) -> None:
        self.batch = batch
        self.trainer: PpoTrainer = small_trainer(
            folder,
            lambda _: [],
            actors=small_actors(critic="adapter" if settings.estimator == "gae" else None),
            size=len(batch),
            micro=len(batch),
            estimator=settings.estimator,
            samples_per_prompt=settings.group_size or 1,
            kl=settings.kl,
            gamma=settings.gamma,
            lam=settings.lam,
            clip=settings.clip,
            value_clip=settings.value_clip,
            score_clip=settings.score_clip,
            missing_stop_penalty=settings.missing_stop_penalty,
            whiten_rewards=settings.whiten_rewards,
        )
        self.trainer._score = self._score  # type: ignore[method-assign]
        self.trainer._values = self._values  # type: ignore[method-assign]
        self.trainer._take_step = lambda *_: {}  # type: ignore[method-assign]
        self.rollout = Rollout(
            [[2]] * len(batch), [[3] * len(one) for one in batch], torch.tensor([one.stopped for one in batch])
        )
        self.scores = torch.tensor([one.score for one in batch], dtype=torch.float64)
        self.shaped = shape_scores(
            self.scores,
            self.rollout.stopped,
            clip=self.trainer.args.score_clip,
            missing_stop_penalty=self.trainer.args.missing_stop_penalty,
        )
        self.raw: list[torch.Tensor] = []

    def estimate(self) -> Experience:
        """As a step does; `raw` are the advantages before they were whitened."""
        own = trainer_module.whiten

        def whiten(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("shift_mean", True):
                self.raw.append(values)
            return own(values, *args, **kwargs)

        blank = torch.zeros(self.rollout.mask.shape, dtype=torch.float64)
        seen = Experience(
            self.rollout.mask,
            self.padded("old_log_probs"),
            blank,
            self.padded("reference_log_probs"),
            self.padded("old_values"),
            blank,
            blank,
            blank,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer_module, "whiten", whiten)
            return self.trainer.estimate(seen, self.shaped)

    def learn(self, experience: Experience, plan: Plan) -> dict[str, float]:
        return self.trainer.learn(self.rollout, experience, plan)

    def describe(self, experience: Experience) -> dict[str, float]:
        return self.trainer._describe(self.rollout, Scores(self.scores, {}), self.shaped, experience)

    def padded(self, name: str) -> torch.Tensor:
        return padded([getattr(one, name) for one in self.batch])

    def _score(self, adapters: Any, one: Pass, *, with_entropy: bool = False) -> tuple[torch.Tensor, ...]:
        flat = torch.cat([torch.from_numpy(self.batch[row].new_log_probs) for row in one.rows])
        return flat.requires_grad_(), torch.zeros_like(flat), flat

    def _values(self, one: Pass, hidden: Any) -> torch.Tensor:
        return torch.cat([torch.from_numpy(self.batch[row].new_values) for row in one.rows]).requires_grad_()


def padded(rows: ppo_reference.Ragged) -> torch.Tensor:
    """[B, T] with zeros behind each row."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(np.asarray(row)) for row in rows], batch_first=True)


def same(ours: torch.Tensor, theirs: ppo_reference.Ragged) -> None:
    torch.testing.assert_close(ours, padded(theirs), atol=1e-6, rtol=1e-6)


@pytest.fixture(params=SETTINGS, ids=str)
def settings(request: Any) -> Settings:
    return SETTINGS[request.param]


@pytest.mark.parametrize("seed", SEEDS)
def test_rewards_advantages_and_returns(tmp_path: Path, settings: Settings, seed: int) -> None:
    batch = random_batch(seed)
    told, expected = Told(tmp_path, batch, settings), reference(batch, settings)
    found = told.estimate()
    assert told.shaped.tolist() == pytest.approx(expected.scores, rel=1e-12)
    same(found.rewards, expected.used_rewards)
    [raw] = told.raw
    same(raw, expected.raw_advantages)
    same(found.advantages, expected.advantages)
    if settings.estimator == "gae":
        same(found.returns, expected.returns)
    else:
        assert not found.returns.any(), "nobody is trained towards them"


@pytest.mark.parametrize("wild", [False, True], ids=["", "wild"])
@pytest.mark.parametrize("drift", [0.3, 0.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_and_their_figures(tmp_path: Path, settings: Settings, seed: int, drift: float, wild: bool) -> None:
    """Whole, and in passes of three: of which the figures are sums over tokens, never means of means."""
    batch = random_batch(seed, responses=16, drift=drift, wild=wild)
    told, expected = Told(tmp_path, batch, settings), reference(batch, settings)
    experience = told.estimate()
    for size in (16, 3):
        found = told.learn(experience, [[[list(range(16))[start : start + size] for start in range(0, 16, size)]]])
        check_losses(found, expected.losses)
    if drift == 0.3:
        assert expected.losses.policy_clip_fraction > 0 and expected.losses.approx_kl > 0.01


def check_losses(found: dict[str, float], expected: ppo_reference.Losses) -> None:
    assert found["loss/policy_avg"] == pytest.approx(expected.policy, **CLOSE)
    assert found["policy/clipfrac_avg"] == pytest.approx(expected.policy_clip_fraction, abs=1e-12)
    assert found["policy/approxkl_avg"] == pytest.approx(expected.approx_kl, **CLOSE)
    assert found["val/ratio"] == pytest.approx(expected.mean_ratio, **CLOSE)
    assert ("loss/value_avg" in found) == (expected.value is not None)
    if expected.value is not None:
        assert found["loss/value_avg"] == pytest.approx(expected.value, **CLOSE)
        assert found["val/clipfrac_avg"] == pytest.approx(expected.value_clip_fraction, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_minibatch_has_the_losses_of_its_part(tmp_path: Path, settings: Settings, seed: int) -> None:
    """Its advantages are those of the whole batch; the figures of a step are means over its minibatches."""
    batch = random_batch(seed, responses=16)
    told, expected = Told(tmp_path, batch, settings), reference(batch, settings)
    experience = told.estimate()
    halves = [[0, 3, 5, 6, 9, 10, 12, 15], [1, 2, 4, 7, 8, 11, 13, 14]]
    theirs = [
        ppo_reference.losses(
            [batch[row] for row in rows],
            [expected.advantages[row] for row in rows],
            [expected.returns[row] for row in rows],
            settings,
        )
        for rows in halves
    ]
    for rows, one in zip(halves, theirs, strict=True):
        check_losses(told.learn(experience, [[[rows[:5], rows[5:]]]]), one)
    both = told.learn(experience, [[[rows] for rows in halves]])
    assert both["loss/policy_avg"] == pytest.approx((theirs[0].policy + theirs[1].policy) / 2, **CLOSE)
    assert both["policy/approxkl_avg"] == pytest.approx((theirs[0].approx_kl + theirs[1].approx_kl) / 2, **CLOSE)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_said_of_a_rollout(tmp_path: Path, settings: Settings, seed: int) -> None:
    batch = random_batch(seed)
    told, expected = Told(tmp_path, batch, settings), reference(batch, settings)
    found = told.describe(told.estimate())
    assert found["objective/kl"] == pytest.approx(expected.reference_k1, **CLOSE)
    assert found["objective/kl_k3"] == pytest.approx(expected.reference_k3, **CLOSE)
    assert found["objective/rlhf_reward"] == pytest.approx(np.mean([row.sum() for row in expected.rewards]), **CLOSE)
    assert found["objective/scores"] == pytest.approx(np.mean([one.score for one in batch]), **CLOSE)
    assert found["objective/scores_std"] == pytest.approx(np.std([one.score for one in batch]), **CLOSE)
    assert found["rollout/length"] == np.mean([len(one) for one in batch])
    assert found["rollout/stopped"] == np.mean([one.stopped for one in batch])
    if expected.explained_variance is not None:
        assert found["val/explained_variance"] == pytest.approx(expected.explained_variance, **CLOSE)


@pytest.mark.parametrize("estimator", ["gae", "reinforce_pp"])
@pytest.mark.parametrize("seed", SEEDS)
def test_whitened_rewards(tmp_path: Path, seed: int, estimator: Any) -> None:
    """Here the two read the literature differently. The reference divides by the deviation; ours, as openai's code and
    TRL's, keeps the mean of the rewards instead, and so adds mean (1 - 1 / deviation) to each token. From there on they
    agree again."""
    batch, settings = random_batch(seed), Settings(estimator=estimator, whiten_rewards=True)
    told, expected = Told(tmp_path, batch, settings), reference(batch, settings)
    found = told.estimate()
    plain = np.concatenate(expected.rewards)
    ours = [row + plain.mean() * (1 - 1 / plain.std()) for row in expected.used_rewards]
    same(found.rewards, ours)
    kept = found.rewards[found.mask]
    assert float(kept.mean()) == pytest.approx(plain.mean()) and float(kept.std(correction=0)) == pytest.approx(1)
    raw, returns = ppo_reference.estimate(batch, ours, settings)
    same(told.raw[0], raw)
    same(found.advantages, ppo_reference.whitened(raw))
    if estimator == "gae":
        same(found.returns, returns)
