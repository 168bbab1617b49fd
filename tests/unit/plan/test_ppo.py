"""Plans of PPO: defaults, what reaches PpoConfig, data and session, how a step is split, and what four roles need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import count
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.choices_batch import BUDGET, can_split
from gemma_tune.plan.machine import GIB, MACHINES
from gemma_tune.plan.memory import cache_bytes, estimate, phases, total
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.types import Plan
from gemma_tune.plan.workload import Roles, Workload
from tests.unit.plan.recipes import make_recipe, plan_for, saved_adapter
from tests.unit.plan.test_memory import QLORA

PPO: dict[str, Any] = {"stage": "ppo"}
OWN = PPO | {"ppo.reward": "./mine.py:score"}
BEGUN = PPO | {"model.adapter": "runs/sft"}


def trainer(changes: dict[str, Any], *arguments: Any, **keywords: Any) -> dict[str, Any]:
    return plan_for(changes, *arguments, **keywords).values("trainer")


# --- defaults


@pytest.mark.parametrize(
    ("key", "value", "source"),
    [
        ("learning_rate", 1e-5, "LLaMA-Factory"),
        ("adam_beta2", 0.95, "OpenRLHF"),
        ("adam_epsilon", 1e-5, "arXiv 2403.17031"),
    ],
)
def test_defaults_of_the_stage(key: str, value: float, source: str) -> None:
    chosen = plan_for(PPO).trainer[key]
    assert chosen.value == value and chosen.reason.startswith("ppo: ") and source in chosen.reason


def test_the_critic_learns_twice_as_fast_unless_it_is_written() -> None:
    assert trainer(PPO)["critic_learning_rate"] == 2e-5
    assert trainer(PPO | {"optim.learning_rate": 3e-6})["critic_learning_rate"] == 6e-6
    written = plan_for(PPO | {"ppo.critic_learning_rate": 1e-6}).trainer["critic_learning_rate"]
    assert (written.value, written.reason) == (1e-6, "recipe")


def test_no_dropout() -> None:
    assert plan_for(PPO).values("lora")["lora_dropout"] == 0
    assert "switched off in ppo" in plan_for(BEGUN).lora["lora_dropout"].reason


# --- what reaches the trainer, the data and the session


def test_the_section_reaches_the_trainer_under_the_trainers_names() -> None:
    plan = plan_for(PPO | {"ppo.epochs": 4, "optim.epochs": 2.0, "ppo.score_clip": None})
    values = plan.values("trainer")
    assert (values["ppo_epochs"], values["num_train_epochs"]) == (4, 2.0)
    assert values["score_clip"] is None and "epochs" not in values and "reward" not in values
    assert plan.trainer["ppo_epochs"].reason == "recipe" and plan.trainer["clip"].reason == "default"


def test_nothing_of_trl_reaches_the_trainer() -> None:
    keys = plan_for(PPO).trainer.keys()
    assert not keys & {"max_length", "remove_unused_columns", "disable_dropout", "ddp_find_unused_parameters", "beta"}


def test_without_a_critic_its_keys_say_so() -> None:
    plan = plan_for(PPO | {"ppo.estimator": "rloo", "ppo.samples_per_prompt": 2})
    for key in ("critic", "critic_learning_rate", "critic_warmup", "value_clip", "lam"):
        assert plan.trainer[key].reason == "ppo.estimator: rloo has no critic, and reads it not"
    assert plan.trainer["clip"].reason == "default"


def test_a_prompt_has_what_the_response_leaves() -> None:
    chosen = plan_for(PPO | {"data.max_length": 256, "ppo.max_new_tokens": 100}).data["max_length"]
    assert chosen.value == 156
    assert "data.max_length 256 less 100" in chosen.reason
    assert not {"packing", "train_on", "streaming", "shuffle_buffer", "batch", "margins"} & plan_for(PPO).data.keys()


def test_the_rewards_of_the_session() -> None:
    mix = [{"source": "runs/a", "weight": 0.5}, {"source": "./f.py:g"}]
    assert plan_for(PPO | {"ppo.reward": mix}).values("session")["rewards"] == [
        {"source": "runs/a", "weight": 0.5, "kind": "model"},
        {"source": "./f.py:g", "weight": 1.0, "kind": "function"},
    ]


def test_what_the_critic_begins_with() -> None:
    mix = [{"source": "runs/b", "weight": 0.0}, {"source": "./f.py:g"}, {"source": "runs/a"}]
    ranks = [saved_adapter(rank=rank, targets="mlp") for rank in (64, 2)]
    watched = plan_for(PPO | {"ppo.reward": mix}, rewards=ranks)
    assert watched.values("session")["critic"] == {"start": "runs/a", "lora": None}
    held = {term.name: term.formula for term in watched.memory}
    assert held["critic"].startswith("(r 2 x ") and "adapters of r 64, 2" in held["reward models"]
    for changes in ({"ppo.critic": "head"}, {"ppo.estimator": "reinforce_pp"}):
        assert plan_for(PPO | changes).session["critic"].value is None
    # The policy goes on as it was saved (rank 4); the critic is new.
    plan = plan_for(OWN | {"model.adapter": "runs/sft", "adapter.r": 32, "adapter.targets": "mlp"})
    critic = plan.values("session")["critic"]
    assert critic["start"] is None and plan.values("lora")["r"] == 4
    assert (critic["lora"]["r"], critic["lora"]["lora_dropout"]) == (32, 0.0)
    assert critic["lora"]["target_modules"] == FAMILIES["gemma3_text"].lora_targets["mlp"]


def test_the_facts_of_reward_models_belong_to_the_recipe() -> None:
    recipe = make_recipe(PPO)
    shape = PUBLISHED[recipe.model.name]
    one = saved_adapter()
    for wanted, rewards in ((recipe, ()), (recipe, (one, one)), (make_recipe(), (one,)), (make_recipe(OWN), (one,))):
        with pytest.raises(ValueError, match="rewards"):
            make_plan(wanted, MACHINES["l4"], shape, FAMILIES[shape.family], rewards=rewards)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (PPO, "The reference is the base with the new adapter switched off"),
        (BEGUN, "The reference is the adapter in runs/sft as it is now"),
        (PPO, "The critic begins as a copy of the reward model in runs/reward."),
        (OWN, "The critic begins as a new adapter and a head that says 0."),
        (PPO | {"ppo.critic": "head"}, "The critic begins as a head on the policy that says 0."),
        (PPO | {"ppo.top_p": 0.9}, "Responses are drawn from the likeliest tokens only"),
        (PPO | {"ppo.top_k": 50}, "Responses are drawn from the likeliest tokens only"),
        (PPO | {"advanced.trainer": {"tf32": True}}, "Unchecked: tf32 go to PpoConfig as they are."),
    ],
)
def test_notes(changes: dict[str, Any], words: str) -> None:
    assert any(words in note for note in plan_for(changes).notes)


def test_what_is_silent() -> None:
    notes = " ".join(plan_for(PPO | {"ppo.estimator": "reinforce_pp"}).notes)
    assert "critic" not in notes and "likeliest" not in notes


def test_no_keyword_of_the_plan_can_be_overridden_unless_it_is_free() -> None:
    for keyword in set(plan_for(PPO).trainer) - {"logging_first_step"}:
        with pytest.raises(UserError, match=keyword):
            plan_for(PPO | {"advanced.trainer": {keyword: None}})


@pytest.mark.parametrize("keyword", ["torch_compile_mode", "torch_empty_cache_steps"])
def test_what_the_own_loop_would_not_hear_is_refused(keyword: str) -> None:
    with pytest.raises(UserError, match=f"'{keyword}' is fixed: "):
        plan_for(PPO | {"advanced.trainer": {keyword: 1}})


# --- how a step is split


def test_passes_divide_a_minibatch() -> None:
    small = PPO | {"model.name": "google/gemma-3-270m", "data.max_length": 256, "batch.size": 48}
    one = plan_for(small, "h100").trainer
    assert (one["per_device_train_batch_size"].value, one["gradient_accumulation_steps"].value) == (16, 3)
    four = plan_for(small | {"ppo.minibatches": 4}, "h100").trainer
    assert (four["per_device_train_batch_size"].value, four["gradient_accumulation_steps"].value) == (4, 12)
    assert "divides 12 responses of a minibatch and process" in four["per_device_train_batch_size"].reason
    two = plan_for(small | {"ppo.minibatches": 4}, "8xh100", world_size=2).trainer
    assert (two["per_device_train_batch_size"].value, two["gradient_accumulation_steps"].value) == (2, 12)


def test_minibatches_that_processes_cannot_share() -> None:
    changes = PPO | {"batch.size": 32, "ppo.minibatches": 8, "batch.micro": 2}
    assert trainer(changes, "8xh100", world_size=2)["gradient_accumulation_steps"] == 8
    with pytest.raises(UserError) as caught:
        plan_for(changes, "8xh100", world_size=4)
    assert str(caught.value) == (
        "batch.size 32 cannot be split: 4 processes x micro 2 x 8 minibatches = 64 does not divide 32. Nearest: 64.\n"
        "  fix: set batch.size: 64, or a smaller batch.micro"
    )


def test_the_responses_to_a_prompt_stay_in_one_process() -> None:
    changes = PPO | {"batch.size": 24, "ppo.samples_per_prompt": 6}
    assert trainer(changes, "8xh100", world_size=4)["gradient_accumulation_steps"]
    with pytest.raises(UserError, match=r"8 processes x 6 responses to a prompt = 48 does not divide 24\. Nearest: 48"):
        plan_for(changes, "8xh100", world_size=8)
    recipe = make_recipe(changes)
    assert [processes for processes in range(1, 9) if can_split(recipe, processes)] == [1, 2, 4]
    assert any(
        "batch.size 24 cannot be split over all of them" in note for note in plan_for(changes, "8xh100", 1).notes
    )


# --- memory

SHAPE = PUBLISHED["google/gemma-3-1b-it"]
WORK = replace(
    QLORA,
    stage="ppo",
    rows=4,
    length=256,
    roles=Roles(
        critic="adapter",
        critic_rank=8,
        critic_targets="mlp",
        rewards=((8, "mlp"), (4, "attention")),
        together=16,
        prompt=192,
    ),
)


def terms(work: Workload, name: str = "google/gemma-3-1b-it") -> dict[str, int]:
    return {term.name: term.bytes for term in estimate(PUBLISHED[name], work)}


def with_roles(**changes: Any) -> Workload:
    assert WORK.roles is not None
    return replace(WORK, roles=replace(WORK.roles, **changes))


def test_critic_and_reward_models_by_hand() -> None:
    found = terms(WORK)
    per_rank, head = count(SHAPE).lora_per_rank, SHAPE.hidden + 1
    critic = 8 * per_rank["mlp"] + head
    assert found["critic"] == found["gradients of the critic"] == 4 * critic
    assert found["optimizer state of the critic"] == 8 * critic
    assert found["reward models"] == 4 * (8 * per_rank["mlp"] + head + 4 * per_rank["attention"] + head)
    # What the policy has is as it was.
    alone = terms(replace(WORK, stage="sft", roles=None))
    for name in ("linear layers", "adapter", "gradients of the adapter", "optimizer state", "layer inputs"):
        assert found[name] == alone[name]


def test_a_critic_that_is_a_head_costs_next_to_nothing() -> None:
    found = terms(with_roles(critic="head", critic_rank=0))
    assert found["critic"] == 4 * (SHAPE.hidden + 1)
    assert not any("critic" in name for name in terms(with_roles(critic=None)))
    assert "reward models" not in terms(with_roles(rewards=()))


def test_the_optimizer_of_the_critic_is_the_policys() -> None:
    plain, small = terms(WORK), terms(replace(WORK, optimizer="adamw_8bit"))
    assert small["optimizer state of the critic"] < plain["optimizer state of the critic"] / 3
    factored = terms(replace(WORK, optimizer="adafactor"))
    assert factored["optimizer state of the critic"] < small["optimizer state of the critic"]


def test_processes_send_the_gradients_of_both() -> None:
    found = terms(replace(WORK, world_size=2))
    assert found["gradient buckets"] == found["gradients of the adapter"]
    assert found["gradient buckets of the critic"] == found["gradients of the critic"]


def test_a_cache_by_hand() -> None:
    """Gemma 1 7B: 28 global layers of 16 heads of 256. Gemma 3 1B: 22 of 26 layers see 512 tokens; 1 head of 256."""
    assert cache_bytes(PUBLISHED["google/gemma-7b"], 1000, 2) == 2 * 2 * 1000 * 28 * 16 * 256
    assert cache_bytes(SHAPE, 256, 2) == 2 * 2 * 256 * 26 * 256
    assert cache_bytes(SHAPE, 2048, 2) == 2 * 2 * (22 * 512 + 4 * 2048) * 256


def test_the_peak_is_the_larger_of_rollout_and_backward_pass() -> None:
    narrow, wide = terms(with_roles(together=1)), terms(with_roles(together=4096))
    assert "layer inputs" in narrow and "KV cache of a rollout" not in narrow
    assert "KV cache of a rollout" in wide and "layer inputs" not in wide
    assert wide["KV cache of a rollout"] == 4096 * cache_bytes(SHAPE, 256, 2)
    both = {name: total(held) for name, held in phases(SHAPE, WORK).items()}
    larger = max(both, key=lambda name: both[name])
    rest = sum(size for name, size in terms(WORK).items()) - both[larger]
    for together in (1, 16, 64):
        work = with_roles(together=together)
        assert total(estimate(SHAPE, work)) == rest + max(total(held) for held in phases(SHAPE, work).values())


def test_responses_are_drawn_together_as_far_as_they_fit() -> None:
    changes = PPO | {"model.name": "google/gemma-7b-it", "data.max_length": 256, "batch.size": 128}
    roomy, tight = plan_for(changes, "h100"), plan_for(changes, "t4")
    assert roomy.values("trainer")["per_device_eval_batch_size"] == 64
    assert tight.values("trainer")["per_device_eval_batch_size"] in (16, 32)
    assert tight.refusal == "" and total(tight.memory) <= BUDGET * MACHINES["t4"].memory_bytes
    assert "64 at most" in tight.trainer["per_device_eval_batch_size"].reason
    few = plan_for(changes | {"batch.size": 12}, "8xh100", world_size=4)
    assert few.values("trainer")["per_device_eval_batch_size"] == 3


def test_other_stages_evaluate_as_they_train() -> None:
    chosen = plan_for({"batch.micro": 4}).trainer["per_device_eval_batch_size"]
    assert (chosen.value, chosen.reason) == (4, "as in training; evaluation keeps no activations")


def test_advice_where_it_does_not_fit_keeps_room_for_a_prompt() -> None:
    changes = PPO | {
        "model.name": "google/gemma-3-12b-it",
        "data.max_length": 2048,
        "ppo.max_new_tokens": 1020,
        "adapter.r": 256,
    }
    machine = replace(MACHINES["rtx4090"], memory_bytes=16 * GIB)
    heavy = plan_for(changes, machine, rewards=[saved_adapter(rank=256, targets="all-linear")]).refusal
    assert "ppo.critic: head" in heavy
    assert "data.max_length: 1024" not in heavy and "data.max_length: 512" not in heavy


# --- four roles on one base


def pipeline(name: str, machine: str, stage: str, **more: Any) -> Plan:
    """SFT -> reward model -> PPO with adapters of rank 16 everywhere; 16 responses of 64 tokens a step."""
    saved = saved_adapter(rank=16, targets="all-linear", dropout=0.0)
    changes = {"stage": stage, "model.name": name, "data.max_length": 256, "model.adapter": "runs/sft"} | more
    if stage == "ppo":
        return plan_for(changes, machine, start=saved, rewards=[saved])
    return plan_for(changes | {"data.packing": False}, machine, start=saved)


WEIGHTS = {"linear layers", "embedding (also the head)", "norms and small layers"}


@pytest.mark.parametrize("machine", ["cpu", "t4", "rtx4090"])
@pytest.mark.parametrize("name", ["google/gemma-3-270m", "google/gemma-2b-it", "google/gemma-7b-it"])
def test_four_roles_need_little_more_than_one(name: str, machine: str) -> None:
    """At most 1.35 x the base with one adapter in training, in passes of the same size; and so also what stays between
    the passes. Four models would need more than twice as much."""
    ppo = pipeline(name, machine, "ppo")
    held = {term.name: term.bytes for term in ppo.memory}
    assert {"adapter", "frozen adapter", "critic", "reward models"} <= held.keys() and not ppo.refusal
    passes = {
        "batch.micro": ppo.values("trainer")["per_device_train_batch_size"],
        "memory.gradient_checkpointing": ppo.values("trainer")["activation_checkpointing"],
    }
    one = total(pipeline(name, machine, "sft", **passes).memory)
    assert total(ppo.memory) <= 1.35 * one
    base = sum(held[term] for term in WEIGHTS)
    policy = held["adapter"] + held["gradients of the adapter"] + held["optimizer state"]
    others = sum(size for term, size in held.items() if "critic" in term)
    others += held["reward models"] + held["frozen adapter"]
    assert base + policy + others <= 1.35 * (base + policy)
    assert 4 * base > 2 * (base + policy + others)
