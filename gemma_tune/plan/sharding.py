"""How processes share a run: whole copies (DDP), parts of one (FSDP2), or groups of parts (HSDP).

The recipe decides, then the launcher, then what fits. Keywords are those of transformers 5.23 and accelerate 1.15, and
all of them are written out, so that no variable of a launcher decides anything behind the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gemma_tune.errors import Problem, UserError
from gemma_tune.gemma.families import Family, text_only
from gemma_tune.plan.choices_model import Precision
from gemma_tune.plan.machine import Launch, Machine
from gemma_tune.plan.stages import written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.rules import NOT_SHARDED
from gemma_tune.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """What was decided about the processes of a run.

    Attributes:
        strategy: `single` is one process that holds the whole model.
        replicas: whole copies of the model among the processes.
        shards: processes that hold one copy between them; replicas x shards are all of them.
        checkpoint, offload, reshard_after_forward: as in the recipe; of sharded strategies.
        timeout: minutes that processes wait for each other.
        why: the reason for `strategy`.
    """

    strategy: Literal["single", "ddp", "fsdp2", "hsdp"]
    replicas: int
    shards: int
    checkpoint: Literal["full", "sharded"]
    offload: bool
    reshard_after_forward: bool
    timeout: float
    why: str

    @property
    def sharded(self) -> bool:
        return self.strategy in ("fsdp2", "hsdp")


SHARDED_OPTIMIZERS = ("auto", "adamw_torch")
"""Those of the recipe that can: transformers' Adafactor and bitsandbytes' AdamW mix parts and wholes, and raise
(tests/seams/test_sharding.py)."""


def choose_sharding(
    recipe: Recipe, machine: Machine, precision: Precision, launch: Launch, fits_whole: Callable[[], bool]
) -> Sharding:
    """What `distributed` of the recipe comes to under this launch.

    Args:
        recipe, machine: as in `make_plan`.
        precision: the types of the run.
        launch: what the launcher says.
        fits_whole: tells whether a whole copy fits each device; only asked where that decides.

    Raises:
        UserError: the processes cannot be grouped as asked, or this stage or device cannot be sharded.
    """
    against = obstacle(recipe, precision)
    strategy, why = _strategy(recipe, machine, launch, against, fits_whole)
    replicas, shards = 1, launch.world_size
    if strategy == "hsdp":
        replicas, shards, why = _groups(recipe, launch, why)
        strategy = "hsdp" if replicas > 1 else "fsdp2"
    elif strategy in ("ddp", "single"):
        replicas, shards = launch.world_size, 1
    sharded = strategy in ("fsdp2", "hsdp")
    offload = sharded and _asked(recipe, "offload", launch.offload)
    if sharded and against:
        raise UserError(f"{against.what} ({why})", where=against.where, fix=against.fix)
    if offload and machine.device == "cpu":
        raise UserError(
            "offload keeps parameters in CPU memory, and on a CPU they are there (accelerate fails: Cannot access "
            "accelerator device)",
            where="distributed.offload",
            fix="remove distributed.offload",
        )
    return Sharding(
        strategy=strategy,
        replicas=replicas,
        shards=shards,
        checkpoint=_asked(recipe, "checkpoint", launch.checkpoint) if sharded else "full",
        offload=offload,
        reshard_after_forward=_asked(recipe, "reshard_after_forward", launch.reshard_after_forward),
        timeout=recipe.distributed.timeout,
        why=why,
    )


def _strategy(
    recipe: Recipe, machine: Machine, launch: Launch, against: Problem | None, fits_whole: Callable[[], bool]
) -> tuple[Literal["single", "ddp", "fsdp2", "hsdp"], str]:
    asked = recipe.distributed.strategy
    if asked != "auto" and launch.world_size == 1 and (asked == "ddp" or not launch.started):
        return "single", "recipe; one process has nobody to share with"
    if asked != "auto":
        return asked, "recipe"
    if launch.fsdp is not None:
        # Its parallelism config is HSDP where it has more than one group.
        groups = launch.replicas is not None and launch.replicas > 1
        return ("hsdp", "the launcher's FSDP in groups") if groups else ("fsdp2", "the launcher asks for FSDP")
    if launch.world_size == 1:
        return "single", "one process"
    if machine.device == "cpu":
        return "ddp", "auto, on a CPU: sharding there is slow, and for tests; distributed.strategy: fsdp2 asks for it"
    if against:
        return "ddp", f"auto: {against.what.partition(':')[0]}"
    if fits_whole():
        return "ddp", "auto: a whole copy fits each device, and only gradients need to be sent"
    return "fsdp2", "auto: a whole copy does not fit each device"


def _groups(recipe: Recipe, launch: Launch, why: str) -> tuple[int, int, str]:
    """(replicas, shards, reason) of HSDP.

    Raises:
        UserError: the groups cannot be equal, or would have one process each.
    """
    asked = recipe.distributed.replicas or launch.replicas
    replicas = asked or launch.nodes
    source = "distributed.replicas" if recipe.distributed.replicas else "dp_replicate" if launch.replicas else "nodes"
    world = launch.world_size
    if world % replicas or (replicas > 1 and replicas == world):
        # With one node there is no number of groups that goes without saying.
        possible = [count for count in range(2, world) if world % count == 0]
        raise UserError(
            f"{world} process{'es' if world > 1 else ''} cannot be {replicas} equal groups of several ({source})",
            where="distributed.replicas",
            fix=f"set distributed.replicas: {' or '.join(map(str, possible))}"
            if possible
            else "set distributed.strategy: fsdp2",
        )
    if replicas == 1:
        return 1, world, f"{why}; {source}: 1, and one group is fsdp2"
    return replicas, world // replicas, f"{why}; {source}: {replicas} groups of {world // replicas}"


def _asked(recipe: Recipe, key: str, launched: Any) -> Any:
    """The recipe's value where it was written, else the launcher's, else the default."""
    own = written(recipe, f"distributed.{key}")
    return own.value if own.reason == "recipe" or launched is None else launched


def obstacle(recipe: Recipe, precision: Precision) -> Problem | None:
    """Why a run of `recipe` cannot be sharded, with the key to change; None where it can.

    What the recipe itself asks for, `recipe.rules` has refused with its line.
    """
    if recipe.stage in NOT_SHARDED:
        return Problem(
            f"stage {recipe.stage} is not sharded: {NOT_SHARDED[recipe.stage]}",
            "distributed.strategy",
            "set distributed.strategy: ddp",
        )
    if recipe.model.quantization == "int8":
        return Problem(
            "int8 weights cannot be sharded: their scales are attributes of the tensor, which its parts do not have",
            "model.quantization",
            "set model.quantization: nf4 or none, or distributed.strategy: ddp",
        )
    if recipe.optim.optimizer not in SHARDED_OPTIMIZERS:
        return Problem(
            f"{recipe.optim.optimizer} cannot take a step on sharded parameters: its kernels know no parts",
            "optim.optimizer",
            "set optim.optimizer: adamw_torch, or distributed.strategy: ddp",
        )
    if precision.compute == "float16":
        return Problem(
            "fp16 cannot be sharded: packed weights would be rounded like numbers, and the loss scaler sees one part",
            "model.precision",
            "set model.precision: fp32 (bf16 on Ampere or newer), or distributed.strategy: ddp",
        )
    return None


def parameter_type(precision: Precision) -> str:
    """The type that parameters are gathered in: the autocast type, to which accelerate's FSDP2 casts, or their own."""
    return {"bf16": "bfloat16", "fp16": "float16", None: precision.weights}[precision.autocast]


