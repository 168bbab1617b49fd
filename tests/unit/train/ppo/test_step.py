"""What the settings of a step do: early stop, warm-up of the critic, what becomes of a score, temperature, entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import TrainingError
from gemma_tune.models.reward import base_of
from gemma_tune.models.roles import TRAINED
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Rollout
from tests.ppo_batches import deviation, experience_of, gradients, some_rollout, stir, tensors, trained, whole
from tests.ppo_rig import small_actors, small_trainer, wanted_share


def trainer_of(folder: Path, score: Any = wanted_share, **changes: Any) -> PpoTrainer:
    critic = changes.get("critic", "adapter")
    settings = {"size": 16, "micro": 4, **changes}
    return small_trainer(folder, score, actors=stir(small_actors(critic=critic), 1), **settings)


def changed(trainer: PpoTrainer, before: dict[str, torch.Tensor]) -> set[str]:
    """Of which roles something moved."""
    after = tensors(trainer.actors)
    names = {name for name in after if not torch.equal(after[name], before[name])}
    return {"policy" if f".{TRAINED}." in name else "critic" for name in names}


# --- the early stop


def test_a_step_that_went_too_far_ends_before_its_next_minibatch(tmp_path: Path) -> None:
    """The refused minibatch leaves no trace: neither in the weights, nor in the optimizer, nor in the figures."""
    stopped, twin = trainer_of(tmp_path, stop_kl=1e-6, learning_rate=1e-3), trainer_of(tmp_path, learning_rate=1e-3)
    rollout = some_rollout()
    plan = [[[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11], [12, 13, 14, 15]]], [[list(range(16))]]]
    experience = experience_of(stopped, rollout)
    found = stopped.learn(rollout, experience, plan)
    expected = twin.learn(rollout, experience, [plan[0][:1]])
    ours, theirs = tensors(stopped.actors), tensors(twin.actors)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert all(parameter.grad is None for parameter in trained(stopped.actors).values())
    assert {int(slot["step"]) for slot in stopped.optimizer.state.values()} == {1}
    assert found["policy/stopped_by_kl"] == 1.0 and found["optimizer_steps"] == 1
    assert found["policy/approxkl_last"] > 1e-6
    told = {"policy/stopped_by_kl", "policy/approxkl_last", "val/ratio_max"}  # the refused minibatch is why
    assert {name: found[name] for name in found if name not in told} == {
        name: expected[name] for name in expected if name not in told
    }


def test_a_step_that_did_not_is_learnt_whole(tmp_path: Path) -> None:
    stopped, twin = trainer_of(tmp_path, stop_kl=10.0), trainer_of(tmp_path)
    rollout, plan = some_rollout(), [*whole(16), *whole(16, 4)]
    experience = experience_of(stopped, rollout)
    found, expected = (trainer.learn(rollout, experience, plan) for trainer in (stopped, twin))
    assert found == expected and found["policy/stopped_by_kl"] == 0.0 and found["optimizer_steps"] == 2
    assert torch.equal(
        tensors(stopped.actors)["value_head.score.weight"], tensors(twin.actors)["value_head.score.weight"]
    )


# --- warm-up


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_in_the_first_steps_only_the_critic_learns(tmp_path: Path, critic: str) -> None:
    trainer = trainer_of(tmp_path, critic=critic, critic_warmup=2, entropy=0.1)
    for step in range(4):
        before = tensors(trainer.actors)
        metrics = trainer.iterate(step)
        assert metrics is not None
        assert changed(trainer, before) == ({"critic"} if step < 2 else {"policy", "critic"})
        assert ("policy/grad_norm" in metrics) == (step >= 2) and metrics["value/grad_norm"] > 0
        if step < 2:
            assert metrics["val/ratio_max"] == pytest.approx(1.0, abs=1e-5) and metrics["policy/clipfrac_avg"] == 0.0


# --- what becomes of a score


@pytest.mark.parametrize(
    ("settings", "ended", "cut"),
    [
        ({"score_clip": 10.0, "missing_stop_penalty": 1.0}, 10.0, 9.0),
        ({"score_clip": None, "missing_stop_penalty": 1.0}, 50.0, 49.0),
        ({"score_clip": 2.0, "missing_stop_penalty": 0.0}, 2.0, 2.0),
    ],
    ids=str,
)
def test_a_score_is_clipped_and_a_response_without_an_end_pays(
    tmp_path: Path, settings: dict[str, Any], ended: float, cut: float
) -> None:
    seen: list[Rollout] = []

    def score(rollout: Rollout) -> Sequence[float]:
        seen.append(rollout)
        return [50.0] * len(rollout)

    trainer = trainer_of(tmp_path, score, size=64, micro=64, kl=0.0, max_new_tokens=12, **settings)
    metrics = trainer.iterate(0)
    assert metrics is not None
    share = float(seen[0].stopped.float().mean())
    assert 0 < share < 1 and metrics["rollout/stopped"] == share
    assert metrics["objective/scores"] == 50.0, "what is reported is what the source said"
    assert metrics["objective/rlhf_reward"] == pytest.approx(share * ended + (1 - share) * cut)


def test_the_reward_of_a_response_is_its_score_less_what_the_distance_costs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, size=64, micro=64, kl=0.3, missing_stop_penalty=0.0)
    metrics = trainer.iterate(0)
    assert metrics is not None and metrics["objective/kl"] > 0.1
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.3 * metrics["objective/kl"])
    expected = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(expected)


@pytest.mark.parametrize("whitened", [False, True])
def test_whitened_rewards_have_the_spread_of_one(tmp_path: Path, whitened: bool) -> None:
    trainer = trainer_of(tmp_path, whiten_rewards=whitened)
    experience = experience_of(trainer, some_rollout(), torch.linspace(0, 30, 16))
    spread = float(experience.rewards[experience.mask].std(correction=0))
    assert (spread == pytest.approx(1.0, rel=1e-5)) == whitened
    advantages = experience.advantages[experience.mask]
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.std(correction=0)) == pytest.approx(1.0, rel=1e-5)


def test_the_adaptive_coefficient_is_used_in_the_next_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, kl=0.1, kl_target=1e-3, kl_horizon=100)
    coefficients = []
    for step in range(3):
        metrics = trainer.iterate(step)
        assert metrics is not None and metrics["objective/kl"] > 2e-3
        coefficients.append(metrics["objective/kl_coefficient"])
    assert coefficients == pytest.approx([0.1, 0.1 * 1.032, 0.1 * 1.032**2])  # 0.2 * 16 episodes / 100


# --- the distribution that is trained


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_and_entropies_are_those_at_the_temperature(tmp_path: Path, temperature: float) -> None:
    trainer = trainer_of(tmp_path, temperature=temperature)
    rollout = some_rollout()
    seen = trainer.observe(rollout, whole(16, 4))
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        scaled = (logits / temperature).log_softmax(-1)
        own = scaled.gather(-1, torch.tensor(response)[:, None])[:, 0]
        entropy = -(scaled.exp() * scaled).sum(-1)
        torch.testing.assert_close(seen.log_probs[row][seen.mask[row]], own, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.entropy[row][seen.mask[row]], entropy, atol=1e-5, rtol=0)


def test_the_policys_gradient_is_that_of_plain_autograd(tmp_path: Path) -> None:
    """The loss of the paper and the entropy bonus over whole logits, without any of the trainer's parts. In fp64."""
    weight, temperature = 0.3, 0.8
    actors = stir(small_actors(dtype=torch.float64), 1)
    trainer = small_trainer(
        tmp_path, lambda _: [], actors=actors, size=16, micro=16, entropy=weight, temperature=temperature
    )
    rollout = some_rollout()
    experience = experience_of(trainer, rollout)
    stir(actors, 2, 0.05)
    found, metrics = gradients(trainer, rollout, experience, whole(16, 5))
    assert metrics["policy/clipfrac_avg"] > 0.05

    tokens, loss = 0, torch.zeros((), dtype=torch.float64)
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        logits = actors.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        scaled = (logits / temperature).log_softmax(-1)
        own = scaled.gather(-1, torch.tensor(response)[:, None])[:, 0]
        here = experience.mask[row]
        ratio = (own - experience.log_probs[row][here]).exp()
        advantage = experience.advantages[row][here]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        loss = loss - surrogate.sum() + weight * (scaled.exp() * scaled).sum()
        tokens += len(response)
    policy = {name: parameter for name, parameter in trained(actors).items() if f".{TRAINED}." in name}
    expected = dict(zip(policy, torch.autograd.grad(loss / tokens, list(policy.values())), strict=True))
    assert deviation({name: found[name] for name in expected}, expected) < 1e-6


