"""The tables of docs/clusters.md, "Memory and communication, computed": `python -m gemma_tune.plan.computed` prints
them. They are what `gemma-tune check` says of these recipes, and arithmetic on it. Nothing in them was measured."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.sizes import PUBLISHED
from gemma_tune.plan.communication import H100_NODES, Step, step_of
from gemma_tune.plan.decide import decide
from gemma_tune.plan.machine import GIB, Launch, named_machine
from gemma_tune.plan.memory import estimate, total
from gemma_tune.plan.types import MemoryTerm
from gemma_tune.recipe.schema import Recipe

BEGIN, END = "<!-- computed: begin -->", "<!-- computed: end -->"
"""Marks around the tables in the page. `python -m gemma_tune.plan.computed` writes what is between them."""

ROWS = {
    "weights": ("linear layers", "embedding", "norms and small", "experts", "per-layer", "vision", "constants of NF4"),
    "adapter": ("adapter",),
    "gradients": ("gradients of the adapter", "gradient buckets", "gradients before they are sent"),
    "optimizer": ("optimizer state",),
    "gathered layers": ("gathered layers",),
    "gathered embedding, head, towers": ("gathered embeddings",),
    "activations": ("layer inputs", "one layer, recomputed", "activations", "attention masks"),
    "loss head": ("loss head",),
    "buffers, CUDA": ("passing buffers", "CUDA"),
    "loading, above the peak": ("loading",),
}
"""Row of the table -> beginnings of the names of its terms."""


SLOW = 100e9 / 8
"""Bytes a second of one port of 100 Gb/s: a cluster whose nodes were not made for training."""


@dataclass(frozen=True, slots=True)
class Case:
    """A column: a machine, a Gemma, how its base is held, and how the processes share it."""

    machine: str
    model: str
    quantization: str
    strategy: str

    @property
    def label(self) -> str:
        return f"{'QLoRA' if self.quantization == 'nf4' else 'LoRA, bf16'}, {self.strategy}"


def cases(machine: str, model: str, strategies: tuple[str, ...]) -> list[Case]:
    return [Case(machine, model, held, strategy) for held in ("none", "nf4") for strategy in strategies]


PAGES = {
    "Gemma 3 27B on one node of 8 H100": cases("8xh100", "google/gemma-3-27b-it", ("ddp", "fsdp2")),
    "Gemma 4 31B on two nodes of 8 H100": cases("2x8xh100", "google/gemma-4-31B", ("ddp", "fsdp2", "hsdp")),
}


@dataclass(frozen=True, slots=True)
class Column:
    """What was computed for a case."""

    case: Case
    memory: tuple[MemoryTerm, ...]
    room: int
    tokens: int
    passes: int
    step: Step


def column(case: Case) -> Column:
    """The plan's memory and the traffic of one step of `case`."""
    recipe = recipe_of(case)
    machine, shape = named_machine(case.machine), PUBLISHED[case.model]
    launch = Launch(world_size=machine.world_size, nodes=machine.nodes)
    batch = decide(recipe, machine, shape, FAMILIES[shape.family], None, (), launch).batch
    passes: int = batch.accumulation.value
    step = step_of(shape, batch.work, passes=passes, nodes=machine.nodes)
    return Column(case, estimate(shape, batch.work), machine.memory_bytes, batch.work.tokens, passes, step)


def recipe_of(case: Case) -> Recipe:
    """QLoRA or LoRA SFT: r 16 on all linear layers, packed rows of 2,048 tokens, 128 of them a step."""
    content: dict[str, Any] = {
        "model": {"name": case.model, "quantization": case.quantization},
        "data": {"sources": [{"name": "ultrachat"}], "max_length": 2048},
        "batch": {"size": 128},
        "distributed": {"strategy": case.strategy},
        "output": "runs/computed",
    }
    return Recipe.model_validate(content)


def tables() -> str:
    """All tables as Markdown."""
    parts = []
    for title, wanted in PAGES.items():
        columns = [column(case) for case in wanted]
        parts += [f"### {title}", "", *memory_table(columns), "", *traffic_table(columns), ""]
    return "\n".join(parts).rstrip() + "\n"


def memory_table(columns: list[Column]) -> list[str]:
    """Memory of one process by term, in GiB."""
    lines = _head("GiB of one GPU", [one.case.label for one in columns])
    for name, beginnings in ROWS.items():
        sizes = [sum(term.bytes for term in one.memory if term.name.startswith(beginnings)) for one in columns]
        if any(sizes):
            lines.append(_line(name, [f"{size / GIB:.2f}" if size else "-" for size in sizes]))
    lines.append(_line("**all**", [f"**{total(one.memory) / GIB:.1f}**" for one in columns]))
    lines.append(_line(f"of {columns[0].room / GIB:.1f}", [_fits(one) for one in columns]))
    return lines


def _fits(one: Column) -> str:
    share = total(one.memory) / one.room
    return f"{share:.0%}" if share <= 1 else f"{share:.0%}: does not fit"


def traffic_table(columns: list[Column]) -> list[str]:
    """What a step sends and computes, in GB and seconds."""
    lines = _head("one step", [one.case.label for one in columns])
    rows = {
        "tokens in a pass, passes": lambda one: f"{one.tokens:,} x {one.passes}",
        "parameters gathered, GB a GPU": lambda one: _giga(one.step.gathered),
        "gradients summed up, GB a GPU": lambda one: _giga(one.step.reduced),
        "over NVLink, s": lambda one: _seconds(one.step.nvlink),
        "over the network, GB a node": lambda one: _giga(one.step.across),
        "over the network, s": lambda one: _seconds(one.step.network),
        "over a network of 100 Gb/s a node, s": lambda one: _seconds(one.step.across / (SLOW * H100_NODES.link_share)),
        "computing, s": lambda one: _seconds(one.step.compute),
        "longest": lambda one: {"compute": "computing", "nvlink": "NVLink"}.get(one.step.bound, one.step.bound),
        "tokens in a pass at which sending takes as long": break_even,
    }
    for name, show in rows.items():
        cells = [show(one) for one in columns]
        if set(cells) != {"-"}:
            lines.append(_line(name, cells))
    return lines


def break_even(one: Column) -> str:
    """Tokens in a pass of one process below which it waits for parameters rather than for its own computing."""
    if not one.step.gathered:
        return "-"
    each_token = one.step.compute / (one.tokens * one.passes)
    return f"{max(one.step.nvlink, one.step.network) / one.passes / each_token:,.0f}"


def rates() -> str:
    """The rates that the times are computed with, as a sentence."""
    rate = H100_NODES
    text = (
        f"Rates: {rate.flops / 1e12:.0f} TFLOP/s of a GPU, of which {rate.compute_share:.0%} are reached; "
        f"{rate.nvlink / 1e9:.0f} GB/s into a GPU over NVLink and {rate.network / 1e9:.0f} GB/s into a node over the "
        f"network, of which {rate.link_share:.0%} are reached."
    )
    return textwrap.fill(text, 120)


def _giga(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else "-"


def _seconds(time: float) -> str:
    return f"{time:.3f}" if time else "-"


def _head(first: str, names: list[str]) -> list[str]:
    return [_line(first, names), "|---" * (len(names) + 1) + "|"]


def _line(first: str, cells: list[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


def section() -> str:
    """What stands between the marks."""
    return f"{BEGIN}\n{rates()}\n\n{tables()}{END}"


if __name__ == "__main__":
    print(section())
