"""How processes share a run: recipe, then launcher, then what fits; types, keywords, and the memory of a part."""

from __future__ import annotations

from typing import Any

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.shape import count, layer_parameters, layers_of
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.choices_model import Precision, choose_precision, quantization_choices
from gemma_tune.plan.machine import GIB, MACHINES, Launch, Machine, launch_of, named_machine, overruled
from gemma_tune.plan.memory import total
from gemma_tune.plan.plan import make_plan
from gemma_tune.plan.sharding import check_types, parameter_type
from gemma_tune.plan.types import Choice, Plan
from tests.unit.plan.recipes import make_recipe, plan_for

FSDP2 = {"distributed.strategy": "fsdp2"}
BF16_CPU = Machine("this kind of CPU", "cpu", 0, 24 * GIB, bf16=True)
LARGE = {"model.name": "google/gemma-3-27b-it", "model.quantization": "none", "batch.size": 64}


def under(launch: Launch, changes: dict[str, Any] | None = None, machine: str | Machine = "8xh100") -> Plan:
    """The plan of a recipe as started by a launcher that says `launch`."""
    recipe = make_recipe(changes)
    shape = PUBLISHED[recipe.model.name]
    target = named_machine(machine) if isinstance(machine, str) else machine
    return make_plan(recipe, target, shape, FAMILIES[shape.family], launch=launch)


def shared(plan: Plan) -> tuple[str, int, int]:
    chosen = plan.session["distributed"].value
    return chosen["strategy"], chosen["replicas"], chosen["shards"]


# --- what a launcher says


def test_without_a_launcher_there_is_one_process():
    assert launch_of({}) == Launch(started=False)
    plan = under(launch_of({}), FSDP2)
    assert plan.values("session")["distributed"]["strategy"] == "single" and "fsdp" not in plan.trainer


