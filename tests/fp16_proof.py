"""Gemma 3 270M in fp16, held against fp32: the tables of docs/precision.md. `python -m tests.fp16_proof` makes them.

Each column is a run of the package's own trainer (QLoRA, NF4) on the same rows, with nothing but its precision changed.
The base, activations and their gradients have that type, adapters are fp32, and products are those of tensor cores
(`tests.half_products`). Plain fp16, which no plan makes of this Gemma, is the plan of `fp16_rescaled` without its
`residual_exponent`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- fp16: begin -->", "<!-- fp16: end -->"
"""Marks around the tables in the page."""

STEPS, ROWS, LENGTH = 50, 4, 64
COLUMNS = ("fp32", "fp16_rescaled", "bf16", "fp16")
SHOWN = (1, 10, 25, 50)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        losses, norms: of each optimizer step; the norm of the gradient before it is clipped.
        learnt: name of an adapter's tensor -> what the training added to it.
        skipped: steps that the loss scaler left out; `scale` is its factor at the end.
        failed: what the run ended with, where it did not reach the end.
    """

    losses: Sequence[float]
    norms: Sequence[float]
    learnt: Mapping[str, Any]
    skipped: int = 0
    scale: float = 1.0
    failed: str = ""
    seconds: float = 0.0

    @property
    def finite(self) -> bool:
        return bool(self.losses) and not self.failed and all(map(math.isfinite, (*self.losses, *self.norms)))


def recipe_of(precision: str, folder: Path, *, steps: int, rows: int, length: int) -> dict[str, Any]:
    """QLoRA as `recipes/quickstart.yaml` has it, on shorter rows."""
    from gemma_tune.models.reference import QUICKSTART

    return {
        "model": {"name": QUICKSTART, "quantization": "nf4", "precision": precision},
        "adapter": {"r": 8, "alpha": 16, "dropout": 0.0},
        "data": {"sources": [{"name": "sample:ultrachat_200k"}], "max_length": length, "packing": True, "holdout": 0},
        "optim": {"learning_rate": 2e-4, "schedule": "linear", "warmup_ratio": 0.06, "max_steps": steps},
        "batch": {"size": rows, "micro": rows},
        "samples": {"prompts": [], "held_out": 0},
        "checkpoint": {"every": steps},
        "tracking": {"log_every": 1},
        "output": str(folder / precision),
    }


def plan_of(column: str, folder: Path, *, steps: int = STEPS, rows: int = ROWS, length: int = LENGTH) -> Any:
    """The plan of one column. That of plain fp16 is made by hand: the package refuses to."""
    from gemma_tune.gemma.families import FAMILIES
    from gemma_tune.gemma.sizes import PUBLISHED
    from gemma_tune.plan.machine import named_machine
    from gemma_tune.plan.plan import make_plan
    from gemma_tune.plan.types import Choice
    from gemma_tune.recipe.schema import Recipe

    precision = "fp16_rescaled" if column == "fp16" else column
    content = recipe_of(precision, folder, steps=steps, rows=rows, length=length)
    recipe = Recipe.model_validate(content)
    shape = PUBLISHED[recipe.model.name]
    plan = make_plan(recipe, named_machine("cpu"), shape, FAMILIES[shape.family])
    if column != "fp16":
        return plan
    model = {key: choice for key, choice in plan.model.items() if key != "residual_exponent"}
    output = Choice(str(folder / "fp16"), "recipe")
    trainer, session = {**plan.trainer, "output_dir": output}, {**plan.session, "output": output}
    return replace(plan, model=model, trainer=trainer, session=session)


def run(column: str, folder: Path, **sizes: int) -> Outcome:
    """Train one column."""
    from rich.console import Console

    from gemma_tune.errors import TrainingError
    from gemma_tune.models.remedies import import_bitsandbytes

    import_bitsandbytes()
    from gemma_tune.train.run import run_plan
    from tests.half_products import HalfProducts

    plan = plan_of(column, folder, **sizes)
    begun, failed = time.perf_counter(), ""
    with nullcontext() if column == "fp32" else HalfProducts():
        try:
            run_plan(plan, "", console=Console(quiet=True))
        except TrainingError as error:
            failed = error.problems[0].what
    return outcome(folder / column, failed, time.perf_counter() - begun)


