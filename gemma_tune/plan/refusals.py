"""Combinations that cannot be right, found before anything is loaded; all of them at once."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_tune.errors import AccessError, Problem, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.shape import Shape
from gemma_tune.plan.choices_trainer import fixed
from gemma_tune.plan.machine import Launch, Machine
from gemma_tune.plan.stages import continues
from gemma_tune.plan.starts import Start
from gemma_tune.recipe.rules import clashes
from gemma_tune.recipe.schema import Recipe


def check_combination(
    recipe: Recipe, machine: Machine, shape: Shape, family: Family, start: Start | None, launch: Launch
) -> None:
    """Refuse what this recipe asks of this Gemma or of this machine and cannot have.

    Raises:
        UserError: the recipe contradicts itself or the model.
        AccessError: only the machine stands in the way.
    """
    of_recipe = [*_recipe(recipe), *_model(recipe, shape, family), *_launch(recipe, launch)]
    of_machine = list(_machine(recipe, machine, start))
    if of_recipe:
        raise UserError.of([*of_recipe, *of_machine])
    if of_machine:
        raise AccessError.of(of_machine)


def _recipe(recipe: Recipe) -> Iterator[Problem]:
    """What contradicts itself in the recipe alone. The strict reader has said so before, with line numbers."""
    for clash in clashes(recipe, lambda key: "recipe"):
        yield Problem(clash.what, clash.keys[0], clash.fix)
    if recipe.adapter is not None and recipe.adapter.dropout == 1:
        yield Problem("a dropout of 1 drops all that the adapter sees", "adapter.dropout", "0.05 is usual, 0 is faster")
    if recipe.optim.warmup_ratio == 1:  # transformers would read 1 as one step
        yield Problem("a warm-up over all steps never reaches the learning rate", "optim.warmup_ratio", "below 1")
    for key in recipe.advanced.trainer:
        if why := fixed(recipe.stage).get(key):
            yield Problem(f"'{key}' is fixed: {why}", f"advanced.trainer.{key}", "remove it")


def _model(recipe: Recipe, shape: Shape, family: Family) -> Iterator[Problem]:
    attention, precision = recipe.model.attention, recipe.model.precision
    if attention != "auto" and attention not in family.attention:
        yield Problem(
            f"{family.label} cannot use {attention}{_why_not(attention, family)}",
            "model.attention",
            f"set model.attention: auto, or one of: {', '.join(family.attention)}",
        )
    if precision == "fp16" and family.fp16 != "plain":
        yield Problem(
            f"{family.label} overflows fp16 (it ends at 65,504) and the loss becomes NaN",
            "model.precision",
            "set model.precision: auto" + (", or fp16_rescaled" if family.fp16 == "rescaled" else ""),
        )
    if precision == "fp16_rescaled" and family.fp16 != "rescaled":
        yield Problem(
            f"the residual stream of {family.label} cannot be rescaled: more than RMS norms reads or writes it",
            "model.precision",
            "set model.precision: auto" + (", or fp16" if family.fp16 == "plain" else ""),
        )
    if attention == "flash_attention_2" and precision == "fp32":
        yield Problem("FlashAttention computes in 16 bits only", "model.attention", "set model.attention: auto")
    if recipe.data.max_length > shape.max_positions:
        yield Problem(
            f"max_length {recipe.data.max_length:,} is longer than the {shape.max_positions:,} positions of this model",
            "data.max_length",
            f"at most {shape.max_positions:,}",
        )


def _why_not(attention: str, family: Family) -> str:
    if attention == "sdpa" and family.attention_softcap is not None:
        return f": its attention scores are capped at {family.attention_softcap:g}, which sdpa cannot do"
    if attention == "flash_attention_2":
        return ": its global layers have heads of 512, and FlashAttention 2 ends at 256"
    return ""


def _launch(recipe: Recipe, launch: Launch) -> Iterator[Problem]:
    """What a launcher's file asks for and no recipe can make work."""
    if launch.other:
        yield Problem(
            f"the launcher asks for {launch.other}, which is not supported",
            "--config_file",
            "use a file of accelerate_configs/, or torchrun",
        )
    if launch.fsdp not in (None, 2) and recipe.distributed.strategy == "auto":
        yield Problem(
            f"the launcher asks for version {launch.fsdp} of FSDP, which transformers gives up and whose checkpoints "
            "crashed here",
            "--config_file",
            "set fsdp_version: 2 in its file, or distributed.strategy in the recipe",
        )
    if recipe.adapter is None and "accelerator_config" in recipe.advanced.trainer:
        yield Problem(
            "accelerator_config is the plan's where all weights are trained: it says when gradients are summed up",
            "advanced.trainer.accelerator_config",
            "remove it",
        )


def _machine(recipe: Recipe, machine: Machine, start: Start | None) -> Iterator[Problem]:
    precision = recipe.model.precision
    saved = start is not None and continues(recipe)
    dora = start.dora if start is not None and saved else recipe.adapter is not None and recipe.adapter.dora
    if recipe.model.attention == "flash_attention_2" and not machine.flash_attention:
        yield Problem(
            f"{machine.name} cannot run FlashAttention 2, which needs an Ampere GPU or a newer one",
            "model.attention",
            "set model.attention: auto",
        )
    if precision == "fp16" and machine.device == "cpu":
        yield Problem(
            "fp16 training needs a GPU: its autocast does not exist on a CPU",
            "model.precision",
            "set model.precision: auto",
        )
    if precision == "fp16_rescaled" and machine.device == "cpu" and recipe.adapter is None:
        yield Problem(
            "all weights are trained under autocast, which accelerate has not for fp16 on a CPU",
            "model.precision",
            "set model.precision: auto, or train an adapter",
        )
    if machine.device == "cpu" and recipe.model.quantization == "int8" and dora:
        # peft 0.21's dequantize_module_weight moves a CPU weight "back", and the copy has lost its scales.
        yield Problem(
            "DoRA on int8 weights fails on a CPU: after the first pass the weights' scales are gone",
            "model.adapter" if saved else "adapter.dora",
            "set model.quantization: nf4" + ("" if saved else ", or adapter.dora: false"),
        )
    if precision == "bf16" and machine.device == "cuda" and not machine.bf16:
        yield Problem(f"{machine.name} has no bf16", "model.precision", "set model.precision: auto")
