"""Every keyword of a plan exists in the installed library, and takes the plan's value."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from importlib import import_module

import pytest
import torch

from gemma_tune.plan.choices_trainer import fixed
from gemma_tune.plan.machine import GIB, Machine, probe
from gemma_tune.plan.stages import CONFIGS
from gemma_tune.recipe.names import owned_by_recipe
from gemma_tune.recipe.schema import Dpo, Optim, Ppo
from tests.unit.plan.recipes import plan_for

BF16_CPU = Machine("this kind of CPU", "cpu", 0, 24 * GIB, bf16=True)
FULL = {"adapter": None, "model.quantization": "none", "model.name": "google/gemma-3-270m"}
PLANS = {
    "qlora": {},
    "int8": {"model.quantization": "int8"},
    "lora": {"model.quantization": "none", "adapter.dora": True, "adapter.targets": "attention"},
    "full": FULL,
    "constant": {"optim.schedule": "constant", "optim.warmup_ratio": 0},
    "warm": {"optim.schedule": "constant_with_warmup", "optim.warmup_ratio": 0.5},
    "linear": {"optim.schedule": "linear", "optim.max_steps": 7},
    "in order": {"data.shuffle": False},
    "recomputed": {"memory.gradient_checkpointing": True},
    "gemma 2": {"model.name": "google/gemma-2-2b"},
    "gemma 3n": {"model.name": "google/gemma-3n-E2B"},
    "fsdp2": {"distributed.strategy": "fsdp2", "model.quantization": "none", "memory.gradient_checkpointing": True},
    "fsdp2, sharded": {"distributed.strategy": "fsdp2", "distributed.checkpoint": "sharded", "model.precision": "fp32"},
    "fsdp2, all weights": FULL | {"distributed.strategy": "fsdp2", "distributed.reshard_after_forward": False},
    "advanced": {"advanced.trainer": {"neftune_noise_alpha": 5.0}},
    "reward": {"stage": "reward"},
    "reward with margins": {"stage": "reward", "reward.margin": "score", "reward.center": 0},
    "dpo": {"stage": "dpo", "model.adapter": "runs/sft"},
    "dpo in two epochs": {"stage": "dpo", "optim.epochs": 2, "dpo.sft_weight": 0.5},
    "cdpo": {"stage": "dpo", "dpo.label_smoothing": 0.1},
    "robust": {"stage": "dpo", "dpo.loss": "robust", "dpo.label_smoothing": 0.1},
    "kto": {"stage": "kto", "model.adapter": "runs/sft", "kto.desirable_weight": 1.2},
    "stacked": {"stage": "dpo", "model.adapter": "runs/sft", "model.adapter_mode": "stack"},
    "ppo": {"stage": "ppo", "model.adapter": "runs/sft", "optim.schedule": "linear"},
    "ppo by a function": {"stage": "ppo", "ppo.reward": "./mine.py:score", "ppo.score_clip": None},
    "rloo": {"stage": "ppo", "ppo.estimator": "rloo", "ppo.samples_per_prompt": 4, "ppo.minibatches": 2},
    "ppo with a target": {"stage": "ppo", "ppo.kl_target": 6.0, "ppo.stop_kl": 0.1, "ppo.critic": "head"},
}


def config_of(stage: str) -> type:
    """The class that takes the keywords of a plan's trainer section."""
    module, _, name = CONFIGS[stage].rpartition(".")
    return getattr(import_module(module), name)


def fields_of(stage: str) -> set[str]:
    return {field.name for field in dataclasses.fields(config_of(stage))}


@pytest.mark.parametrize("machine", ["rtx4090", "t4", BF16_CPU, "cpu"], ids=str)
@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_trainer_keywords_exist(changes, machine):
    if machine == "t4" and changes.get("distributed.strategy") == "fsdp2":
        changes = changes | {"model.precision": "fp32"}  # fp16 is not sharded
    plan = plan_for(changes, machine)
    assert plan.trainer.keys() <= fields_of(plan.stage)


