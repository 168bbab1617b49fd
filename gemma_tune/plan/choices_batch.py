"""Rows in a pass, accumulation, and recomputation: what the memory estimate decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_model import BYTES, Precision, choose_attention, lora_choices
from gemma_tune.plan.machine import GIB, Machine
from gemma_tune.plan.memory import estimate, phases, total
from gemma_tune.plan.sharding import Sharding
from gemma_tune.plan.stages import continues, group, has_reference, least_micro, updates
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import Choice
from gemma_tune.plan.workload import Roles, Workload
from gemma_tune.recipe.schema import Adapter, Recipe

# Share of the memory that the estimate may fill: it is an estimate, and others use the device too.
BUDGET = 0.9
# Tokens in one pass. Below the first number a GPU's units and the dequantisation of weights are not paid off, so
# recomputing for larger passes is worth it; above the second, larger passes only cost memory. A CPU gains nothing
# from more than the first.
ENOUGH_TOKENS = 2048
MOST_TOKENS = {"cuda": 16_384, "cpu": 2048}
# Responses that a rollout of PPO draws at a time, at most. Each step reads all weights once, however many there are.
MOST_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Batch:
    """How a global batch is worked off, and the workload of one pass.

    `evaluation`: rows in a pass without a gradient; in PPO, responses that are drawn at a time.
    """

    micro: Choice
    accumulation: Choice
    checkpointing: Choice
    evaluation: Choice
    work: Workload


def gib(size: float) -> str:
    """Bytes as people read them: `7.9 GiB`."""
    return f"{size / GIB:.1f} GiB"


def accumulation_steps(size: int, micro: int, processes: int, least: int = 1, minibatches: int = 1) -> int:
    """Passes of one process over the rows of a step; a pass cannot have fewer than `least` rows.

    Raises:
        UserError: `size` is not a multiple of what all processes take in one pass of each minibatch.
    """
    step = micro * processes * minibatches
    if size % step == 0:
        return size // (micro * processes)
    nearest = [multiple for multiple in (size // step * step, (size // step + 1) * step) if multiple]
    parts = f" x {minibatches} minibatches" if minibatches > 1 else ""
    raise UserError(
        f"batch.size {size} cannot be split: {processes} {'process' if processes == 1 else 'processes'} x "
        f"micro {micro}{parts} = {step} does not divide {size}. Nearest: {' or '.join(map(str, nearest))}.",
        fix=f"set batch.size: {nearest[-1]}" + (", or a smaller batch.micro" if micro > least else ""),
    )


def check_groups(recipe: Recipe, processes: int) -> None:
    """The responses to one prompt are compared with each other, so that one process must have them all.

    Raises:
        UserError: they cannot be dealt out to the processes.
    """
    size, together = recipe.batch.size, group(recipe)
    step = processes * together
    if together > 1 and size % step:
        nearest = [multiple for multiple in (size // step * step, (size // step + 1) * step) if multiple]
        raise UserError(
            f"batch.size {size} cannot be split: {processes} processes x {together} responses to a prompt = {step} "
            f"does not divide {size}. Nearest: {' or '.join(map(str, nearest))}.",
            fix=f"set batch.size: {nearest[-1]}",
        )


def can_split(recipe: Recipe, processes: int) -> bool:
    """Whether so many processes can share the global batch."""
    micro = least_micro(recipe.stage) if recipe.batch.micro == "auto" else recipe.batch.micro
    size = recipe.batch.size
    return size % (processes * micro * updates(recipe)) == 0 and size % (processes * group(recipe)) == 0


def most_processes(recipe: Recipe, machine: Machine) -> int:
    """As many processes, one a device, as the global batch can be split over: what one would start on that machine."""
    most = min(machine.world_size, recipe.batch.size)
    counts = range(most - most % machine.nodes, machine.nodes - 1, -machine.nodes)  # as many on each node
    return next((count for count in counts if can_split(recipe, count)), 1)


def workload(
    recipe: Recipe,
    machine: Machine,
    family: Family,
    precision: Precision,
    optimizer: str,
    start: Start | None,
    rewards: Sequence[Start],
    world_size: int,
    sharding: Sharding | None = None,
) -> Workload:
    """What decides about memory, for one row in a pass and without recomputation. Whole copies without `sharding`."""
    sharded = sharding is not None and sharding.sharded
    lora = lora_choices(recipe, family, start)
    saved = start is not None and continues(recipe)
    # DPO, KTO and PPO keep a copy of what they begin with as reference; what lies below a new one is always frozen.
    frozen = start is not None and (has_reference(recipe.stage) or not saved)
    silent = recipe.stage != "sft"
    return Workload(
        stage=recipe.stage,
        device=machine.device,
        quantization=recipe.model.quantization,
        double_quantization=recipe.model.double_quantization,
        weight_bytes=BYTES[precision.weights],
        compute_bytes=BYTES[precision.compute],
        autocast=precision.autocast is not None,
        rank=lora["r"].value if lora else 0,
        targets=start.targets if start and saved else recipe.adapter.targets if recipe.adapter else "all-linear",
        dropout=bool(lora and lora["lora_dropout"].value and not silent),
        dora=bool(lora and lora["use_dora"].value),
        frozen_rank=start.rank if start and frozen else 0,
        frozen_targets=start.targets if start and frozen else "all-linear",
        optimizer=optimizer,
        rows=1,
        length=recipe.data.max_length,
        masked=True,
        attention=choose_attention(recipe, family).value,
        checkpointing=False,
        world_size=world_size,
        shards=sharding.shards if sharding and sharded else 0,
        reshard=sharding.reshard_after_forward if sharding and sharded else True,
        offload=sharding.offload if sharding and sharded else False,
        roles=_roles(recipe, rewards, world_size) if recipe.stage == "ppo" else None,
    )


def _roles(recipe: Recipe, rewards: Sequence[Start], world_size: int) -> Roles:
    """The critic is a copy of the first reward model that rewards; without one it is as the recipe's `adapter`."""
    ppo = recipe.ppo
    critic = ppo.critic if ppo.estimator == "gae" else None
    rank, targets = 0, "all-linear"
    if critic == "adapter":
        new = recipe.adapter or Adapter()
        copied = rewards[ppo.models.index(ppo.judge)] if ppo.judge else None
        rank, targets = (copied.rank, copied.targets) if copied else (new.r, new.targets)
    return Roles(
        critic=critic,
        critic_rank=rank,
        critic_targets=targets,
        rewards=tuple((reward.rank, reward.targets) for reward in rewards),
        together=min(MOST_TOGETHER, max(1, recipe.batch.size // world_size)),
        prompt=recipe.data.max_length - ppo.max_new_tokens,
    )


def choose_batch(recipe: Recipe, machine: Machine, shape: Shape, work: Workload) -> Batch:
    """Micro batch, accumulation and checkpointing, each the recipe's or derived from the estimate.

    Raises:
        UserError: the global batch cannot be split.
    """
    size, processes, parts = recipe.batch.size, work.world_size, updates(recipe)
    least = least_micro(recipe.stage)
    check_groups(recipe, processes)
    if recipe.batch.micro == "auto":
        rows = _powers_of_two(accumulation_steps(size, least, processes, least, parts) * least // parts)
        rows = [row for row in rows if row >= least]
        rows = [row for row in rows if row == least or row * work.tokens <= MOST_TOKENS[work.device]]
    else:
        accumulation_steps(size, recipe.batch.micro, processes, least, parts)
        rows = [recipe.batch.micro]
    asked = recipe.memory.gradient_checkpointing
    modes = [False, True] if asked == "auto" else [asked]
    work = _drawn_together(shape, replace(work, rows=rows[0], checkpointing=modes[-1]), machine)
    work = _best(shape, work, rows, modes, machine)
    steps = accumulation_steps(size, work.rows, processes, least, parts)
    return Batch(
        micro=_micro_reason(recipe, machine, shape, work, rows),
        accumulation=Choice(steps, f"batch.size {size} = {processes} x {work.rows} x {steps}{_of_pairs(work)}"),
        checkpointing=_checkpointing_reason(recipe, machine, shape, work, rows),
        evaluation=_evaluation_reason(shape, work),
        work=work,
    )


def _drawn_together(shape: Shape, work: Workload, machine: Machine) -> Workload:
    """`work` with as many responses drawn at a time as fit beside its smallest pass, in halves of what there are."""
    while work.roles and work.roles.together > 1 and not fits(shape, work, machine):
        work = replace(work, roles=replace(work.roles, together=(work.roles.together + 1) // 2))
    return work


def _evaluation_reason(shape: Shape, work: Workload) -> Choice:
    if not work.roles:
        return Choice(work.rows, "as in training; evaluation keeps no activations")
    held = {name: gib(total(terms)) for name, terms in phases(shape, work).items()}
    return Choice(
        work.roles.together,
        f"responses that are drawn at a time, {MOST_TOGETHER} at most: {held['rollout']} for a rollout, and at another "
        f"time {held['training']} for a pass of the training",
    )


def _of_pairs(work: Workload) -> str:
    """What a pass of pairs holds; empty where a row is one sequence."""
    if work.sequences == work.rows:
        return ""
    return f" pairs; a pass holds {work.rows} {'pair' if work.rows == 1 else 'pairs'} x 2 sequences"


def _powers_of_two(number: int) -> list[int]:
    """Powers of two that divide `number`, ascending."""
    return [2**power for power in range(number.bit_length()) if number % 2**power == 0]


def fits(shape: Shape, work: Workload, machine: Machine) -> bool:
    """Whether the estimate stays within the budget of this machine."""
    return total(estimate(shape, work)) <= BUDGET * machine.memory_bytes


def _best(shape: Shape, work: Workload, rows: list[int], modes: list[bool], machine: Machine) -> Workload:
    """Without recomputation where a pass of a useful size fits, otherwise whatever takes more rows."""
    found: dict[bool, Workload] = {}
    for checkpointing in modes:
        tried = [replace(work, rows=row, checkpointing=checkpointing) for row in rows]
        fitting = [candidate for candidate in tried if fits(shape, candidate, machine)]
        if fitting:
            found[checkpointing] = fitting[-1]
    if not found:  # nothing fits: plan the smallest, and say so
        return replace(work, rows=rows[0], checkpointing=modes[-1])
    plain, recomputed = found.get(False), found.get(True)
    if plain is None or recomputed is None:
        return next(iter(found.values()))
    useful = plain.tokens >= ENOUGH_TOKENS or plain.rows == rows[-1]
    return plain if useful or plain.rows == recomputed.rows else recomputed


def _micro_reason(recipe: Recipe, machine: Machine, shape: Shape, work: Workload, rows: list[int]) -> Choice:
    if recipe.batch.micro != "auto":
        return Choice(work.rows, "recipe")
    if not fits(shape, work, machine):
        return Choice(work.rows, "the smallest; even so the estimate exceeds the memory")
    need = gib(total(estimate(shape, work)))
    room = f"{need} of {gib(machine.memory_bytes)}"
    if work.rows < rows[-1]:
        return Choice(work.rows, f"the largest power of two that fits in {BUDGET:.0%} of the memory: {room}")
    share = recipe.batch.size // work.world_size // updates(recipe)
    if work.tokens * 2 > MOST_TOKENS[work.device] and share % (work.rows * 2) == 0:
        return Choice(work.rows, f"{work.tokens:,} tokens a pass keep a {_unit(work)} busy: {room}")
    a_process = "a process" if updates(recipe) == 1 else "of a minibatch and process"
    return Choice(work.rows, f"the largest power of two that divides {share} {work.unit}s {a_process}: {room}")


def _unit(work: Workload) -> str:
    return "GPU" if work.device == "cuda" else "CPU"


def _checkpointing_reason(recipe: Recipe, machine: Machine, shape: Shape, work: Workload, rows: list[int]) -> Choice:
    if recipe.memory.gradient_checkpointing != "auto":
        return Choice(work.checkpointing, "recipe")
    room = gib(machine.memory_bytes)
    if not work.checkpointing:
        need = gib(total(estimate(shape, work)))
        return Choice(False, f"{need} without recomputation fit in {room}, so recomputing would only cost time")
    plain = [replace(work, rows=row, checkpointing=False) for row in rows]
    fitting = [candidate.rows for candidate in plain if fits(shape, candidate, machine)]
    if fitting:
        return Choice(
            True,
            f"without recomputation a pass would hold {fitting[-1]} of {work.rows} {work.unit}s: too few to be fast",
        )
    need = gib(total(estimate(shape, plain[0])))
    unit = f"1 {work.unit} needs" if plain[0].rows == 1 else f"{plain[0].rows} {work.unit}s need"
    return Choice(True, f"without recomputation {unit} {need}, with {BUDGET:.0%} of {room} to use")
