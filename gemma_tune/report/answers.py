"""Answers to the prompts of a run: base and tuned side by side, and how they changed on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.report.words import cut, figure, is_number

_BREAKS = re.compile(r"\n\s*\n\s*\n\s*")


@dataclass(frozen=True, slots=True)
class Said:
    """One answer. `when` is `before`, `after` or `step 40`; `about` what is known of it."""

    when: str
    text: str
    ended: bool
    about: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with its answers.

    Attributes:
        text: of the prompt.
        held_out: whether it is from the data, where `reference` is the answer of the data.
        sides: first and last answer, or the only one.
        between: those in between, in the order of steps.
    """

    text: str
    held_out: bool
    reference: str
    sides: tuple[Said, ...]
    between: tuple[Said, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    """All that is shown, and how many prompts and steps are not."""

    prompts: tuple[Prompt, ...]
    steps: int
    left_out: int


def make_answers(
    samples: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    *,
    prompts: int,
    between: int,
    characters: int,
) -> Answers:
    """Group the lines of samples.jsonl by prompt; without any, the answers that run.json has.

    Args:
        samples: lines of samples.jsonl.
        record: run.json.
        prompts: shown at most.
        between: steps between the first and the last that are shown at most.
        characters: of a text that are shown at most.
    """
    rows = list(samples) or _of_results(record)
    last = (record.get("results") or {}).get("steps")
    groups: dict[tuple[str, str | None], dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if is_number(row.get("step")) and isinstance(row.get("prompt"), str):
            reference = row["reference"] if isinstance(row.get("reference"), str) else None
            groups.setdefault((row["prompt"], reference), {})[int(row["step"])] = row
    steps = sorted({step for group in groups.values() for step in group})
    chosen = _spread(steps[1:-1], between)
    shown = []
    for (text, reference), group in list(groups.items())[:prompts]:
        order = sorted(group)
        ends = [order[0], order[-1]] if len(order) > 1 else order
        shown.append(
            Prompt(
                text=cut(text, characters),
                held_out=any(row.get("held_out") for row in group.values()),
                reference=cut(reference or "", characters),
                sides=tuple(_said(group[step], step, last, characters) for step in ends),
                between=tuple(
                    _said(group[step], step, last, characters) for step in order if step in chosen and step not in ends
                ),
            )
        )
    return Answers(tuple(shown), len(steps), max(0, len(groups) - prompts))


def _of_results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = record.get("results") or {}
    rows = []
    for row in results.get("answers") or ():
        for name, step in (("base", 0), ("tuned", results.get("steps"))):
            if isinstance(row.get(name), Mapping):
                rows.append({**row, **row[name], "answer": row[name].get("text"), "step": step})
    return rows


def _spread(steps: Sequence[int], count: int) -> set[int]:
    if len(steps) <= count:
        return set(steps)
    if count < 2:
        return set(steps[:count])
    return {steps[round(number * (len(steps) - 1) / (count - 1))] for number in range(count)}


def squeezed(text: str) -> str:
    """`text` with each run of more than two line breaks as a number of them: an untrained model writes many."""
    return _BREAKS.sub(lambda found: f"\n[{found[0].count(chr(10))} line breaks]\n", text).strip("\n")


def _said(row: Mapping[str, Any], step: int, last: Any, characters: int) -> Said:
    when = "before" if step == 0 else "after" if step == last else f"step {step:,}"
    ended = bool(row.get("ended"))
    about = f"{row['tokens']:,} tokens" if is_number(row.get("tokens")) else ""
    if is_number(row.get("score")):
        about += f", score {figure(row['score'], 3)}"
    return Said(when, cut(squeezed(str(row.get("answer") or "")), characters), ended, about)