def test_an_entropy_bonus_keeps_the_policy_open(tmp_path: Path) -> None:
    """Without a reward it is all there is to learn."""
    ends = []
    for weight in (0.0, 1.0):
        trainer = trainer_of(
            tmp_path, lambda rollout: [0.0] * len(rollout), size=32, micro=32, entropy=weight, kl=0.0,
            missing_stop_penalty=0.0,
        )  # fmt: skip
        found = [trainer.iterate(step) for step in range(6)]
        ends.append([one["objective/entropy"] for one in found if one is not None])
    assert ends[0][0] == ends[1][0] and ends[1][-1] > ends[0][-1] + 0.3


def test_dropout_of_the_adapter_is_off(tmp_path: Path) -> None:
    """Also with checkpointing, where the model is in training mode: the ratio would not be 1."""
    from peft import LoraConfig, get_peft_model

    from gemma_tune.models.actors import cast_roles
    from tests.ppo_rig import FAMILY, LORA, small_gemma

    model: Any = get_peft_model(small_gemma(), LoraConfig(**LORA, lora_dropout=0.5), adapter_name=TRAINED)
    actors = stir(cast_roles(model, FAMILY, {**LORA, "lora_dropout": 0.5}), 1)
    trainer = small_trainer(
        tmp_path, wanted_share, actors=actors, size=16, micro=4, minibatches=1, ppo_epochs=1,
        activation_checkpointing=True,
    )  # fmt: skip
    assert trainer.model.training and base_of(trainer.model).training
    metrics = trainer.iterate(0)
    assert metrics is not None and metrics["val/first_ratio_gap"] == 0.0 == metrics["policy/approxkl_avg"]


# --- what must not be learnt


def test_a_score_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, lambda rollout: [float("nan")] * len(rollout), kl=0.0)
    before = tensors(trainer.actors)
    with pytest.raises((TrainingError, ValueError)):
        trainer.iterate(0)
    assert changed(trainer, before) == set()


def test_a_gradient_that_is_not_finite_updates_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    rollout = some_rollout()
    experience = experience_of(trainer, rollout)
    before = tensors(trainer.actors)
    odd = experience.to(returns=experience.returns.masked_fill(experience.mask, float("inf")))
    with pytest.raises(TrainingError, match="not finite"):
        trainer.learn(rollout, odd, whole(16))
    assert changed(trainer, before) == set() and (tmp_path / "non_finite.json").is_file()
