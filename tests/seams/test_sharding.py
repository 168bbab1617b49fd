"""What the plan says about FSDP2 against accelerate and torch: layer classes, groups, parts, what has none.

A process group of torch's `fake` backend has eight members in this one process: parts are real, nothing is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gemma_tune.gemma.families import FAMILIES, Family, family_of
from gemma_tune.gemma.shape import count
from gemma_tune.plan.accelerate_files import KEYS, launch_in, read_accelerate_file, shipped_files
from gemma_tune.plan.gathered import NF4_BLOCK, layer_sizes, packed_bytes, root_size
from gemma_tune.plan.machine import launch_of
from gemma_tune.plan.memory import estimate
from gemma_tune.plan.sharding import wrapped_layers
from gemma_tune.plan.workload import Workload
from tests.tiny import TINY_NAMES
from tests.unit.plan.recipes import make_recipe, plan_for

WORLD = 8
FSDP2 = {"distributed.strategy": "fsdp2"}


@pytest.fixture
def eight() -> Iterator[Any]:
    """A mesh of eight processes, of which this is the first."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    yield init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp_shard",))
    dist.destroy_process_group()


@pytest.fixture
def one() -> Iterator[Any]:
    """A mesh of this process alone, whose collectives are real."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def base_of(folder: Path, text_only: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if text_only:
        config = config.get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def shard(model: Any, config: dict[str, Any], mesh: Any) -> Any:
    """What accelerate makes of a model under the plan's fsdp_config."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", fsdp=True, fsdp_config=config)
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("dp_shard",): mesh},
        parallelism_config=SimpleNamespace(fsdp_dim_names=("dp_shard",)),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def config_of(changes: dict[str, Any], machine: str = "8xh100") -> dict[str, Any]:
    return plan_for(FSDP2 | changes, machine).values("trainer")["fsdp_config"]


