"""A plan as people read it: each value with its reason, the memory term by term, and what to know before starting."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune.console import printable
from gemma_tune.plan.machine import GIB, MIB
from gemma_tune.plan.memory import total
from gemma_tune.plan.stages import CONFIGS
from gemma_tune.plan.types import Choice, Plan

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SECTIONS = {
    "model": "Model",
    "quantization": "Quantisation (transformers.BitsAndBytesConfig)",
    "lora": "Adapter (peft.LoraConfig)",
    "trainer": "Training ({config})",
    "data": "Data",
    "session": "Run",
}


def report(plan: Plan) -> Iterator[RenderableType]:
    """What `gemma-tune check` prints, from top to bottom."""
    from rich.text import Text

    yield Text(f"{plan.stage} of {plan.model['name'].value} ({plan.family}) on {_machine(plan.machine)}", style="bold")
    for section, title in SECTIONS.items():
        choices: Mapping[str, Choice] = getattr(plan, section)
        if choices:
            yield _choices(title.format(config=CONFIGS[plan.stage]), choices)
    yield _memory(plan)
    for note in plan.notes:
        yield Text(f"- {printable(note)}")
    if plan.refusal:
        yield Text.assemble(("does not fit: ", "bold red"), printable(plan.refusal))


def _machine(machine: Mapping[str, Any]) -> str:
    kind = "bf16" if machine["bf16"] else "no bf16"
    processes = f", {machine['world_size']} processes" if machine["world_size"] > 1 else ""
    processes += f" on {machine['nodes']} nodes" if machine.get("nodes", 1) > 1 else ""
    return printable(f"{machine['name']}: {size(machine['memory_bytes'])} a device, {kind}{processes}")


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    return table


def _choices(title: str, choices: Mapping[str, Choice]) -> Table:
    from rich.text import Text

    table = _table(title, "key", "value", "reason")
    for key, choice in choices.items():
        style = "yellow" if choice.reason.endswith("unchecked") else "dim" if choice.reason == "default" else ""
        table.add_row(key, Text(printable(shown(choice.value))), Text(printable(choice.reason), style=style))
    return table


def shown(value: Any) -> str:
    """A value as a recipe would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(bytes_: int) -> str:
    """`7.90 GiB`, or MiB below a tenth of one."""
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB / 10 else f"{bytes_ / MIB:.0f} MiB"


def _memory(plan: Plan) -> Table:
    from rich.text import Text

    table = _table("Memory of one process, estimated (d: bytes of the compute type)", "term", "size", "formula")
    for term in plan.memory:
        table.add_row(term.name, size(term.bytes), Text(term.formula, style="dim"))
    need, room = total(plan.memory), plan.machine["memory_bytes"]
    table.add_section()
    table.add_row(
        Text("total", style="bold"), Text(size(need), style="bold"), f"of {size(room)}: {need / room:.0%} of the memory"
    )
    return table
