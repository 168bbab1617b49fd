"""Rows in a pass, accumulation, and recomputation: what the memory estimate decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_model import BYTES, Precision, choose_attention, lora_choices
from gemma_tune.plan.machine import GIB, Machine
from gemma_tune.plan.memory import Workload, estimate, total
from gemma_tune.plan.stages import continues, has_reference, least_micro
from gemma_tune.plan.starts import Start
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Recipe

# Share of the memory that the estimate may fill: it is an estimate, and others use the device too.
BUDGET = 0.9
# Tokens in one pass. Below the first number a GPU's units and the dequantisation of weights are not paid off, so
# recomputing for larger passes is worth it; above the second, larger passes only cost memory. A CPU gains nothing
# from more than the first.
ENOUGH_TOKENS = 2048
MOST_TOKENS = {"cuda": 16_384, "cpu": 2048}


@dataclass(frozen=True, slots=True)
class Batch:
    """How a global batch is worked off, and the workload of one pass."""

    micro: Choice
    accumulation: Choice
    checkpointing: Choice
    work: Workload


def gib(size: float) -> str:
    """Bytes as people read them: `7.9 GiB`."""
    return f"{size / GIB:.1f} GiB"


def accumulation_steps(size: int, micro: int, processes: int, least: int = 1) -> int:
    """Passes of one process in an optimizer step; a pass cannot have fewer than `least` rows.

    Raises:
        UserError: `size` is not a multiple of what all processes take in one pass.
    """
    step = micro * processes
    if size % step == 0:
        return size // step
    nearest = [multiple for multiple in (size // step * step, (size // step + 1) * step) if multiple]
    raise UserError(
        f"batch.size {size} cannot be split: {processes} {'process' if processes == 1 else 'processes'} x "
        f"micro {micro} = {step} does not divide {size}. Nearest: {' or '.join(map(str, nearest))}.",
        fix=f"set batch.size: {nearest[-1]}" + (", or a smaller batch.micro" if micro > least else ""),
    )


def most_processes(recipe: Recipe, machine: Machine) -> int:
    """As many processes, one a device, as the global batch can be split over: what one would start on that machine."""
    micro = least_micro(recipe.stage) if recipe.batch.micro == "auto" else recipe.batch.micro
    fitting = (count for count in range(machine.world_size, 1, -1) if recipe.batch.size % (count * micro) == 0)
    return next(fitting, 1)


def workload(
    recipe: Recipe,
    machine: Machine,
    family: Family,
    precision: Precision,
    optimizer: str,
    start: Start | None,
    world_size: int,
) -> Workload:
    """What decides about memory, for one row in a pass and without recomputation."""
    lora = lora_choices(recipe, family, start)
    saved = start is not None and continues(recipe)
    # A copy of what DPO and KTO begin with is their reference; an adapter below a new one is frozen in every stage.
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
    )


def choose_batch(recipe: Recipe, machine: Machine, shape: Shape, work: Workload) -> Batch:
    """Micro batch, accumulation and checkpointing, each the recipe's or derived from the estimate.

    Raises:
        UserError: the global batch cannot be split.
    """
    size, processes = recipe.batch.size, work.world_size
    least = least_micro(recipe.stage)
    if recipe.batch.micro == "auto":
        rows = _powers_of_two(accumulation_steps(size, least, processes, least) * least)
        rows = [row for row in rows if row >= least]
        rows = [row for row in rows if row == least or row * work.tokens <= MOST_TOKENS[work.device]]
    else:
        accumulation_steps(size, recipe.batch.micro, processes, least)
        rows = [recipe.batch.micro]
    asked = recipe.memory.gradient_checkpointing
    work = _best(shape, work, rows, [False, True] if asked == "auto" else [asked], machine)
    steps = accumulation_steps(size, work.rows, processes)
    return Batch(
        micro=_micro_reason(recipe, machine, shape, work, rows),
        accumulation=Choice(steps, f"batch.size {size} = {processes} x {work.rows} x {steps}{_of_pairs(work)}"),
        checkpointing=_checkpointing_reason(recipe, machine, shape, work, rows),
        work=work,
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
    share = recipe.batch.size // work.world_size
    if work.tokens * 2 > MOST_TOKENS[work.device] and share % (work.rows * 2) == 0:
        return Choice(work.rows, f"{work.tokens:,} tokens a pass keep a {_unit(work)} busy: {room}")
    return Choice(work.rows, f"the largest power of two that divides {share} {work.unit}s a process: {room}")


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