def test_torchrun():
    said = launch_of({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"})
    assert (said.world_size, said.nodes, said.processes_per_node, said.fsdp) == (8, 2, 4, None)
    assert launch_of({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}).nodes == 2


FSDP_FILE = {
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_OFFLOAD_PARAMS": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
}


def test_accelerate_with_fsdp():
    said = launch_of(FSDP_FILE)
    assert (said.fsdp, said.checkpoint, said.offload, said.reshard_after_forward) == (2, "sharded", True, False)
    assert (said.replicas, said.shards, said.other) == (None, None, "")


def test_fsdp_variables_without_the_switch_say_nothing():
    assert launch_of(FSDP_FILE | {"ACCELERATE_USE_FSDP": "false"}) == Launch(world_size=4)


def test_groups_and_what_is_not_supported():
    mesh = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
    said = launch_of(FSDP_FILE | mesh | {"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "PARALLELISM_CONFIG_CP_SIZE": "2"})
    assert (said.replicas, said.shards, said.other) == (2, 2, "CP parallelism")
    assert launch_of({"ACCELERATE_USE_DEEPSPEED": "true"}).other == "DeepSpeed"


def test_variables_that_the_plan_takes_over():
    more = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2", "HOME": "/root"}
    environment = FSDP_FILE | more | {"ACCELERATE_USE_CPU": "true"}
    left = environment.keys() - set(overruled(environment))
    assert left == {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "HOME", "ACCELERATE_USE_CPU"}
    assert launch_of({name: environment[name] for name in left}) == Launch(world_size=4)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "FSDP_VERSION"])
def test_a_broken_variable_is_named(name):
    with pytest.raises(AccessError, match=name):
        launch_of(FSDP_FILE | {name: "two"})


@pytest.mark.parametrize(
    ("name", "gpus", "nodes", "processes"),
    [("8xl4", 8, 1, 8), ("2x8xh100", 8, 2, 16), ("8xa100-80gb", 8, 1, 8), ("4x1xt4", 1, 4, 4)],
)
def test_several_machines_of_the_table(name, gpus, nodes, processes):
    machine = named_machine(name)
    assert (machine.gpus, machine.nodes, machine.world_size, machine.name) == (gpus, nodes, processes, name)
    assert (
        machine.memory_bytes == MACHINES[name.rpartition("x")[2] if name != "8xa100-80gb" else "a100-80gb"].memory_bytes
    )


@pytest.mark.parametrize("name", ["0xh100", "2xcpu", "2x8xh900", "2x2x8xh100", "x8xh100"])
def test_machines_that_there_are_not(name):
    with pytest.raises(UserError, match="unknown machine"):
        named_machine(name)


# --- the recipe, then the launcher, then what fits


@pytest.mark.parametrize(
    ("changes", "launch", "expected"),
    [
        ({}, Launch(), ("single", 1, 1)),
        ({"distributed.strategy": "ddp"}, Launch(), ("single", 1, 1)),
        (FSDP2, Launch(), ("fsdp2", 1, 1)),
        ({}, Launch(world_size=4), ("ddp", 4, 1)),
        ({}, Launch(world_size=4, fsdp=2), ("fsdp2", 1, 4)),
        ({}, Launch(world_size=8, fsdp=2, replicas=2, shards=4), ("hsdp", 2, 4)),
        ({}, Launch(world_size=8, fsdp=2, replicas=1, shards=8), ("fsdp2", 1, 8)),
        ({"distributed.strategy": "ddp"}, Launch(world_size=4, fsdp=2), ("ddp", 4, 1)),
        (FSDP2, Launch(world_size=4), ("fsdp2", 1, 4)),
        (FSDP2, Launch(world_size=4, fsdp=1), ("fsdp2", 1, 4)),
        ({"distributed.strategy": "hsdp"}, Launch(world_size=16, nodes=2), ("hsdp", 2, 8)),
        ({"distributed.strategy": "hsdp"}, Launch(world_size=8), ("fsdp2", 1, 8)),
        ({"distributed.strategy": "hsdp", "distributed.replicas": 4}, Launch(world_size=16, nodes=2), ("hsdp", 4, 4)),
        (
            {"distributed.strategy": "hsdp", "distributed.replicas": 2},
            Launch(world_size=16, fsdp=2, replicas=4, shards=4),
            ("hsdp", 2, 8),
        ),
    ],
)
def test_the_recipe_wins_then_the_launcher(changes, launch, expected):
    assert shared(under(launch, changes)) == expected


def test_what_does_not_fit_is_sharded():
    assert shared(plan_for(LARGE, "8xh100"))[0] == "ddp"
    assert shared(plan_for(LARGE, named_machine("8xl4")))[0] == "fsdp2"
    assert shared(plan_for(LARGE | {"distributed.strategy": "ddp"}, named_machine("8xl4")))[0] == "ddp"


def test_a_cpu_is_sharded_only_when_asked():
    small = Machine("small", "cpu", 0, GIB, bf16=True, world_size=2)
    assert shared(plan_for(LARGE, small))[0] == "ddp"
    assert shared(plan_for(LARGE | FSDP2, small))[0] == "fsdp2"


def test_stages_that_are_not_sharded_stay_whole():
    tight = named_machine("8xt4")
    assert (
        shared(plan_for({"stage": "kto", "model.name": "google/gemma-3-12b-it", "batch.size": 32}, tight))[0] == "ddp"
    )
    with pytest.raises(UserError, match=r"kto is not sharded.*the launcher asks for FSDP"):
        under(Launch(world_size=8, fsdp=2), {"stage": "kto"})


def test_keys_of_the_launcher_count_where_the_recipe_is_silent():
    launch = Launch(world_size=8, fsdp=2, checkpoint="sharded", offload=True, reshard_after_forward=False)
    config = under(launch).values("trainer")["fsdp_config"]
    assert (config["state_dict_type"], config["cpu_offload"], config["reshard_after_forward"]) == (
        "SHARDED_STATE_DICT",
        True,
        False,
    )
    own = {"distributed.checkpoint": "full", "distributed.offload": False, "distributed.reshard_after_forward": True}
    config = under(launch, own).values("trainer")["fsdp_config"]
    assert (config["state_dict_type"], config["cpu_offload"], config["reshard_after_forward"]) == (
        "FULL_STATE_DICT",
        False,
        True,
    )


@pytest.mark.parametrize(
    ("changes", "launch", "said", "fix"),
    [
        ({"distributed.strategy": "hsdp", "distributed.replicas": 3}, Launch(world_size=8), "3 equal groups", "2 or 4"),
        ({"distributed.strategy": "hsdp", "distributed.replicas": 8}, Launch(world_size=8), "8 equal groups", "2 or 4"),
        ({"distributed.strategy": "hsdp"}, Launch(world_size=2, nodes=2), "equal groups", "strategy: fsdp2"),
        (FSDP2 | {"model.quantization": "int8"}, Launch(), "int8 weights cannot be sharded", "nf4"),
        (FSDP2 | {"optim.optimizer": "adamw_8bit"}, Launch(), "adamw_8bit cannot take a step", "adamw_torch"),
        (FSDP2 | {"optim.optimizer": "adafactor"}, Launch(), "adafactor cannot take a step", "adamw_torch"),
        ({}, Launch(world_size=8, fsdp=1), "version 1 of FSDP", "fsdp_version: 2"),
        ({}, Launch(world_size=8, other="DeepSpeed"), "DeepSpeed", "accelerate_configs"),
        (FSDP2 | {"model.precision": "fp16", "model.name": "google/gemma-7b"}, Launch(), "fp16 cannot be", "fp32"),
        (FSDP2 | {"batch.size": 20}, Launch(world_size=8), "batch.size 20 cannot be split", "batch.size: 24"),
    ],
)
def test_what_cannot_be(changes, launch, said, fix):
    with pytest.raises(UserError, match=said) as caught:
        under(launch, changes)
    assert fix in caught.value.problems[0].fix


def test_a_t4_is_told_that_fp16_is_not_sharded():
    for name in ("google/gemma-7b", "google/gemma-3-12b-it"):
        with pytest.raises(UserError, match="fp16 cannot be sharded") as caught:
            plan_for(FSDP2 | {"model.name": name}, named_machine("8xt4"))
        assert "set model.precision: fp32" in caught.value.problems[0].fix


def test_offload_needs_a_gpu():
    with pytest.raises(UserError, match="Cannot access accelerator device"):
        plan_for(FSDP2 | {"distributed.offload": True}, BF16_CPU)


# --- types


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("machine", ["t4", "rtx4090", "cpu", BF16_CPU], ids=str)
def test_packed_weights_are_stored_in_the_type_that_is_gathered(precision, machine):
    recipe = make_recipe({"model.name": "google/gemma-7b", "model.precision": precision})
    target = MACHINES[machine] if isinstance(machine, str) else machine
    chosen = choose_precision(recipe, target, FAMILIES["gemma1"])
    storage = quantization_choices(recipe, FAMILIES["gemma1"], chosen)["bnb_4bit_quant_storage"].value
    assert storage == parameter_type(chosen)


def test_another_storage_is_a_bug_that_is_raised():
    precision = Precision("bfloat16", "bfloat16", None, "", "", "")
    check_types(precision, {"bnb_4bit_quant_storage": Choice("bfloat16", "")})
    for storage in ("float16", "uint8", "float32"):
        with pytest.raises(ValueError, match=f"stored as {storage} and gathered as bfloat16"):
            check_types(precision, {"bnb_4bit_quant_storage": Choice(storage, "")})


# --- keywords


def test_keywords_of_one_process():
    assert not {"fsdp", "fsdp_config", "ddp_timeout", "accelerator_config"} & plan_for().trainer.keys()


def test_keywords_of_ddp():
    trainer = under(Launch(world_size=8), {"distributed.timeout": 90.5}).values("trainer")
    assert trainer["ddp_timeout"] == 5430
    assert not {"fsdp", "fsdp_config"} & trainer.keys()


@pytest.mark.parametrize(
    ("changes", "machine", "efficient"),
    [
        ({"model.quantization": "none"}, "8xh100", False),
        ({}, "8xh100", False),
        ({"model.quantization": "none"}, BF16_CPU, False),
    ],
)
def test_every_key_of_fsdp_is_written_out(changes, machine, efficient):
    trainer = under(Launch(world_size=2), FSDP2 | changes, machine).values("trainer")
    assert trainer["fsdp"] is True
    assert trainer["fsdp_config"] == {
        "version": 2,
        "reshard_after_forward": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["Gemma3DecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": efficient,
        "cpu_offload": False,
        "activation_checkpointing": False,
    }
    assert trainer["activation_checkpointing_kwargs"] == {"use_reentrant": False}


def test_text_only_has_no_layers_of_towers():
    both = [FSDP2 | {"model.name": "google/gemma-4-31B", "model.text_only": text_only} for text_only in (False, True)]
    full, text = (plan_for(one, "h100").values("trainer")["fsdp_config"] for one in both)
    assert full["transformer_layer_cls_to_wrap"] == ["Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer"]
    assert text["transformer_layer_cls_to_wrap"] == ["Gemma4TextDecoderLayer"]


FULL = {"adapter": None, "model.quantization": "none", "model.name": "google/gemma-3-4b-it"}


def test_a_full_fine_tune_in_parts():
    trainer = plan_for(FULL | FSDP2, "8xh100").values("trainer")
    assert trainer["optim"] == "adamw_torch_fused"
    assert trainer["accelerator_config"] == {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    with pytest.raises(UserError, match="accelerator_config"):
        plan_for(FULL | {"advanced.trainer": {"accelerator_config": {}}}, "8xh100")
    assert plan_for(FULL, "h100").values("trainer")["optim"] == "adamw_8bit"


# --- memory


def sizes(plan: Plan) -> dict[str, int]:
    return {term.name: term.bytes for term in plan.memory}


def test_the_memory_of_a_part():
    shape = PUBLISHED["google/gemma-3-27b-it"]
    parameters = count(shape)
    held = sizes(plan_for(LARGE | FSDP2, "8xh100"))
    trained = 16 * parameters.lora_per_rank["all-linear"]
    assert held["linear layers"] == 2 * parameters.linear // 8
    assert held["adapter"] == held["gradients of the adapter"] == 4 * trained // 8
    assert held["optimizer state"] == 8 * trained // 8
    assert held["gradients before they are sent"] == 4 * trained
    layer = layer_parameters(shape, next(layers_of(shape)))
    each = 2 * (layer.linear + layer.norms_and_rest) + 4 * 16 * layer.lora_per_rank["all-linear"]
    assert held["gathered layers"] == 2 * each
    rest = parameters.embedding + shape.hidden + (parameters.towers or 0)
    assert held["gathered embeddings and rest"] == 2 * rest
    assert "gradient buckets" not in held and "loading" not in held


def test_constants_of_nf4_are_whole_and_loading_needs_the_whole_model():
    changes = LARGE | FSDP2 | {"model.quantization": "nf4", "batch.micro": 1, "data.max_length": 128}
    plan = plan_for(changes, named_machine("8xl4"))
    held, parameters = sizes(plan), count(PUBLISHED["google/gemma-3-27b-it"])
    assert held["linear layers"] == parameters.linear // 2 // 8
    assert held["constants of NF4"] == round(parameters.linear * (1 / 64 + 4 / (64 * 256)))
    alone = sizes(plan_for(changes | {"distributed.strategy": "ddp"}, named_machine("8xl4")))
    weights = [name for name in alone if name in held and ("linear" in name or "embedding" in name or "tower" in name)]
    whole = sum(alone[name] for name in [*weights, "norms and small layers", "CUDA and allocator"])
    assert total(plan.memory) == whole, "a process that quantises holds all of it before it has a part"


def test_groups_hold_parts_of_a_group():
    machine = named_machine("2x8xh100")
    two = sizes(plan_for(LARGE | {"distributed.strategy": "hsdp"}, machine))
    one = sizes(plan_for(LARGE | FSDP2, machine))
    assert two["linear layers"] == 2 * one["linear layers"]
    assert two["linear layers"] == sizes(plan_for(LARGE | FSDP2, "8xh100"))["linear layers"]


def test_layers_that_are_kept_and_parameters_that_are_not():
    kept = sizes(plan_for(LARGE | FSDP2 | {"distributed.reshard_after_forward": False}, "8xh100"))
    dropped = sizes(plan_for(LARGE | FSDP2, "8xh100"))
    assert kept["gathered layers"] == 62 // 2 * dropped["gathered layers"]
    away = plan_for(LARGE | FSDP2 | {"distributed.offload": True}, "8xh100")
    assert not {"linear layers", "adapter", "optimizer state"} & sizes(away).keys()
    assert "gathered layers" in sizes(away) and any("PCIe" in note for note in away.notes)


def test_a_part_leaves_room_for_a_larger_pass():
    def micro(strategy: str) -> int:
        plan = plan_for(
            LARGE | {"distributed.strategy": strategy, "data.max_length": 2048, "batch.size": 128}, "8xh100"
        )
        return plan.values("trainer")["per_device_train_batch_size"]

    assert micro("fsdp2") > micro("ddp")


def test_sharing_is_advised_where_a_copy_does_not_fit():
    changes = LARGE | {"distributed.strategy": "ddp"}
    machine = named_machine("8xrtx4090")
    refusal = plan_for(changes, machine).refusal
    assert "distributed.strategy: fsdp2" in refusal
    assert plan_for(changes | FSDP2, machine).refusal == "", "the advice must work"


def test_advice_that_cannot_be_combined_is_not_given():
    refusal = plan_for({"model.name": "google/gemma-7b", "model.quantization": "none"}, named_machine("8xt4")).refusal
    assert "Settings that would fit: " in refusal and "fsdp2" not in refusal, "a T4 computes in fp16"


def test_notes():
    assert any("FSDP of one process" in note for note in plan_for(FSDP2).notes)
    across = plan_for(LARGE | FSDP2, named_machine("2x8xh100"))
    assert any("over the network between 2 nodes" in note for note in across.notes)
    assert any(
        "the recipe decides" in n for n in under(Launch(world_size=8, fsdp=2), {"distributed.strategy": "ddp"}).notes
    )


def test_processes_of_a_plan_are_as_many_on_each_node():
    from gemma_tune.plan.choices_batch import most_processes

    assert most_processes(make_recipe({"batch.size": 12}), named_machine("2x8xh100")) == 12
    assert most_processes(make_recipe({"batch.size": 3}), named_machine("2x8xh100")) == 1
