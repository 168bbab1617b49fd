"""Plans of the stages that are not SFT: defaults, pairs, the adapter to begin with, the reference. PPO: test_ppo.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import count
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.machine import GIB, MACHINES
from gemma_tune.plan.memory import estimate, total
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.stages import written
from gemma_tune.plan.workload import Workload
from tests.unit.plan.recipes import make_recipe, plan_for, saved_adapter
from tests.unit.plan.test_memory import QLORA

BEGUN = {"stage": "dpo", "model.adapter": "runs/sft"}
STACKED = BEGUN | {"model.adapter_mode": "stack"}


# --- defaults of a stage


@pytest.mark.parametrize(
    ("stage", "rate"), [("sft", 2e-4), ("reward", 1e-4), ("dpo", 5e-6), ("kto", 5e-6), ("ppo", 1e-5)]
)
def test_each_stage_has_its_learning_rate(stage: str, rate: float) -> None:
    chosen = plan_for({"stage": stage}).trainer["learning_rate"]
    assert chosen.value == rate
    assert chosen.reason.startswith("default" if stage == "sft" else f"{stage}: ")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo"])
def test_what_was_written_wins_even_where_it_is_the_schemas_default(stage: str) -> None:
    chosen = plan_for({"stage": stage, "optim.learning_rate": 2e-4}).trainer["learning_rate"]
    assert (chosen.value, chosen.reason) == (2e-4, "recipe")


def test_answers_are_trained_without_dropout() -> None:
    for stage in ("reward", "dpo", "kto"):
        plan = plan_for({"stage": stage})
        assert plan.values("lora")["lora_dropout"] == 0 and plan.values("trainer")["disable_dropout"] is True
    assert plan_for().values("lora")["lora_dropout"] == 0.05
    assert written(make_recipe({"stage": "dpo"}), "seed").reason == "default"


def test_a_reward_model_answers_nothing() -> None:
    samples = plan_for({"stage": "reward"}).session["samples"]
    assert (samples.value["prompts"], samples.value["held_out"]) == ([], 0)
    assert "gives none" in samples.reason
    assert plan_for({"stage": "dpo"}).values("session")["samples"]["held_out"] == 4


# --- what reaches TRL and the data


def test_nothing_of_sft_reaches_the_trainers_of_answers() -> None:
    for stage in ("reward", "dpo", "kto"):
        plan = plan_for({"stage": stage})
        assert not {"packing", "dataset_kwargs", "label_names"} & plan.trainer.keys()
        assert not {"packing", "train_on", "streaming", "shuffle_buffer"} & plan.data.keys()
        assert plan.values("trainer")["max_length"] is None
        assert plan.values("trainer")["remove_unused_columns"] is False


@pytest.mark.parametrize(
    ("changes", "margins"),
    [({"stage": "reward"}, False), ({"stage": "reward", "reward.margin": "score"}, True), ({"stage": "dpo"}, False)],
)
def test_margins_are_asked_of_the_data(changes: dict[str, Any], margins: bool) -> None:
    assert plan_for(changes).values("data")["margins"] is margins


def test_the_rewards_centre() -> None:
    plan = plan_for({"stage": "reward", "reward.center": 0.2})
    assert plan.values("trainer")["center_rewards_coefficient"] == 0.2
    assert plan.values("session")["reward"] == {"margin": "none", "center": 0.2}
    off = plan_for({"stage": "reward", "reward.center": 0}).trainer["center_rewards_coefficient"]
    assert off.value is None and "reward.center: 0" in off.reason


def test_the_loss_of_dpo() -> None:
    values = plan_for({"stage": "dpo", "dpo.loss": "ipo", "dpo.beta": 0.3, "dpo.sft_weight": 0.5}).values("trainer")
    assert (values["loss_type"], values["loss_weights"], values["beta"]) == (["ipo", "sft"], [1.0, 0.5], 0.3)
    plan = plan_for({"stage": "dpo", "dpo.label_smoothing": 0.1})
    assert plan.values("trainer")["loss_type"] == ["robust"]
    assert "makes sigmoid cDPO" in plan.trainer["loss_type"].reason
    assert "dpo.label_smoothing: 0.1" in plan.trainer["label_smoothing"].reason
    robust = plan_for({"stage": "dpo", "dpo.loss": "robust", "dpo.label_smoothing": 0.1}).trainer
    assert (robust["label_smoothing"].value, robust["label_smoothing"].reason) == (0.1, "recipe")


@pytest.mark.parametrize(
    ("changes", "precomputed"),
    [
        ({}, False),
        ({"optim.epochs": 2.0}, True),
        ({"optim.epochs": 1.5}, True),
        ({"optim.epochs": 2.0, "optim.max_steps": 10}, False),
        ({"dpo.precompute_reference": True}, True),
        ({"optim.epochs": 2.0, "dpo.precompute_reference": False}, False),
    ],
)
def test_when_the_reference_scores_all_pairs_first(changes: dict[str, Any], precomputed: bool) -> None:
    plan = plan_for({"stage": "dpo"} | changes)
    assert plan.values("session")["precompute_reference"] is precomputed
    assert plan.values("trainer")["precompute_ref_log_probs"] is False, "the reference is ours"


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_the_global_batch_counts_pairs(stage: str) -> None:
    plan = plan_for({"stage": stage, "batch.micro": 4})
    assert plan.values("trainer")["per_device_train_batch_size"] == 4
    assert plan.trainer["gradient_accumulation_steps"].value == 4
    assert plan.trainer["gradient_accumulation_steps"].reason.endswith("a pass holds 4 pairs x 2 sequences")
    single = plan_for({"stage": stage, "batch.micro": 1}).trainer["gradient_accumulation_steps"]
    assert single.reason.endswith("1 pair x 2 sequences")


# --- the adapter to begin with


def test_a_continued_adapter_keeps_what_it_is() -> None:
    plan = plan_for(BEGUN, start=saved_adapter("a pattern", dora=True))
    assert plan.values("lora") == {
        "r": 4,
        "lora_alpha": 12,
        "lora_dropout": 0.1,
        "target_modules": "a pattern",
        "use_rslora": False,
        "use_dora": True,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    assert "runs/sft" in plan.lora["r"].reason
    assert "switched off in dpo" in plan.lora["lora_dropout"].reason
    assert plan.values("session")["adapter"] == {"start": "runs/sft", "mode": "continue"}


def test_a_stacked_adapter_is_the_recipes() -> None:
    plan = plan_for(STACKED | {"adapter.r": 8})
    assert (plan.values("lora")["r"], plan.values("lora")["lora_alpha"]) == (8, 32)
    assert plan.values("session")["adapter"] == {"start": "runs/sft", "mode": "stack"}


def test_without_one_a_new_one_is_trained() -> None:
    for stage in ("sft", "reward", "dpo", "ppo"):
        assert plan_for({"stage": stage}).values("session")["adapter"] == {"start": None, "mode": None}


def test_the_facts_of_the_adapter_belong_to_the_recipe() -> None:
    recipe = make_recipe(BEGUN)
    shape = PUBLISHED[recipe.model.name]
    for wanted, start in ((recipe, None), (make_recipe(), saved_adapter())):
        with pytest.raises(ValueError, match="start"):
            make_plan(wanted, MACHINES["l4"], shape, FAMILIES[shape.family], start=start)


def test_a_continued_dora_on_int8_is_refused_on_a_cpu() -> None:
    changes = BEGUN | {"model.quantization": "int8"}
    with pytest.raises(AccessError) as caught:
        plan_for(changes, "cpu", start=saved_adapter(dora=True))
    assert [problem.where for problem in caught.value.problems] == ["model.adapter"]
    assert plan_for(changes, "cpu", start=saved_adapter()).refusal == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "dpo"}, "The reference is the base with the new adapter switched off"),
        (BEGUN, "The reference is the adapter in runs/sft as it is now"),
        (BEGUN | {"stage": "kto"}, "The reference is the adapter in runs/sft as it is now"),
        ({"stage": "reward", "data.holdout": 0}, "there will be no held-out figures"),
        ({"stage": "reward", "advanced.trainer": {"neftune_noise_alpha": 5}}, "go to RewardConfig as they are"),
    ],
)
def test_notes(changes: dict[str, Any], words: str) -> None:
    assert any(words in note for note in plan_for(changes).notes)


def test_idle_gpus_are_put_to_the_same_command() -> None:
    notes = plan_for({"stage": "dpo", "batch.size": 64}, "8xh100", world_size=1).notes
    assert any("-m gemma_tune dpo RECIPE" in note for note in notes)


@pytest.mark.parametrize(
    ("stage", "keyword"),
    [
        ("reward", "disable_dropout"),
        ("dpo", "sync_ref_model"),
        ("dpo", "ld_alpha"),
        ("dpo", "use_weighting"),
        ("dpo", "pad_to_multiple_of"),
        ("kto", "ref_model_sync_steps"),
    ],
)
def test_what_is_fixed_in_a_stage(stage: str, keyword: str) -> None:
    with pytest.raises(UserError, match=f"'{keyword}' is fixed: "):
        plan_for({"stage": stage, "advanced.trainer": {keyword: 1}})


@pytest.mark.parametrize("stage", ["reward", "dpo", "kto"])
def test_no_keyword_of_the_plan_can_be_overridden_unless_it_is_free(stage: str) -> None:
    free = {"dataloader_num_workers", "dataloader_pin_memory", "ddp_find_unused_parameters", "logging_first_step"}
    for keyword in set(plan_for({"stage": stage}).trainer) - free:
        with pytest.raises(UserError, match=keyword):
            plan_for({"stage": stage, "advanced.trainer": {keyword: None}})


# --- memory

PAIRS = replace(QLORA, stage="dpo", rows=2, length=1024)


def terms(work: Workload, name: str = "google/gemma-3-1b-it") -> dict[str, int]:
    return {term.name: term.bytes for term in estimate(PUBLISHED[name], work)}


def test_a_pair_is_two_sequences() -> None:
    """Two pairs need what four rows need: the reference has no term without an adapter of its own."""
    assert terms(PAIRS) == terms(replace(QLORA, rows=4, length=1024))


def test_the_frozen_adapter_has_weights_and_nothing_else() -> None:
    frozen = replace(PAIRS, frozen_rank=4, frozen_targets="attention")
    more = {name: size - terms(PAIRS).get(name, 0) for name, size in terms(frozen).items()}
    per_rank = count(PUBLISHED["google/gemma-3-1b-it"]).lora_per_rank["attention"]
    assert {name: size for name, size in more.items() if size} == {"frozen adapter": 4 * 4 * per_rank}


def test_a_reward_model_scores_no_vocabulary() -> None:
    found = terms(replace(PAIRS, stage="reward"))
    hidden = PUBLISHED["google/gemma-3-1b-it"].hidden
    assert "loss head" not in found
    assert found["reward head"] == 4 * 1024 * hidden * 2 * 2 + (hidden + 1) * 16
    rest = {name: size for name, size in found.items() if name != "reward head"}
    assert rest == {name: size for name, size in terms(PAIRS).items() if name != "loss head"}


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({"stage": "dpo"}, 0),
        (BEGUN, 4),  # a copy of what is trained is the reference
        (STACKED, 4),
        (BEGUN | {"stage": "sft"}, 0),  # trained on, and nothing compares with it
        (STACKED | {"stage": "sft"}, 4),
        (BEGUN | {"stage": "reward"}, 0),
        (BEGUN | {"stage": "kto"}, 4),
        (BEGUN | {"stage": "ppo"}, 4),
        ({"stage": "ppo"}, 0),
    ],
)
def test_which_plans_hold_a_frozen_adapter(changes: dict[str, Any], frozen: int) -> None:
    found = {term.name: term for term in plan_for(changes).memory}
    per_rank = count(PUBLISHED["google/gemma-3-1b-it"]).lora_per_rank["attention"]
    assert (found["frozen adapter"].bytes if "frozen adapter" in found else 0) == frozen * per_rank * 4
    if frozen:
        why = "the reference" if changes["stage"] in ("dpo", "kto", "ppo") else "the new adapter stands on"
        assert why in found["frozen adapter"].formula


def test_dropout_of_a_saved_adapter_costs_memory_only_where_it_is_on() -> None:
    activations = {}
    for stage in ("sft", "dpo"):
        for dropout in (0.0, 0.1):
            changes = {"stage": stage, "model.adapter": "x", "batch.micro": 1, "memory.gradient_checkpointing": False}
            plan = plan_for(changes, start=saved_adapter(dropout=dropout))
            activations[stage, dropout] = {term.name: term.bytes for term in plan.memory}["activations"]
    assert activations["sft", 0.1] > activations["sft", 0.0]
    assert activations["dpo", 0.1] == activations["dpo", 0.0]


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_micro_batch_of_pairs_holds_half_the_rows(stage: str) -> None:
    """Both are bounded by the tokens of a pass, 16,384 on a GPU."""
    changes = {"model.name": "google/gemma-3-270m", "batch.size": 64}
    pairs = plan_for({"stage": stage} | changes, "h100")
    assert pairs.values("trainer")["per_device_train_batch_size"] == 8
    assert plan_for(changes, "h100").values("trainer")["per_device_train_batch_size"] == 16


def test_advice_for_a_continued_adapter_changes_no_key_of_a_new_one() -> None:
    changes: dict[str, Any] = {"stage": "dpo", "model.name": "google/gemma-3-12b-it", "data.max_length": 2048}
    machine = replace(MACHINES["rtx4090"], memory_bytes=14 * GIB)
    assert "adapter.r: 8" in plan_for(changes | {"adapter.r": 256}, machine).refusal
    plan = plan_for(changes | {"model.adapter": "runs/sft"}, machine, start=saved_adapter(rank=128))
    assert "Settings that would fit" in plan.refusal and "adapter." not in plan.refusal


def test_a_dpo_of_the_7b_fits_a_24_gb_gpu() -> None:
    plan = plan_for({"stage": "dpo", "model.name": "google/gemma-7b-it"}, "rtx4090")
    assert plan.refusal == "" and total(plan.memory) < 24 * GIB
    assert math.isclose(plan.values("trainer")["learning_rate"], 5e-6)


# --- KTO


def test_the_loss_of_kto() -> None:
    values = plan_for({"stage": "kto", "kto.beta": 0.05, "kto.undesirable_weight": 0.8}).values("trainer")
    assert (values["loss_type"], values["beta"]) == ("kto", 0.05)
    assert (values["desirable_weight"], values["undesirable_weight"]) == (1.0, 0.8)
    assert values["train_sampling_strategy"] == "sequential" and values["precompute_ref_log_probs"] is False
    in_order = plan_for({"stage": "kto", "data.shuffle": False}).values("trainer")
    assert in_order["train_sampling_strategy"] == "sequential", "trl refuses all others"


def test_a_pass_of_kto_has_two_answers_at_least() -> None:
    small = replace(MACHINES["rtx4090"], memory_bytes=2 * GIB)
    plan = plan_for({"stage": "kto", "data.max_length": 4096}, small)
    assert plan.values("trainer")["per_device_train_batch_size"] == 2 and plan.refusal
    assert "batch.micro" not in plan.refusal
    assert "batch.micro: 2 (" in plan_for({"stage": "kto", "batch.micro": 16, "data.max_length": 8192}, "t4").refusal
    with pytest.raises(UserError, match=r"batch\.size 5 cannot be split: 1 process x micro 2") as caught:
        plan_for({"stage": "kto", "batch.size": 5})
    assert str(caught.value).endswith("fix: set batch.size: 6")


def test_an_answer_is_one_sequence_and_kl_rows_keep_nothing() -> None:
    work = replace(QLORA, stage="kto", rows=4, length=1024)
    assert terms(work) == terms(replace(QLORA, rows=4, length=1024))
    assert (work.unit, work.sequences) == ("answer", 4)
    reason = plan_for({"stage": "kto", "batch.size": 2}, "h100").trainer["per_device_train_batch_size"].reason
    assert "that divides 2 answers a process" in reason


def test_answers_have_no_margin() -> None:
    assert "margins" not in plan_for({"stage": "kto"}).data
    assert plan_for({"stage": "kto"}).data["batch"].reason.startswith("batch.size: answers of like length")
