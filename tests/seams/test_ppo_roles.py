"""Policy, reference, reward models and critic on one base: none of them disturbs another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.models.actors import CRITIC, Actors, cast_roles
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach, begin_with, save_adapter
from gemma_tune.models.reward import RewardModel, load_reward, save_head
from gemma_tune.models.roles import REFERENCE, TRAINED, speak_as, speaking
from gemma_tune.train.ppo.losses import policy_terms, value_terms
from gemma_tune.train.ppo.passes import spread
from gemma_tune.train.ppo.rewards import k1, k3
from gemma_tune.train.ppo.scores import Scorer
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Rollout
from tests.ppo_batches import (
    deviation,
    experience_of,
    gradients,
    heads,
    some_rollout,
    some_scores,
    stir,
    tensors,
    trained,
    whole,
)
from tests.ppo_rig import small_actors, small_trainer
from tests.seams.test_trl_seams import family_of_tiny

Tiny = Callable[..., Path]
NAME = "gemma3_text"
FAMILY = family_of_tiny(NAME)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
SCALES = {"kind": (1.5, 2.0), "brief": (-3.0, 0.25)}
"""Mean and standard deviation of each reward model's rewards."""


def lora(r: int = 4) -> dict[str, Any]:
    targets = FAMILY.lora_targets["all-linear"]
    return {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", "target_modules": targets}


def base(tiny: Tiny, quantization: dict[str, Any] | None = None, dtype: str = "float32") -> Any:
    model = {"name": str(tiny(NAME)), "dtype": dtype, "attn_implementation": FAMILY.attention[0]}
    return load_base(model, quantization or {}, FAMILY)


def moved(model: Any, seed: int) -> Any:
    """With every B away from zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An SFT adapter and two reward models of different ranks."""
    folder = tmp_path_factory.mktemp("runs")
    save_adapter(moved(attach(base(tiny), lora(), FAMILY), 1), folder / "sft", FAMILY)
    for number, (name, (mean, std)) in enumerate(SCALES.items()):
        torch.manual_seed(number)
        model = RewardModel(moved(attach(base(tiny), lora(2 + 3 * number), FAMILY), 10 + number))
        torch.nn.init.constant_(model.head.score.bias, mean)
        stats = {
            "family": FAMILY.name,
            "template_sha256": FAMILY.template_sha256,
            "token": FAMILY.turn_end,
            "token_id": FAMILY.turn_end_id,
            "mean": mean,
            "std": std,
        }
        save_adapter(model.trunk, folder / name, FAMILY)
        save_head(model, folder / name, stats)
    return {name: folder / name for name in ("sft", *SCALES)}


def full_cast(
    tiny: Tiny,
    runs: dict[str, Path],
    critic: Any = "adapter",
    mode: Any = "continue",
    begin: Any = "kind",
    **changes: Any,
) -> Actors:
    """All roles: a policy that begins with the SFT adapter, its reference, two reward models, and a critic that begins
    with one of them."""
    quantization = changes.pop("quantization", None)
    policy = begin_with(base(tiny, quantization), runs["sft"], lora(2), FAMILY, mode=mode, keep_frozen=True)
    rewards = [str(runs[name]) for name in SCALES]
    begin = str(runs[begin]) if begin else None
    return cast_roles(policy, FAMILY, lora(), rewards=rewards, critic=critic, begin=begin, mode=mode, **changes)


def rows_of(lengths: tuple[int, ...] = (5, 11, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, L] ids, 0/1 mask), padded on the right; each ends with the turn end."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), max(lengths)), FAMILY.pad_id)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(240, 900, (length,), generator=draw)
        ids[row, length - 1] = FAMILY.turn_end_id
        mask[row, :length] = 1
    return ids, mask


def last_places(mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(mask.sum(-1) - 1, mask.shape[1]).bool()


# --- the first step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_policy_is_its_reference_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    trainer = small_trainer(tmp_path, lambda _: [], actors=small_actors(dtype=dtype), temperature=0.7)
    seen = trainer.observe(some_rollout(), whole(16, 5))
    assert torch.equal(seen.log_probs, seen.reference) and (seen.log_probs[seen.mask] < 0).all()
    assert not k1(seen.log_probs, seen.reference).any() and not k3(seen.log_probs, seen.reference).any()
    assert not trainer.estimate(seen, torch.zeros(16)).rewards.any()


@pytest.mark.parametrize("mode", ["continue", "stack"])
@pytest.mark.parametrize("quantization", [{}, NF4], ids=["fp32", "nf4"])
def test_a_policy_that_begins_with_an_adapter_is_its_reference_to_the_bit(
    tiny: Tiny, runs: dict[str, Path], tmp_path: Path, mode: str, quantization: dict[str, Any]
) -> None:
    actors = full_cast(tiny, runs, mode=mode, quantization=quantization)
    assert actors.reference == [REFERENCE] != actors.policy
    trainer = small_trainer(tmp_path, lambda _: [], actors=actors)
    seen = trainer.observe(some_rollout(), whole(16, 5))
    assert torch.equal(seen.log_probs, seen.reference)
    stir(actors, 3, only=TRAINED)
    seen = trainer.observe(some_rollout(), whole(16, 5))
    assert not torch.equal(seen.log_probs, seen.reference)


# --- what learns


@pytest.mark.parametrize("mode", ["continue", "stack"])
@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_only_policy_and_critic_learn(
    tiny: Tiny, runs: dict[str, Path], tmp_path: Path, critic: str, mode: str
) -> None:
    actors = full_cast(tiny, runs, critic, mode)
    trainer = small_trainer(tmp_path, lambda _: [], actors=actors, critic=critic, entropy=0.01, learning_rate=1e-2)
    before = tensors(actors)
    rollout = some_rollout()
    seen: set[str] = set()
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.update(with_gradient(actors)))
    for _ in range(2):  # A of a fresh adapter learns from the second step on
        trainer.learn(rollout, experience_of(trainer, rollout), whole(16, 4))
    after = tensors(actors)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    expected = {name for name in after if f".{TRAINED}." in name} | {"value_head.score.weight", "value_head.score.bias"}
    if critic == "adapter":
        expected |= {name for name in after if f".{CRITIC}." in name}
    assert changed == expected == seen
    roles = {REFERENCE, "reward_0", "reward_1"}
    assert all(any(f".{role}." in name for name in after) for role in roles), "they are there, and did not move"


def with_gradient(actors: Actors) -> set[str]:
    named = dict(actors.model.named_parameters())
    for name, head in heads(actors).items():
        named |= {f"{name}.{key}": value for key, value in head.named_parameters()}
    return {name for name, parameter in named.items() if parameter.grad is not None}


def lively(tmp_path: Path, critic: str, **changes: Any) -> PpoTrainer:
    actors = stir(small_actors(critic=critic), 1)
    return small_trainer(tmp_path, lambda _: [], actors=actors, size=16, micro=16, critic=critic, **changes)


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_each_loss_reaches_its_own_parameters_alone(tmp_path: Path, critic: str) -> None:
    trainer, rollout = lively(tmp_path, critic), some_rollout()
    experience = experience_of(trainer, rollout)
    one = trainer._collate(rollout, range(16))
    critics = {f"value_head.{key}" for key in ("score.weight", "score.bias")}
    critics |= {name for name in trained(trainer.actors) if f".{CRITIC}." in name}
    policies = trained(trainer.actors).keys() - critics
    assert all(f".{TRAINED}." in name for name in policies) and (len(critics) > 2) == (critic == "adapter")

    log_probs, entropy, hidden = trainer._score(trainer.actors.policy, one, with_entropy=True)
    own = spread(log_probs, experience.mask)
    terms = policy_terms(own, experience.log_probs, experience.advantages, experience.mask, clip=0.2)
    (terms.loss - entropy.sum()).backward()
    assert with_gradient(trainer.actors) == policies
    before = {name: trained(trainer.actors)[name].grad.clone() for name in policies}  # type: ignore[union-attr]

    values = spread(trainer._values(one, hidden), experience.mask)
    value_terms(values, experience.values, experience.returns, experience.mask, clip=0.2).loss.backward()
    after = {name: trained(trainer.actors)[name].grad for name in policies}
    assert all(torch.equal(before[name], after[name]) for name in policies)  # type: ignore[arg-type]
    assert with_gradient(trainer.actors) == policies | critics


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_what_the_critic_has_to_learn_does_not_show_in_the_policys_gradient(tmp_path: Path, critic: str) -> None:
    trainer, rollout = lively(tmp_path, critic), some_rollout()
    experience = experience_of(trainer, rollout)
    other = experience.to(returns=experience.returns + 7 * experience.mask)
    first, second = (gradients(trainer, rollout, one, whole(16, 8))[0] for one in (experience, other))
    equal = {name for name in first if torch.equal(first[name], second[name])}
    assert equal == {name for name in first if f".{TRAINED}." in name}
    assert all(gradient.any() for gradient in first.values())


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_what_the_policy_has_to_learn_does_not_show_in_the_critics_gradient(tmp_path: Path, critic: str) -> None:
    trainer, rollout = lively(tmp_path, critic), some_rollout()
    experience = experience_of(trainer, rollout)
    other = experience.to(advantages=-experience.advantages)
    first, second = (gradients(trainer, rollout, one, whole(16, 8))[0] for one in (experience, other))
    different = {name for name in first if not torch.equal(first[name], second[name])}
    assert different == {name for name in first if f".{TRAINED}." in name}


# --- the traps of switching


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", [[], [CRITIC], [TRAINED, CRITIC]], ids=str)
def test_a_backward_pass_under_another_role_is_an_error(tmp_path: Path, checkpointing: bool, role: list[str]) -> None:
    trainer = lively(tmp_path, "adapter", activation_checkpointing=checkpointing)
    one = trainer._collate(some_rollout(), range(16))
    log_probs, _, _ = trainer._score([TRAINED], one)
    speak_as(trainer.model, role)
    with pytest.raises(RuntimeError, match="gradients would be wrong"):
        log_probs.sum().backward()
    assert not with_gradient(trainer.actors)

    values = trainer._values(one, None)
    assert speaking(trainer.model) == [CRITIC]
    speak_as(trainer.model, [TRAINED])
    with pytest.raises(RuntimeError, match="gradients would be wrong"):
        values.sum().backward()
    assert all(name.startswith("value_head") for name in with_gradient(trainer.actors))


def test_without_the_check_the_gradients_would_be_silently_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpointing the layers are run again, by whoever speaks then. Nothing complains, shapes and names fit."""
    from gemma_tune.models import actors

    trainer = lively(tmp_path, "adapter", activation_checkpointing=True)
    one = trainer._collate(some_rollout(), range(16))
    found = []
    for role in ([TRAINED], [CRITIC]):
        with monkeypatch.context() as patch:
            patch.setattr(actors, "_refuse_other_role", lambda *_: lambda gradient: None)
            hidden = trainer.actors.hidden([TRAINED], one.input_ids, one.attention_mask, one.places)
        speak_as(trainer.model, role)
        hidden.sum().backward()
        own = trained(trainer.actors).items()
        found.append({name: value.grad.clone() for name, value in own if value.grad is not None})
        trainer.optimizer.zero_grad()
    right, wrong = found
    assert deviation(wrong, right) > 1


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_checkpointing_changes_no_gradient(tmp_path: Path, critic: str) -> None:
    found = []
    for checkpointing in (False, True):
        trainer = lively(tmp_path, critic, activation_checkpointing=checkpointing, entropy=0.01)
        assert trainer.model.training == checkpointing
        rollout = some_rollout()
        experience = experience_of(trainer, rollout)
        found.append((gradients(trainer, rollout, experience, whole(16, 5)), experience))
    (plain, metrics), seen = found[0]
    (again, metrics_again), seen_again = found[1]
    assert all(torch.equal(again[name], plain[name]) for name in plain) and again.keys() == plain.keys()
    assert metrics_again == metrics and torch.equal(seen.values, seen_again.values)


# --- reward models and the critic that begins with one


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["fp32", "nf4"])
def test_reward_models_on_the_shared_base_rate_as_they_do_alone(
    tiny: Tiny, runs: dict[str, Path], quantization: dict[str, Any]
) -> None:
    actors = full_cast(tiny, runs, quantization=quantization)
    ids, mask = rows_of()
    found: dict[str, torch.Tensor] = {}
    for name in SCALES:
        trunk_only = {"quantization": quantization} if quantization else {}
        model = alone(tiny, runs[name], **trunk_only)
        with torch.no_grad():
            found[name] = actors.rate(str(runs[name]), ids, mask)
            expected = model.rewards(ids, mask)
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)
    assert (found["kind"] - found["brief"]).abs().min() > 0.1 and found["kind"].std() > 1e-2


def alone(tiny: Tiny, folder: Path, quantization: dict[str, Any] | None = None) -> RewardModel:
    """The reward model of a folder, on a base of its own."""
    from gemma_tune.models.lora import open_adapter
    from gemma_tune.models.reward import open_head

    if quantization is None:
        return load_reward(folder, dtype="float32")[0]
    trunk = open_adapter(base(tiny, quantization), folder)
    return RewardModel(trunk, open_head(folder, trunk.config.get_text_config().hidden_size)).eval()


@pytest.mark.parametrize("begin", SCALES)
@pytest.mark.parametrize("normalize", [True, False])
def test_the_critic_begins_with_what_a_reward_model_says(
    tiny: Tiny, runs: dict[str, Path], normalize: bool, begin: str
) -> None:
    actors = full_cast(tiny, runs, normalize=normalize, begin=begin)
    ids, mask = rows_of()
    mean, std = SCALES[begin] if normalize else (0.0, 1.0)
    with torch.no_grad():
        values = actors.values(ids, mask, last_places(mask))
        rewards = actors.rate(str(runs[begin]), ids, mask)
    torch.testing.assert_close(values, (rewards - mean) / std, atol=1e-5, rtol=1e-5)
    assert values.std() > 1e-2


def test_otherwise_it_begins_with_zero(tiny: Tiny, runs: dict[str, Path], tmp_path: Path) -> None:
    casts = (
        small_actors(critic="adapter"),
        small_actors(critic="head"),
        full_cast(tiny, runs, begin=None),
        full_cast(tiny, runs, "head"),
    )
    for actors in casts:
        trainer = small_trainer(tmp_path, lambda _: [], actors=actors, critic=actors.critic)
        assert not trainer.observe(some_rollout(), whole(16)).values.any()


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_no_role_hears_of_another(tiny: Tiny, runs: dict[str, Path], tmp_path: Path, critic: str) -> None:
    """Each is moved in turn; the others say what they said, to the bit."""
    actors = full_cast(tiny, runs, critic)
    ids, mask = rows_of()
    adapters = {"policy": TRAINED, "reference": REFERENCE, "kind": "reward_0", "brief": "reward_1"}
    adapters |= {"critic": CRITIC} if critic == "adapter" else {}

    @torch.no_grad()
    def said() -> dict[str, torch.Tensor]:
        places = mask.bool()
        found = {
            "policy": actors.hidden(actors.policy, ids, mask, places),
            "reference": actors.hidden(actors.reference, ids, mask, places),
            **{name: actors.rate(str(runs[name]), ids, mask) for name in SCALES},
        }
        return found | ({"critic": actors.values(ids, mask, places)} if critic == "adapter" else {})

    before = said()
    for number, (role, adapter) in enumerate(adapters.items()):
        stir(actors, number, only=f".{adapter}.")
        after = said()
        assert {name for name in after if not torch.equal(after[name], before[name])} == {role}
        before = after


def test_scores_are_scaled_and_weighted_and_read_at_the_turn_end(tiny: Tiny, runs: dict[str, Path]) -> None:
    """Of a response that stopped, and of one that did not: as if it had."""
    from gemma_tune.models.tokenizer import load_tokenizer

    actors = full_cast(tiny, runs)
    end = FAMILY.turn_end_id
    prompts, bodies = [[2, 300, 301], [2, 310], [2, 320, 321, 322, 323]], [[400, 401, 402, 403], [410], [420, 421]]
    rollout = Rollout(prompts, [[*bodies[0], end], [*bodies[1], end], bodies[2]], torch.tensor([True, True, False]))
    weights = {"kind": 1.0, "brief": -0.5}
    sources = [{"source": str(runs[name]), "weight": weight, "kind": "model"} for name, weight in weights.items()]
    tokenizer = load_tokenizer(str(tiny(NAME)), None, FAMILY)
    expected = {}
    for name, (mean, std) in SCALES.items():
        model = load_reward(runs[name], dtype="float32")[0]
        with torch.no_grad():
            rows = [torch.tensor([[*prompt, *body, end]]) for prompt, body in zip(prompts, bodies, strict=True)]
            raw = torch.cat([model.rewards(row, torch.ones_like(row)) for row in rows])
        expected[name] = {True: (raw - mean) / std, False: raw}
    for normalize in (True, False):
        for micro in (1, 2, 3):
            scorer = Scorer(actors, sources, FAMILY, tokenizer, normalize=normalize, micro=micro)
            found = scorer(rollout)
            for name in SCALES:
                own = expected[name][normalize]
                torch.testing.assert_close(found.parts[str(runs[name])], own, atol=1e-5, rtol=1e-5)
            total = sum(weight * expected[name][normalize] for name, weight in weights.items())
            torch.testing.assert_close(found.total, total, atol=2e-5, rtol=1e-5)
    assert speaking(actors.model) == actors.policy


def test_a_reward_model_of_another_template_is_refused(tiny: Tiny, runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from gemma_tune.errors import UserError

    other = tmp_path / "other"
    shutil.copytree(runs["kind"], other)
    stats = json.loads((other / "reward_stats.json").read_text())
    for change, said in (({"template_sha256": "0"}, "template_sha256"), ({"token_id": 1}, "token_id")):
        (other / "reward_stats.json").write_text(json.dumps(stats | change))
        with pytest.raises(UserError, match=said):
            full_cast(tiny, {**runs, "kind": other})
    (other / "reward_stats.json").write_text(json.dumps(stats | {"std": 0.0}))
    with pytest.raises(UserError, match="no scale"):
        full_cast(tiny, {**runs, "kind": other})


def test_scores_that_some_roles_gave_train_the_policy(tiny: Tiny, runs: dict[str, Path], tmp_path: Path) -> None:
    """One whole step with all five roles: what speaks afterwards is the policy."""
    actors = full_cast(tiny, runs)
    trainer = small_trainer(tmp_path, lambda _: [], actors=actors, size=16, micro=4)
    rollout = some_rollout()
    experience = experience_of(trainer, rollout, some_scores(rollout))
    assert experience.values[experience.mask].abs().min() > 0 and speaking(actors.model) == actors.policy
    trainer.learn(rollout, experience, whole(16, 4))
    assert speaking(actors.model) == actors.policy
