"""What a user should know before starting: one sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Parameters, Shape, count
from gemma_tune.plan.choices_batch import BUDGET, can_split, gib
from gemma_tune.plan.choices_model import BYTES, Precision
from gemma_tune.plan.machine import Launch, Machine
from gemma_tune.plan.memory import total
from gemma_tune.plan.sharding import Sharding
from gemma_tune.plan.stages import CONFIGS, continues, has_reference
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import MemoryTerm
from gemma_tune.recipe.schema import Recipe

LICENCES = {
    "gemma": "the Gemma Terms of Use (ai.google.dev/gemma/terms): who publishes a tune passes them on, with a notice",
    "apache-2.0": "Apache-2.0",
}


def notes_of(
    recipe: Recipe,
    machine: Machine,
    shape: Shape,
    family: Family,
    precision: Precision,
    memory: tuple[MemoryTerm, ...],
    start: Start | None,
    launch: Launch,
    sharding: Sharding,
) -> tuple[str, ...]:
    """The notes of a plan, the most important first."""
    parameters = count(shape)
    return (
        *_room(machine, memory),
        *_types(recipe, machine, family, precision),
        *_adapter(recipe, start),
        *_reference(recipe),
        *_ppo(recipe),
        *_not_quantised(recipe, shape, parameters, precision),
        *_towers(recipe, parameters, precision),
        *_sharing(recipe, launch, sharding),
        *_devices(recipe, machine, launch.world_size),
        *_run(recipe),
        f"{family.label} is under {LICENCES[family.licence]}.",
    )


def _room(machine: Machine, memory: tuple[MemoryTerm, ...]) -> Iterator[str]:
    need = total(memory)
    if BUDGET * machine.memory_bytes < need <= machine.memory_bytes:
        room = gib(machine.memory_bytes)
        yield f"The estimate, {gib(need)}, leaves less than a tenth of {room}: close what else uses it."


def _types(recipe: Recipe, machine: Machine, family: Family, precision: Precision) -> Iterator[str]:
    if machine.device == "cuda" and recipe.model.precision == "auto" and precision.compute == "float32":
        yield (
            f"{machine.name} has no bf16 and {family.label} overflows fp16: matrix products run in fp32, several times "
            "slower than on a GPU with bf16."
        )
    if precision.residual_exponent and machine.device == "cpu":
        yield "A CPU multiplies fp16 up to a hundred times slower than fp32: good for a proof, not for training."
    elif precision.residual_exponent:
        yield (
            f"fp16_rescaled was proved on the real Gemma 3 270M on a CPU (docs/precision.md) and never ran on "
            f"{machine.name}: the run stops where a loss is not finite."
        )
    if machine.device == "cpu" and not machine.bf16 and precision.compute == "bfloat16":
        yield f"{machine.name} emulates bf16: model.precision: auto would take fp32, which is faster here."
    if recipe.model.quantization == "int8":
        yield (
            "LLM.int8() multiplies in 8 bits and casts what enters a layer to fp16 whatever the compute type; "
            f"nf4 keeps to {precision.compute} and needs half the memory."
        )


def _adapter(recipe: Recipe, start: Start | None) -> Iterator[str]:
    if recipe.adapter is None or recipe.stage != "sft":
        return
    if start is not None and continues(recipe):
        if start.dora and start.dropout:
            yield "The saved adapter is DoRA with dropout, which keeps an fp32 copy of every adapted weight."
    elif recipe.adapter.dora and recipe.adapter.dropout:
        yield "DoRA with dropout keeps an fp32 copy of every adapted weight: adapter.dropout: 0 needs far less memory."


def _reference(recipe: Recipe) -> Iterator[str]:
    if has_reference(recipe.stage):
        begun = recipe.model.adapter
        who = f"the adapter in {begun} as it is now, frozen" if begun else "the base with the new adapter switched off"
        yield f"The reference is {who}: no second model is loaded."


def _ppo(recipe: Recipe) -> Iterator[str]:
    ppo = recipe.ppo
    if recipe.stage != "ppo":
        return
    if ppo.estimator == "gae":
        own = f"a copy of the reward model in {ppo.judge}" if ppo.judge else "a new adapter and a head that says 0"
        yield f"The critic begins as {own if ppo.critic == 'adapter' else 'a head on the policy that says 0'}."
    if ppo.top_k or ppo.top_p < 1:
        yield (
            "Responses are drawn from the likeliest tokens only (ppo.top_k, ppo.top_p), and log-probabilities are "
            "those of all: the policy's gradient is biased by what cannot be drawn."
        )


def _not_quantised(recipe: Recipe, shape: Shape, parameters: Parameters, precision: Precision) -> Iterator[str]:
    """What bitsandbytes leaves as it is, where it is most of the model."""
    if recipe.model.quantization == "none":
        return
    wide, bits = BYTES[precision.weights], 8 * BYTES[precision.weights]
    share = parameters.experts / parameters.text
    if parameters.experts:
        yield (
            f"{share:.0%} of the weights are experts that bitsandbytes does not quantise (three-dimensional tensors): "
            f"they stay in {bits} bits and need {gib(parameters.experts * wide)}; adapters do not reach them."
        )
    tables = parameters.embedding + parameters.per_layer_embedding
    if tables > parameters.text / 3:
        yield (
            f"{tables / parameters.text:.0%} of the weights are embeddings, which stay in {bits} bits: "
            f"{gib(tables * wide)}."
        )


def _towers(recipe: Recipe, parameters: Parameters, precision: Precision) -> Iterator[str]:
    if recipe.model.text_only:
        return
    if parameters.towers is None:
        yield "The size of this checkpoint's vision and audio towers is unknown and not in the estimate."
    elif parameters.towers:
        size = gib(parameters.towers * BYTES[precision.weights])
        yield f"Vision and audio towers are loaded and not trained; model.text_only: true saves up to {size}."


def _sharing(recipe: Recipe, launch: Launch, sharding: Sharding) -> Iterator[str]:
    if sharding.sharded and sharding.shards == 1:
        yield "FSDP of one process: it holds everything, and only takes longer; good for trying it out."
    if sharding.offload:
        yield "distributed.offload: parameters cross the PCIe bus in each pass, and the optimizer runs on the CPU."
    if launch.fsdp is not None and not sharding.sharded:
        yield "The launcher asks for FSDP and the recipe for ddp: the recipe decides."
    if sharding.strategy == "fsdp2" and launch.nodes > 1:
        yield (
            f"Each layer is gathered over the network between {launch.nodes} nodes, in each pass; with "
            "distributed.strategy: hsdp only gradients are sent there."
        )
    if sharding.sharded and recipe.model.quantization == "none" and recipe.adapter is None:
        yield "All weights are trained in parts: the result is gathered into one folder on the first process."


def _devices(recipe: Recipe, machine: Machine, processes: int) -> Iterator[str]:
    gpus = machine.gpus * machine.nodes
    if gpus <= processes:
        return
    idle = f"{processes} of {gpus} GPUs will work"
    if not can_split(recipe, gpus):
        micro = recipe.batch.micro
        finer = recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"micro": "auto"})})
        by = f" in passes of batch.micro {micro}" if micro != "auto" and can_split(finer, gpus) else ""
        yield f"{idle}: batch.size {recipe.batch.size} cannot be split over all of them{by}."
    else:
        yield f"{idle}; all of them: torchrun --nproc-per-node {machine.gpus} -m gemma_tune {recipe.stage} RECIPE."


def _run(recipe: Recipe) -> Iterator[str]:
    if recipe.data.holdout == 0:
        missing = "figures" if recipe.stage == "reward" else "loss and no held-out samples"
        yield f"data.holdout is 0: there will be no held-out {missing}."
    if recipe.optim.max_steps is not None and "epochs" in recipe.optim.model_fields_set:
        yield f"optim.max_steps {recipe.optim.max_steps} ends the run, whatever optim.epochs says."
    if recipe.advanced.trainer:
        config = CONFIGS[recipe.stage].rpartition(".")[2]
        yield f"Unchecked: {', '.join(sorted(recipe.advanced.trainer))} go to {config} as they are."
