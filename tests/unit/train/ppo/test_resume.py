"""A run that was killed goes on in the same bits: metrics, policy, critic, optimizer, KL coefficient, learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from gemma_tune.errors import TrainingError
from gemma_tune.train import checkpoint
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Rollout
from tests.ppo_batches import tensors
from tests.ppo_rig import prompts_of, small_actors, small_trainer, wanted_share

STEPS, KILLED = 6, 3
CLOCK = ("time/rollout", "time/score", "time/update", "rollout/tokens_per_second", "update/tokens_per_second")
RUN: dict[str, Any] = {
    "size": 16,
    "micro": 8,
    "max_steps": STEPS,
    "lr_scheduler_type": "linear",
    "warmup_steps": 2,
    "kl": 0.1,
    "kl_target": 0.05,
    "kl_horizon": 100,
    "critic_warmup": 1,
    "missing_stop_penalty": 0.5,
    "score_clip": 0.4,
    "entropy": 0.01,
    "whiten_rewards": True,
    "logging_steps": 1,
    "save_steps": 1,
}


class Killed(BaseException):
    """As a signal that nobody handles: no `except Exception` sees it."""


class Kept(TrainerCallback):
    """What is logged, but for the clock."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        own = {name: value for name, value in logs.items() if name not in CLOCK}
        self.rows.setdefault(state.global_step, {}).update(own)


def trainer_in(folder: Path, score: Any = wanted_share, **changes: Any) -> tuple[PpoTrainer, Kept]:
    folder.mkdir(exist_ok=True)
    settings = {**RUN, **changes}
    critic: Any = settings.get("critic", "adapter") if settings.get("estimator", "gae") == "gae" else None
    made = small_trainer(folder, score, actors=small_actors(critic=critic), prompts=prompts_of(20), **settings)
    kept = Kept()
    made.add_callback(kept)
    return made, kept


def everything(trainer: PpoTrainer) -> dict[str, Any]:
    """All that a later step depends on."""
    slots = trainer.optimizer.state_dict()["state"]
    return {
        **tensors(trainer.actors),
        **{f"{slot} {key}": value for slot, of_slot in slots.items() for key, value in of_slot.items()},
        "kl": torch.tensor(trainer.kl.coefficient, dtype=torch.float64),
        "rates": torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64),
        "step": torch.tensor(trainer.state.global_step),
    }


def expect_the_same(first: PpoTrainer, second: PpoTrainer) -> None:
    ours, theirs = everything(first), everything(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def killed_while_scoring(folder: Path, **changes: Any) -> None:
    """The responses of step KILLED are drawn, and nothing is known of them."""
    calls = 0

    def score(rollout: Rollout) -> Sequence[float]:
        nonlocal calls
        calls += 1
        if calls == KILLED + 1:
            raise Killed
        return wanted_share(rollout)

    with pytest.raises(Killed):
        trainer_in(folder, score, **changes)[0].train()


def killed_while_learning(folder: Path, **changes: Any) -> None:
    """Between the optimizer steps of step KILLED: the weights have moved and nobody saved them."""
    trainer, _ = trainer_in(folder, **changes)
    own = trainer._take_step

    def take_step(*args: Any) -> dict[str, float]:
        taken = own(*args)
        if trainer.state.global_step == KILLED:
            raise Killed
        return taken

    trainer._take_step = take_step  # type: ignore[method-assign]
    with pytest.raises(Killed):
        trainer.train()


@pytest.fixture(
    params=[
        {},
        {"critic": "head"},
        {"estimator": "rloo", "samples_per_prompt": 4},
        {"activation_checkpointing": True, "stop_kl": 0.002},
    ],
    ids=str,
)
def changes(request: Any) -> dict[str, Any]:
    return dict(request.param)


@pytest.mark.parametrize("kill", [killed_while_scoring, killed_while_learning])
def test_killed_in_the_middle_of_a_step(tmp_path: Path, changes: dict[str, Any], kill: Any) -> None:
    straight, expected = trainer_in(tmp_path / "straight", **changes)
    straight.train()
    rates = [row["learning_rate"] for row in expected.rows.values()]
    coefficients = [row["objective/kl_coefficient"] for row in expected.rows.values()]
    assert len(set(rates)) >= STEPS - 1 and len(set(coefficients)) == STEPS, "they move, and have to be kept"

    kill(tmp_path / "cut", **changes)
    found = checkpoint.newest(tmp_path / "cut").found
    assert found is not None and found.step == KILLED
    torch.manual_seed(99)  # whatever the process did before
    resumed, kept = trainer_in(tmp_path / "cut", **changes)
    resumed.train(str(found.folder))
    assert kept.rows == {step: row for step, row in expected.rows.items() if step > KILLED}
    assert max(kept.rows) == STEPS
    expect_the_same(resumed, straight)


def test_a_checkpoint_holds_the_step_that_it_names(tmp_path: Path) -> None:
    """Opened where nothing is left to do, it is what the run ended with."""
    straight, _ = trainer_in(tmp_path / "straight")
    straight.train()
    again, _ = trainer_in(tmp_path / "again")
    again.load_trained(tmp_path / "straight" / f"checkpoint-{STEPS}")
    expect_the_same(again, straight)


def test_a_stop_during_the_rollout_gives_it_up_and_saves(tmp_path: Path) -> None:
    straight, _ = trainer_in(tmp_path / "straight")
    straight.train()

    def score(rollout: Rollout) -> Sequence[float]:
        if cut.state.global_step == KILLED - 1:  # the signal comes now; the next rollout asks for it
            cut._signals.requested = "SIGTERM"
        return wanted_share(rollout)

    cut, _ = trainer_in(tmp_path / "cut", score, save_steps=100)
    cut.train()
    found = checkpoint.newest(tmp_path / "cut").found
    assert found is not None and found.step == KILLED == cut.state.global_step
    resumed, _ = trainer_in(tmp_path / "cut")
    resumed.train(str(found.folder))
    expect_the_same(resumed, straight)


def test_evaluations_change_nothing_of_the_training(tmp_path: Path) -> None:
    """And draw with the same noise each time: the first two, before anything was learnt, say the same."""
    plain, _ = trainer_in(tmp_path / "plain")
    plain.train()
    watched, kept = trainer_in(
        tmp_path / "watched", held_out=prompts_of(9, seed=5), eval_strategy="steps", eval_steps=1
    )
    first, second = watched.evaluate(), watched.evaluate()
    assert first == second and set(first) >= {"eval_score", "eval_kl", "eval_kl_k3", "eval_entropy", "eval_stopped"}
    watched.train()
    expect_the_same(watched, plain)
    assert kept.rows[STEPS]["eval_kl_k3"] > kept.rows[0]["eval_kl_k3"] == 0.0


def test_a_checkpoint_of_another_critic_is_refused(tmp_path: Path) -> None:
    straight, _ = trainer_in(tmp_path / "straight", critic="head", max_steps=1)
    straight.train()
    other, _ = trainer_in(tmp_path / "other", max_steps=1)
    with pytest.raises(TrainingError, match="critic"):
        other.load_trained(tmp_path / "straight" / "checkpoint-1")


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    trainer, _ = trainer_in(tmp_path / "run", max_steps=1)
    with torch.no_grad():
        trainer.actors.value_head.score.bias.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(TrainingError, match="not finite"):
        trainer._save_checkpoint()
    assert checkpoint.newest(tmp_path / "run").found is None