@pytest.mark.parametrize("text_only", [False, True], ids=["as published", "text only"])
@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_generation_has_the_layers_that_are_wrapped(
    tiny: Callable[..., Path], name: str, text_only: bool
) -> None:
    import json

    folder = tiny(name)
    family = family_of(json.loads((folder / "config.json").read_text()))
    recipe = make_recipe({"model.text_only": text_only})
    model = base_of(folder, text_only and family.text_model_type is not None)
    there = {type(module).__name__ for module in model.modules()}
    wrapped = wrapped_layers(recipe, family)
    assert set(wrapped) <= there
    # Nothing that repeats is left out: an unwrapped stack of layers would be whole on each process all the time.
    stacks = {type(m[0]).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    stacks -= {"Linear"}  # Gemma 3n's projections of its streams, and experts: inside of what is wrapped, or small
    inside = {type(m).__name__ for layer in model.modules() if type(layer).__name__ in wrapped for m in layer.modules()}
    assert stacks <= inside | {"Gemma4AudioLayer"}


def test_the_layers_that_transformers_names_are_not_all_there(tiny: Callable[..., Path]) -> None:
    """Why the plan names them: fails once `_no_split_modules` holds only what a model has."""
    from accelerate.utils.dataclasses import get_module_class_from_name

    for name in ("gemma3", "gemma4_text"):
        model = base_of(tiny(name))
        assert any(get_module_class_from_name(model, one) is None for one in model._no_split_modules)


@pytest.mark.parametrize("name", ["gemma3", "gemma4", "gemma4_moe"])
def test_groups_and_parts_are_those_of_the_estimate(tiny: Callable[..., Path], eight: Any, name: str) -> None:
    """Bytes of each group as it is gathered, and of the part that a process keeps."""
    from torch.distributed.fsdp import FSDPModule
    from transformers import AutoConfig

    from gemma_tune.gemma.sizes import shape_of

    folder = tiny(name)
    family = FAMILIES[name.removesuffix("_moe")]
    shape = dataclasses.replace(
        shape_of(AutoConfig.from_pretrained(folder).to_dict()),
        towers=sum(p.numel() for n, p in base_of(folder).named_parameters() if "language_model" not in n),
    )
    work = dataclasses.replace(SMALL, shards=WORLD, world_size=WORLD)
    config = config_of({"model.name": {"gemma3": "google/gemma-3-4b-it"}.get(name, "google/gemma-4-31B")})
    model = shard(base_of(folder), config | {"cpu_ram_efficient_loading": False}, eight)
    groups, seen = dict[str, int](), set[int]()  # embedding, head and last norm are modules of one group
    for path, module in model.named_modules():
        if isinstance(module, FSDPModule):
            mine = [p for group in module._get_fsdp_state()._fsdp_param_groups for p in group.fsdp_params]
            groups[path] = sum(4 * p._orig_size.numel() for p in mine if id(p) not in seen)
            seen |= set(map(id, mine))
    layers = [size for path, size in groups.items() if ".layers." in path and "language_model" in path]
    assert layers == layer_sizes(shape, work)
    towers = sum(size for path, size in groups.items() if ".layers." in path and "language_model" not in path)
    assert sum(groups.values()) - sum(layers) == root_size(shape, count(shape), work)
    assert towers < 4 * (shape.towers or 0), "towers' layers are groups of their own: the estimate is an upper bound"
    assert family.decoder_layer in config["transformer_layer_cls_to_wrap"]
    kept = sum(parameter.to_local().numel() for parameter in model.parameters())
    terms = [term for term in estimate(shape, work) if "part of" in term.formula and "4 B;" in term.formula]
    whole = count(shape).text + (shape.towers or 0)
    estimated = sum(term.bytes for term in terms if "gradient" not in term.name) / 4
    # Dimensions that 8 does not divide leave the first process with more than its part.
    assert estimated == pytest.approx(whole / WORLD, abs=8)
    assert estimated <= kept <= 1.25 * estimated


def qlora(folder: Path, family: Family) -> Any:
    """An NF4 base, stored as the plan says, with a LoRA adapter whose B is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    values = plan_for(FSDP2, "8xh100").values("quantization") | {
        "llm_int8_skip_modules": list(family.skip_quantization)
    }
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**values), device_map={"": "cpu"}
    )
    model = get_peft_model(base, LoraConfig(r=4, target_modules=family.lora_targets["all-linear"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def wrapping(family: Family) -> dict[str, Any]:
    return config_of({}) | {"transformer_layer_cls_to_wrap": [family.decoder_layer, *family.tower_layers]}


def test_packed_weights_are_sharded_and_their_constants_are_not(tiny: Callable[..., Path], eight: Any) -> None:
    import bitsandbytes as bnb

    family = FAMILIES["gemma3_text"]
    model = shard(qlora(tiny("gemma3_text"), family), wrapping(family), eight)
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 4 * 7
    for layer in layers:
        weights = layer.in_features * layer.out_features
        assert layer.weight.dtype == torch.bfloat16
        assert 2 * layer.weight.to_local().numel() == weights * packed_bytes(QUANTISED) / WORLD
        assert layer.quant_state.absmax.numel() == weights // NF4_BLOCK, "one a block, on each process"


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4"])
def test_qlora_in_parts_is_qlora(tiny: Callable[..., Path], one: Any, name: str) -> None:
    """AltUp's clamp in place, per-layer embeddings, shared keys and values, towers that see no image."""
    family = FAMILIES[name]
    ids = torch.randint(200, 900, (2, 24), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if family.tower_layers:
        inputs["mm_token_type_ids"] = torch.zeros_like(ids)
    losses = []
    for sharded in (False, True):
        model = qlora(tiny(name), family).train()
        if sharded:
            model = shard(model, wrapping(family), one)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == losses[0]


SMALL = Workload(
    device="cuda",
    quantization="none",
    double_quantization=False,
    weight_bytes=4,
    compute_bytes=4,
    autocast=False,
    rank=0,
    targets="all-linear",
    dropout=False,
    dora=False,
    optimizer="adamw_torch",
    rows=1,
    length=64,
    masked=True,
    attention="sdpa",
    checkpointing=False,
    world_size=1,
)


QUANTISED = dataclasses.replace(SMALL, quantization="nf4", double_quantization=True, weight_bytes=2, compute_bytes=2)


@pytest.mark.parametrize("path", shipped_files().values(), ids=lambda path: path.stem)
def test_accelerate_takes_each_shipped_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded by accelerate's own reader, and the environment that its launcher makes of it is what the plan read."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = load_config_from_file(str(path))
    file = read_accelerate_file(path)
    assert config.distributed_type.value == file.kind
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(path), "--num_processes", "4", "train.py"])
    if file.number("num_processes"):
        arguments = parser.parse_args(["--config_file", str(path), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    arguments.main_process_port = 29500
    environment = prepare_multi_gpu_env(arguments)
    world = arguments.num_processes
    nodes = arguments.num_machines
    # What torchrun adds.
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world // nodes), "GROUP_WORLD_SIZE": str(nodes)}
    assert launch_of(environment) == launch_in(file, 4)
    if file.kind == "FSDP":
        for key, value in environment.items():
            if key.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_")):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.activation_checkpointing is False


def test_the_keys_of_a_file_are_accelerates() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    old = {"dynamo_backend", "fp16"}  # accepted and converted
    assert {field.name for field in dataclasses.fields(ClusterConfig)} | old == KEYS


# --- what cannot be sharded: each fails once upstream is mended


def stepped(optimizer: Callable[[Any], Any], mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(256, 256)
    fully_shard(model, mesh=mesh)
    optimiser = optimizer(model.parameters())
    model(torch.ones(2, 256)).sum().backward()
    optimiser.step()


def test_adamw_takes_a_step_on_parts(one: Any) -> None:
    stepped(lambda parameters: torch.optim.AdamW(parameters, fused=True), one)


def test_other_optimizers_of_the_recipe_do_not(one: Any) -> None:
    import bitsandbytes as bnb
    from transformers.optimization import Adafactor

    for make in (
        lambda parameters: Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False),
        bnb.optim.AdamW8bit,
        bnb.optim.PagedAdamW8bit,
        bnb.optim.PagedAdamW32bit,
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match=r"DTensor|sharding strategy"):
            stepped(make, one)


def test_int8_weights_lose_their_scales(one: Any) -> None:
    import bitsandbytes as bnb
    from torch.distributed.fsdp import fully_shard

    layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False).to("cpu")
    layer(torch.randn(4, 64))
    model = nn.Sequential(layer)
    fully_shard(model, mesh=one)
    with pytest.raises(AttributeError, match="CB"):
        model(torch.randn(4, 64))


def test_packed_weights_are_rounded_when_they_are_gathered_as_another_type() -> None:
    """Why storage must be the type of the others: bytes that are read as fp16 do not survive a cast to bf16."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(256)
    packed = torch.stack([packed, packed.sort().values], dim=1).flatten()  # all pairs of bytes
    for storage, same in ((torch.bfloat16, True), (torch.float16, False)):
        gathered = packed.view(storage).to(torch.bfloat16).view(torch.uint8)
        assert torch.equal(gathered, packed) is same
