"""Recipe x mesh -> plan. Pure, and without JAX. What tunix and qwix cannot do as the recipe says is refused here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gemma_tune.errors import Problem, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_batch import accumulation_steps
from gemma_tune.plan.choices_data import data_choices
from gemma_tune.plan.choices_model import choose_attention, new_lora
from gemma_tune.plan.stages import written
from gemma_tune.plan.types import Choice, Plan
from gemma_tune.recipe.schema import Recipe

FAMILIES = ("gemma1", "gemma2", "gemma3_text", "gemma3")
"""Generations whose decoder is connected. tunix 0.1.7 has Gemma 4's too, which nobody has held against torch here."""
BLOCK = 64
"""Weights that share a constant in NF4, as in bitsandbytes."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many chips share the rows and the weights (`fsdp`), and how many the heads and columns (`tp`)."""

    fsdp: int
    tp: int = 1

    @property
    def chips(self) -> int:
        return self.fsdp * self.tp

    def __str__(self) -> str:
        return f"fsdp={self.fsdp},tp={self.tp}"


def read_mesh(text: str | None, chips: int) -> Mesh:
    """`fsdp=4,tp=2` -> a mesh of all chips; one axis may be left out. Without a text all chips are `fsdp`.

    Raises:
        UserError: not of this form, or another number of chips.
    """
    found = dict(re.findall(r"(fsdp|tp)=([1-9]\d*)", text or ""))
    if text and ",".join(f"{axis}={size}" for axis, size in found.items()) != text.replace(" ", ""):
        raise UserError(f"'{text}' is no mesh", where="--mesh", fix="write fsdp=8, or fsdp=4,tp=2")
    sizes = {axis: int(size) for axis, size in found.items()}
    tp = sizes.get("tp") or (chips // sizes["fsdp"] if sizes.get("fsdp") and not chips % sizes["fsdp"] else 1)
    mesh = Mesh(sizes.get("fsdp") or max(chips // tp, 1), tp)
    if mesh.chips != chips:
        raise UserError(
            f"a mesh of {mesh} has {mesh.chips} chips, and there are {chips}",
            where="--mesh",
            fix=f"fsdp x tp must be {chips}, e.g. fsdp={chips}",
        )
    return mesh


@dataclass(frozen=True, slots=True)
class Topology:
    """Chips that can be compiled for: their `name` in XLA, how many, and the memory of one."""

    name: str
    chips: int
    bytes: int


# Memory: cloud.google.com/tpu/docs/v5e, v5p, v6e (16, 95 and 32 GB a chip).
TOPOLOGIES = {
    "v5e-4": Topology("v5e:2x2", 4, 16 * 2**30),
    "v5e-8": Topology("v5e:2x4", 8, 16 * 2**30),
    "v5p-8": Topology("v5p:2x2x1", 4, 95 * 2**30),
    "v6e-8": Topology("v6e:2x4", 8, 32 * 2**30),
}


def named_topology(name: str) -> Topology:
    """A row of the table.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TOPOLOGIES:
        raise UserError(f"unknown TPU '{name}'", where="--machine", fix=f"one of: {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]


def make_tpu_plan(recipe: Recipe, family: Family, shape: Shape, mesh: Mesh, device: str) -> Plan:
    """Everything that a run of `recipe` needs on these chips. Sections and keys are those of a plan for torch.

    Args:
        recipe: what the user wrote.
        family, shape: of its model (`plan.facts.model_facts`).
        mesh: the chips.
        device: what JAX calls one chip, for the record.

    Raises:
        UserError: the recipe asks for what is not there on a TPU; names all of it at once.
    """
    if problems := [*_refused(recipe, family, shape)]:
        raise UserError.of(problems)
    optim = recipe.optim
    micro = mesh.fsdp * (1 if recipe.batch.micro == "auto" else recipe.batch.micro)
    why = "one row a chip" if recipe.batch.micro == "auto" else "batch.micro rows a chip"
    dtype = "float32" if recipe.model.precision == "fp32" else "bfloat16"
    trainer = {
        "learning_rate": written(recipe, "optim.learning_rate"),
        "lr_scheduler_type": written(recipe, "optim.schedule"),
        "warmup_steps": written(recipe, "optim.warmup_ratio"),
        "num_train_epochs": written(recipe, "optim.epochs"),
        "max_steps": Choice(optim.max_steps or -1, "recipe" if optim.max_steps else "default: optim.epochs decides"),
        "optim": Choice("adamw", "optax.adamw, the same formula as torch's AdamW"),
        "weight_decay": written(recipe, "optim.weight_decay"),
        "max_grad_norm": written(recipe, "optim.max_grad_norm"),
        "adam_beta1": written(recipe, "optim.beta1"),
        "adam_beta2": written(recipe, "optim.beta2"),
        "adam_epsilon": written(recipe, "optim.epsilon"),
        "per_device_train_batch_size": Choice(micro, f"rows in a pass of all chips: {why}, fsdp {mesh.fsdp}"),
        "gradient_accumulation_steps": Choice(
            accumulation_steps(recipe.batch.size, micro, 1), f"batch.size {recipe.batch.size}"
        ),
        "gradient_checkpointing": Choice(
            recipe.memory.gradient_checkpointing is not False,
            "a layer at a time: TPUs have more arithmetic than memory"
            if recipe.memory.gradient_checkpointing == "auto"
            else "recipe",
        ),
    }
    session: dict[str, Any] = {
        "output": written(recipe, "output"),
        "seed": written(recipe, "seed"),
        "adapter": Choice({"start": None, "mode": None}, "a new one is trained"),
        "evaluation": Choice(recipe.evaluation.model_dump(), "every: a tenth of the steps where it is not written"),
        "checkpoint": Choice(recipe.checkpoint.model_dump(), "every: a tenth of the steps where it is not written"),
        "tracking": Choice({"log_every": recipe.tracking.log_every}, "recipe or default"),
    }
    return Plan(
        stage="sft",
        family=family.name,
        machine={"name": device, "device": "tpu", "mesh": {"fsdp": mesh.fsdp, "tp": mesh.tp}, "world_size": 1},
        model={
            "name": written(recipe, "model.name"),
            "revision": written(recipe, "model.revision"),
            "tokenizer": written(recipe, "model.tokenizer"),
            "text_only": written(recipe, "model.text_only"),
            "dtype": Choice(dtype, "recipe" if recipe.model.precision != "auto" else "what TPUs multiply"),
            "attn_implementation": choose_attention(recipe, family),
        },
        quantization=_quantization(recipe, dtype),
        lora=new_lora(recipe, family),
        trainer=trainer,
        data=data_choices(recipe),
        session=session,
        notes=tuple(_notes(recipe)),
    )


def _quantization(recipe: Recipe, dtype: str) -> dict[str, Choice]:
    """Under bitsandbytes' names, so that torch opens the run with the same base: the values of both are equal."""
    if recipe.model.quantization != "nf4":
        return {}
    return {
        "load_in_4bit": Choice(True, f"model.quantization: nf4, by qwix in blocks of {BLOCK}, as bitsandbytes has it"),
        "bnb_4bit_quant_type": Choice("nf4", "QLoRA (arXiv 2305.14314)"),
        "bnb_4bit_use_double_quant": Choice(False, "qwix has none: the constants stay fp32, 0.4 bit a parameter more"),
        "bnb_4bit_compute_dtype": Choice(dtype, "as the base"),
    }


def _notes(recipe: Recipe) -> Iterator[str]:
    if recipe.model.quantization == "nf4" and recipe.model.double_quantization:
        yield "The constants of NF4 stay fp32: qwix has no double quantisation."
    if recipe.distributed.model_fields_set:
        yield "The section distributed is torch's; on a TPU --mesh says how chips share the work."
    if recipe.samples.prompts or recipe.samples.held_out:
        yield "No answers are sampled on a TPU; gemma-tune chat opens the finished run with torch."


def _refused(recipe: Recipe, family: Family, shape: Shape) -> Iterator[Problem]:
    other = "train this one with torch"
    if recipe.stage != "sft":
        yield Problem(f"stage {recipe.stage} does not run on a TPU", "stage", "only sft does")
    if family.name not in FAMILIES:
        yield Problem(f"{family.label} is not connected to tunix", "model.name", "use Gemma 1, 2 or 3")
    if not shape.tied:
        yield Problem("this model has an output head of its own, and tunix's has none", "model.name", other)
    if recipe.model.precision in ("fp16", "fp16_rescaled"):
        yield Problem("TPUs have no fp16", "model.precision", "set model.precision: auto")
    if recipe.model.quantization == "int8":
        yield Problem(
            "qwix's int8 is not LLM.int8(): other scales, no outliers in 16 bits",
            "model.quantization",
            "set model.quantization: nf4 or none",
        )
    if recipe.model.quantization == "nf4" and any(size % BLOCK for size in _widths(shape)):
        yield Problem(f"a width is no multiple of {BLOCK}", "model.quantization", "set model.quantization: none")
    if recipe.model.adapter:
        yield Problem("a TPU run begins with a new adapter", "model.adapter", f"remove it, or {other}")
    if recipe.adapter is None:
        yield Problem("only adapters are trained on a TPU", "adapter", "add `adapter: {r: 16, alpha: 32}`")
    elif recipe.adapter.dora:
        yield Problem("DoRA is not there on a TPU", "adapter.dora", "set adapter.dora: false")
    if recipe.optim.optimizer not in ("auto", "adamw_torch"):
        yield Problem(f"{recipe.optim.optimizer} has no equal in optax", "optim.optimizer", "set optim.optimizer: auto")
    if recipe.data.streaming:
        yield Problem("streams are not read on a TPU", "data.streaming", "set data.streaming: false")
    if recipe.tracking.wandb:
        yield Problem("W&B is not connected on a TPU", "tracking.wandb", "remove it; metrics.jsonl has all figures")
    if recipe.advanced.trainer:
        yield Problem("there is no trainer of TRL to take them", "advanced.trainer", "remove it")
    if recipe.data.max_length > shape.max_positions:
        yield Problem(
            f"max_length {recipe.data.max_length:,} is longer than the {shape.max_positions:,} positions of this model",
            "data.max_length",
            f"at most {shape.max_positions:,}",
        )


def _widths(shape: Shape) -> tuple[int, ...]:
    middle = shape.intermediate if isinstance(shape.intermediate, tuple) else (shape.intermediate,)
    return (shape.hidden, shape.heads * shape.head_dim, *middle)


def total_steps(rows: int, size: int, epochs: float, max_steps: int) -> int:
    """Optimizer steps of a run, as transformers 5.23 counts them (`Trainer.set_initial_training_values`)."""
    return max_steps if max_steps > 0 else math.ceil(epochs * -(-rows // size))
