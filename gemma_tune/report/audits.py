"""Memorisation and comparison of evaluation.json, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.report.read import mapping
from gemma_tune.report.tables import Table
from gemma_tune.report.words import NONE, count, cut, figure, is_number, share, signed

SHOWN = 200


def memorisation(found: Mapping[str, Any]) -> Iterator[Table]:
    """Planted secrets by how often they were repeated, and rows that are continued word for word."""
    canaries = mapping(found.get("canaries"))
    rows = [one for one in canaries.get("by_repeats") or () if isinstance(one, Mapping)]
    if rows:
        heads = ("repeated", "secrets", "said by itself", "95 % interval", "exposure, bits")
        cells = tuple(
            (
                f"{count(one.get('repeats'))} times",
                count(one.get("canaries")),
                share(one.get("rate"), 1),
                _interval(one.get("interval"), percent=True),
                figure(one.get("exposure"), 3),
            )
            for one in rows[:SHOWN]
        )
        ceiling = canaries.get("ceiling")
        about = f"Exposure is at most {figure(ceiling, 3)} bits; near 0, the secret is like any other."
        yield Table("Made-up secrets in the training rows", heads, cells, about if is_number(ceiling) else "")
    extraction = mapping(found.get("extraction"))
    names = {"train": "training rows", "held_out": "held-out rows, the control"}
    continued = tuple(
        (label, count(mapping(extraction.get(name)).get("rows")), *_rates(mapping(extraction.get(name))))
        for name, label in names.items()
        if mapping(extraction.get(name)).get("rows")
    )
    if continued:
        asked = mapping(extraction.get("criterion"))
        about = (
            f"Given {count(asked.get('prompt_tokens'))} tokens of a row, the next {count(asked.get('target_tokens'))} "
            f"follow exactly; of shorter turns, the second half behind the first. Nearly: with "
            f"{share(asked.get('edits'))} of edits."
        )
        columns = ("", "rows", "base, exactly", "tuned, exactly", "base, nearly", "tuned, nearly")
        yield Table("Rows that are continued word for word", columns, continued, about if asked else "")


def _rates(one: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        share(mapping(mapping(one.get(voice)).get(how)).get("rate"), 1)
        for how in ("exact", "approximate")
        for voice in ("base", "tuned")
    )


def comparison(found: Mapping[str, Any]) -> Iterator[Table]:
    """Two models on the same rows, with the interval of each difference."""
    cells = [(name.replace("_", " "), one) for name, one in mapping(found.get("figures")).items()]
    for task, metrics in mapping(found.get("tasks")).items():
        cells += [(cut(f"{task}, {metric}", 80), one) for metric, one in mapping(metrics).items()]
    rows = tuple(
        (
            name,
            figure(one.get("a")),
            figure(one.get("b")),
            signed(one.get("difference")),
            _interval((one.get("low"), one.get("high"))),
            count(one.get("rows")),
        )
        for name, one in cells[:SHOWN]
        if isinstance(one, Mapping)
    )
    if rows:
        subjects = [cut(mapping(found.get(name)).get("target") or NONE, 120) for name in ("a", "b")]
        about = f"A is {subjects[0]}, B is {subjects[1]}. {cut(found.get('method') or '', 200)}"
        yield Table("Comparison", ("", "A", "B", "B − A", "interval", "rows"), rows, about.strip())


def _interval(ends: Any, *, percent: bool = False) -> str:
    if not isinstance(ends, Sequence) or len(ends) != 2 or not all(map(is_number, ends)):
        return NONE
    low, high = (share(end, 1) if percent else signed(end) for end in ends)
    return f"{low} to {high}"