def check_types(precision: Precision, quantization: dict[str, Choice]) -> None:
    """Make sure that packed weights are stored in the type that parameters are gathered in.

    FSDP2 casts what it gathers to one type. Packed bytes that are stored as another float are rounded like numbers:
    of 131,072 bytes 129,526 changed with fp16 storage under bf16, without a word.

    Raises:
        ValueError: the plan contradicts itself.
    """
    storage = quantization.get("bnb_4bit_quant_storage")
    if storage is not None and storage.value != parameter_type(precision):
        raise ValueError(f"packed weights are stored as {storage.value} and gathered as {parameter_type(precision)}")


def wrapped_layers(recipe: Recipe, family: Family) -> list[str]:
    """Classes whose modules are gathered one at a time, all of which the loaded model has.

    What transformers would take, `_no_split_modules`, names classes of towers that a checkpoint may lack, on which
    accelerate 1.15 stops: `Could not find the transformer layer class`.
    """
    loaded = text_only(family) if recipe.model.text_only else family
    return [loaded.decoder_layer, *loaded.tower_layers]


def sharding_keywords(recipe: Recipe, machine: Machine, family: Family, sharding: Sharding) -> dict[str, Choice]:
    """Keywords of TrainingArguments that say how processes share the run."""
    chosen: dict[str, Choice] = {}
    if sharding.replicas * sharding.shards > 1:
        seconds = max(1, round(60 * sharding.timeout))
        chosen["ddp_timeout"] = Choice(seconds, f"distributed.timeout: {sharding.timeout:g} minutes, in seconds")
    if not sharding.sharded:
        return chosen
    config = {
        "version": 2,
        "reshard_after_forward": sharding.reshard_after_forward,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": wrapped_layers(recipe, family),
        "state_dict_type": "SHARDED_STATE_DICT" if sharding.checkpoint == "sharded" else "FULL_STATE_DICT",
        # It stops at saved buffers, which Gemma 4 has (accelerate 1.15, fsdp2_load_full_state_dict). Each process reads
        # the weights into its computer's memory instead (models/load.py), and sends its part to the device.
        "cpu_ram_efficient_loading": False,
        "cpu_offload": sharding.offload,
        # The plugin's own kind renames modules, and the adapter that is saved is empty (accelerate 1.15, peft 0.21).
        "activation_checkpointing": False,
    }
    chosen["fsdp"] = Choice(True, f"{sharding.strategy}: {sharding.why}")
    chosen["fsdp_config"] = Choice(config, "distributed; layer classes of this Gemma, recomputation by the Trainer")
    if recipe.adapter is None:
        kept = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        why = "gradients of all weights are summed up in parts after each pass; whole ones would not fit"
        chosen["accelerator_config"] = Choice(kept, why)
    return chosen


def distributed_choice(sharding: Sharding) -> Choice:
    """`session["distributed"]`: what the run itself must know about its processes."""
    return Choice(
        {
            "strategy": sharding.strategy,
            "replicas": sharding.replicas,
            "shards": sharding.shards,
            "checkpoint": sharding.checkpoint,
            "offload": sharding.offload,
            "timeout": sharding.timeout,
        },
        sharding.why,
    )