def outcome(folder: Path, failed: str, seconds: float) -> Outcome:
    file = folder / "metrics.jsonl"  # absent where the first step failed
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    steps = [line for line in lines if "loss" in line]
    losses, norms = ([_number(line[key]) for line in steps] for key in ("loss", "grad_norm"))
    last = steps[-1] if steps else {}
    skipped, scale = int(last.get("skipped_steps", 0)), last.get("loss_scale", 1.0)
    learnt = {} if failed else _learnt(folder / "adapter" / "adapter_model.safetensors")
    return Outcome(losses, norms, learnt, skipped, scale, failed, seconds)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _learnt(file: Path) -> dict[str, Any]:
    """Every B, which began at zero: what was learnt. (A began at random and is nearly all its beginning.)"""
    from safetensors.torch import load_file

    return {name: value.float() for name, value in load_file(str(file)).items() if ".lora_B." in name}


def far(found: Sequence[float], exact: Sequence[float]) -> float:
    """The largest relative difference of two rows of numbers."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, exact, strict=True))


def apart(found: Mapping[str, Any], exact: Mapping[str, Any]) -> float:
    """|found - exact| / |exact| over all tensors together."""
    squares = [((found[key] - value).square().sum(), value.square().sum()) for key, value in exact.items()]
    return math.sqrt(float(sum(one for one, _ in squares)) / float(sum(two for _, two in squares)))


# --- activations ----------------------------------------------------------------------------------------------------


@contextmanager
def watching(model: Any) -> Iterator[dict[str, float]]:
    """Module -> the largest absolute number that left it, in the order of the forward pass; infinite if one was not
    finite."""
    import torch

    peaks: dict[str, float] = {}

    def hook(name: str) -> Any:
        def see(module: Any, args: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple) else (output,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    peak = float(tensor.detach().abs().max())
                    peaks[name] = max(peaks.get(name, 0.0), peak if math.isfinite(peak) else math.inf)

        return see

    hooks = [
        module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name.startswith("model.")
    ]
    try:
        yield peaks
    finally:
        for one in hooks:
            one.remove()


def activations(column: str, folder: Path) -> dict[str, float]:
    """Peaks of one forward pass of the untouched base over the rows of the first step."""
    from gemma_tune.models.remedies import import_bitsandbytes

    import_bitsandbytes()
    import torch
    from rich.console import Console

    from gemma_tune.data.collate import Collator
    from gemma_tune.models.load import load_base
    from gemma_tune.train.run import gather
    from tests.half_products import HalfProducts

    plan = plan_of(column, folder)
    materials = gather(plan, Console(quiet=True))
    model = load_base(plan.values("model"), plan.values("quantization"), materials.family, device="cpu")
    rows = Collator(materials.family.pad_id)([materials.data.train[number] for number in range(ROWS)])
    rows.pop("labels")
    with torch.no_grad(), watching(model) as peaks, nullcontext() if column == "fp32" else HalfProducts():
        model(**rows)
    return peaks


def layer_peaks(peaks: Mapping[str, float]) -> list[float]:
    """Of the stream behind each decoder layer."""
    return [peaks[name] for name in peaks if name.removeprefix("model.layers.").isdigit()]


# --- how small gradients may become ---------------------------------------------------------------------------------

FACTORS = (7, 4, 0, -4, -8, -10, -12)


def underflow() -> str:
    """The gradient of an adapter in `fp16_rescaled` against fp32, by the factor on the loss of one token: a table."""
    from gemma_tune.models.remedies import import_bitsandbytes

    import_bitsandbytes()
    import torch

    from gemma_tune.gemma.families import FAMILIES, RESIDUAL_EXPONENT
    from gemma_tune.models.load import load_base
    from gemma_tune.models.lora import attach
    from gemma_tune.models.reference import QUICKSTART
    from gemma_tune.models.tokenizer import load_tokenizer
    from gemma_tune.train.loss_head import FrozenHeadLogProbs
    from tests.half_products import HalfProducts

    family = FAMILIES["gemma3_text"]
    text = "The sea is wide and deep, and when the wind comes from the north, the old ships stay in the harbour. " * 2
    row = load_tokenizer(QUICKSTART, None, family)(text, return_tensors="pt")["input_ids"][:, :48]

    def adapted(dtype: str, exponent: int = 0) -> Any:
        torch.manual_seed(0)
        base = load_base({"name": QUICKSTART, "dtype": dtype, "residual_exponent": exponent}, {}, family, device="cpu")
        lora = {"target_modules": family.lora_targets["all-linear"], "r": 4, "task_type": "CAUSAL_LM"}
        model = attach(base, lora, family)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.003)
        return model.train()

    def gradient(model: Any, factor: float) -> Any:
        model.zero_grad()
        base = model.get_base_model()
        with HalfProducts():  # which leaves fp32 alone
            hidden = base.base_model(input_ids=row).last_hidden_state[0, :-1]
            scored = FrozenHeadLogProbs.apply(hidden, base.get_output_embeddings().weight, row[0, 1:], None)[0]
            (-scored.sum() * factor).backward()
        flat = [one.grad.flatten() for one in model.parameters() if one.grad is not None]
        return torch.cat(flat).double() / factor

    exact = gradient(adapted("float32"), 1.0)
    small = adapted("float16", RESIDUAL_EXPONENT)
    found = {f"2^{power}": gradient(small, 2.0**power) for power in FACTORS}
    found["bf16"] = gradient(adapted("bfloat16"), 1.0)
    cells = [f"{float((one - exact).norm() / exact.norm()):.2g}" for one in found.values()]
    return "\n".join(
        [
            f"| factor | {' | '.join(found)} |",
            "|---" * (len(found) + 1) + "|",
            f"| relative difference | {' | '.join(cells)} |",
        ]
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Outcome], peaks: Mapping[str, Mapping[str, float]]) -> str:
    exact = found["fp32"]
    lines = ["| | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]

    def line(name: str, cells: Sequence[str]) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} |")

    for step in SHOWN:
        line(f"loss of step {step}", [_cell(one.losses, step) for one in found.values()])
    for name, of in (("loss", "losses"), ("gradient norm", "norms")):
        line(
            f"{name}, largest relative difference from fp32",
            [
                "-" if one is exact or not one.finite else f"{far(getattr(one, of), getattr(exact, of)):.2g}"
                for one in found.values()
            ],
        )
    line(
        "what the adapter learnt (B), relative difference",
        ["-" if one is exact or not one.finite else f"{apart(one.learnt, exact.learnt):.2g}" for one in found.values()],
    )
    line("all losses and gradient norms finite", ["yes" if one.finite else "no" for one in found.values()])
    line("steps that loss scaling skipped", [str(one.skipped) if one.scale != 1 else "-" for one in found.values()])
    return "\n".join([*lines, "", *_activations(peaks)])


def _cell(losses: Sequence[float], step: int) -> str:
    return f"{losses[step - 1]:.4f}" if step <= len(losses) else "none"


def _activations(peaks: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    columns = {name: layer_peaks(of) for name, of in peaks.items()}
    yield "| largest number in the residual stream | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for layer, cells in enumerate(zip(*columns.values(), strict=True)):
        yield f"| behind layer {layer} | " + " | ".join(_large(cell) for cell in cells) + " |"
    inner = {
        name: max((peak, where) for where, peak in of.items() if math.isfinite(peak) and not _is_stream(where))
        for name, of in peaks.items()
    }
    yield (
        "| largest inside a block | " + " | ".join(f"{_large(peak)}: {where}" for peak, where in inner.values()) + " |"
    )
    first = {
        name: next((where for where, peak in of.items() if math.isinf(peak)), "none") for name, of in peaks.items()
    }
    yield "| first that is not finite | " + " | ".join(first.values()) + " |"


def _is_stream(module: str) -> bool:
    """Whether what leaves it is the stream, or is added to it."""
    from gemma_tune.models.rescale import WRITES

    return module.removeprefix("model.layers.").isdigit() or module.endswith((*WRITES, "embed_tokens"))


def _large(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) else "not finite"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--columns", default=",".join(COLUMNS))
    parser.add_argument("--underflow", action="store_true", help="only how small gradients may become")
    chosen = parser.parse_args()
    if chosen.underflow:
        print(underflow())
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {}
        for column in chosen.columns.split(","):
            found[column] = run(column, folder, steps=chosen.steps, rows=chosen.rows, length=chosen.length)
            one = found[column]
            print(f"{column}: {len(one.losses)} steps in {one.seconds:.0f} s, loss scale {one.scale:g} {one.failed}")
        peaks = {column: activations(column, folder) for column in found if column != "bf16"}
        print(f"{BEGIN}\n{tables(found, peaks)}\n{END}")


if __name__ == "__main__":
    main()