@pytest.mark.parametrize("machine", [BF16_CPU, "cpu"], ids=["bf16", "fp32"])
@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_the_config_takes_the_values(changes, machine, tmp_path):
    """Constructed for real, with every warning of ours an error: a deprecated keyword would warn."""
    plan = plan_for({"output": str(tmp_path / "run")} | changes, machine)
    values = plan.values("trainer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_of(plan.stage)(**values)
    for key, value in values.items():
        held = getattr(config, key)
        if key == "fsdp_config":  # defaults are added to it
            value = plan.values("trainer")[key]
            held = {name: held[name] for name in value}
        elif key == "accelerator_config":
            held = {name: getattr(held, name) for name in value}
        assert held == value or (key, held) == ("report_to", []), f"{key} became {held!r}"
    assert config.gradient_checkpointing == values["activation_checkpointing"]


def test_a_warm_up_below_one_is_a_share_of_the_steps(tmp_path):
    from trl import SFTConfig

    config = SFTConfig(**plan_for({"optim.warmup_ratio": 0.1, "output": str(tmp_path)}, "cpu").values("trainer"))
    assert config.get_warmup_steps(200) == 20


@pytest.mark.parametrize(
    "name", [name for name in Optim.model_fields["optimizer"].annotation.__args__ if name != "auto"]
)
def test_every_optimizer_of_the_recipe_is_known(name):
    from transformers.training_args import OptimizerNames

    assert name in {optimizer.value for optimizer in OptimizerNames}
    assert plan_for({"optim.optimizer": name}).values("trainer")["optim"] == name


@pytest.mark.parametrize("schedule", Optim.model_fields["schedule"].annotation.__args__)
def test_every_schedule_of_the_recipe_is_known(schedule):
    from transformers import SchedulerType

    assert schedule in {kind.value for kind in SchedulerType}


@pytest.mark.parametrize("stage", CONFIGS)
def test_refused_keywords_exist(stage):
    """A keyword that the library does not have would be refused for the wrong reason."""
    assert fixed(stage).keys() <= fields_of(stage)
    assert not fixed(stage).keys() & owned_by_recipe(stage).keys()


@pytest.mark.parametrize("loss", Dpo.model_fields["loss"].annotation.__args__)
def test_every_loss_of_the_recipe_is_one_of_trl(loss):
    """trl looks at the names in the middle of a step only; its source has a branch for each."""
    from trl import DPOTrainer

    smoothing = {"dpo.label_smoothing": 0.1} if loss == "robust" else {}
    types = plan_for({"stage": "dpo", "dpo.loss": loss} | smoothing).values("trainer")["loss_type"]
    assert types == [loss]
    assert f'loss_type == "{loss}"' in inspect.getsource(DPOTrainer._compute_loss)


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_lora_config(changes):
    from peft import LoraConfig

    values = plan_for(changes).values("lora")
    if values:
        config = LoraConfig(**values)
        assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_bitsandbytes_config(changes):
    from transformers import BitsAndBytesConfig

    values = plan_for(changes).values("quantization")
    if not values:
        return
    assert values.keys() <= inspect.signature(BitsAndBytesConfig).parameters.keys()
    config = BitsAndBytesConfig(**values)
    for key, value in values.items():
        held = getattr(config, key)
        assert held == (getattr(torch, value) if key.endswith(("dtype", "storage")) else value)


@pytest.mark.parametrize("changes", PLANS.values(), ids=PLANS)
def test_data_keywords(changes):
    from gemma_tune.data.build import build
    from gemma_tune.data.judged import build_judged
    from gemma_tune.data.pairs import build_pairs
    from gemma_tune.data.prompts import build_prompts

    plan = plan_for(changes)
    function = {"sft": build, "kto": build_judged, "ppo": build_prompts}.get(plan.stage, build_pairs)
    keywords = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    }
    assert plan.data.keys() == keywords - {"progress"}


def test_every_field_of_ppo_config_is_planned():
    """What the recipe does not decide would be a default that `check` never shows."""
    from transformers import TrainingArguments

    own = fields_of("ppo") - {field.name for field in dataclasses.fields(TrainingArguments)}
    assert own <= plan_for({"stage": "ppo"}).trainer.keys()
    assert own <= owned_by_recipe("ppo").keys()


@pytest.mark.parametrize("key", [key for key in Ppo.model_fields if key not in ("reward", "critic_learning_rate")])
def test_defaults_of_ppo_config_are_the_recipes(key):
    from gemma_tune.train.ppo.config import PpoConfig

    held = {field.name: field.default for field in dataclasses.fields(PpoConfig)}
    assert held["ppo_epochs" if key == "epochs" else key] == Ppo.model_fields[key].default


def test_a_new_critics_keywords_are_those_of_lora():
    from peft import LoraConfig

    plan = plan_for({"stage": "ppo", "ppo.reward": "./mine.py:score", "model.adapter": "runs/sft"})
    keywords = plan.values("session")["critic"]["lora"]
    config = LoraConfig(**keywords)
    assert {key: getattr(config, key) for key in keywords} == keywords


def test_probe_agrees_with_the_system():
    machine = probe()
    assert machine.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert machine.memory_bytes > 2**30 and machine.world_size == 1


def test_the_cpus_bf16_is_what_bitsandbytes_asks_for():
    from bitsandbytes.functional import has_avx512bf16

    if has_avx512bf16():
        assert probe().bf16 or torch.cuda.is_available()
