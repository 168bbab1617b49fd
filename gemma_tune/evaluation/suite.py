"""Whole tables of benchmarks: `gemma-card` is what the model card of Gemma 1.1 reports.

The card's figures are Google's, measured with Google's harness, and the card says little about how. A row here is the
task of lm-eval that comes nearest. Its figure stands beside the card's for orientation, not as a reproduction. Where
the card does not state the number of shots, the row says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gemma_tune.errors import AccessError, GemmaTuneError, UserError
from gemma_tune.evaluation.gemma_card import GEMMA_CARD, SOURCE, Row
from gemma_tune.evaluation.harness import RESERVED, evaluate, facts, open_lm
from gemma_tune.evaluation.harness_tasks import check_folder
from gemma_tune.gemma.families import Family

NOT_STATED = "not stated by Google"

_PERSPECTIVE = "PERSPECTIVE_API_KEY"


SUITES: Mapping[str, tuple[Row, ...]] = {"gemma-card": GEMMA_CARD}


def run_suite(
    model: Any,
    tokenizer: Any,
    family: Family,
    name: str,
    *,
    limit: int | None = None,
    include_path: str | None = None,
    chat: bool,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Run the tasks of a suite, one after the other.

    What cannot run here is left out and says why: RealToxicity without PERSPECTIVE_API_KEY, HumanEval and MBPP without
    HF_ALLOW_CODE_EVAL=1, a dataset that cannot be had, a package that is missing.

    Args:
        model, tokenizer, family, limit, include_path, chat, batch_size: as `harness.run_tasks`.
        name: key of `SUITES`.

    Returns:
        As `harness.run_tasks`, with `card` filled in: `{"row", "metric": which of the metrics is beside it, "figure":
        the card's in the unit of that metric, for the size of the card that is nearest to this model, "size",
        "printed": {"2B", "7B"} as the card has them, None where it has a blank, "own": ours in that unit, "stated":
        whether the card states the shots, "says", "safety", "note", "source"}`. Tasks that did not run have no
        metrics, 0 items and `skipped`, the reason. A task of two rows (BBQ) has a second entry, called
        `<task> (<row>)`.

    Raises:
        UserError: there is no such suite.
        AccessError: lm-eval is missing, or not one task could run.
    """
    if name not in SUITES:
        raise UserError(f"there is no suite '{name}'", where="--suite", fix=f"use {' or '.join(SUITES)}")
    check_folder(include_path)
    lm = open_lm(model, tokenizer, family, batch_size=batch_size)
    size = nearest_size(sum(parameter.numel() for parameter in model.parameters()))
    found: dict[str, Any] = {}
    rows: list[Any] = []
    for row in SUITES[name]:
        task = row.chat_task if chat and row.chat_task else row.task
        if task in found:
            again = {key: value for key, value in found[task].items() if key != "parts"}
            found[f"{task} ({row.card})"] = again | {"card": beside(row, again["metrics"], size)}
            continue
        try:
            check_key(row)
            run = evaluate(lm, [task], include_path=include_path, shots=row.shots, limit=limit, chat=chat)
        except (AccessError, UserError) as error:
            entry: dict[str, Any] = {"metrics": {}, "shots": row.shots, "items": 0, "chat": chat, "version": None}
            found[task] = entry | {"skipped": _reason(error), "card": beside(row, {}, size)}
            continue
        rows += run.pop("rows")
        found[task] = run[task] | {"card": beside(row, run[task]["metrics"], size)}
    if all("skipped" in entry for entry in found.values()):
        first = next(iter(found.values()))["skipped"]
        raise AccessError(
            f"not one task of {name} can run here; of the first: {first}",
            where="--suite",
            fix="run it where there is a network, or put the datasets into --include-path",
        )
    return {**found, "harness": facts(lm, limit=limit), "rows": rows}


def check_key(row: Row) -> None:
    """RealToxicity asks a service that wants a key.

    Raises:
        AccessError: there is none.
    """
    if row.task == "realtoxicityprompts" and not os.environ.get(_PERSPECTIVE):
        raise AccessError(
            "it rates texts with Google's Perspective API, and no key is set", where=row.task, fix=f"set {_PERSPECTIVE}"
        )


def nearest_size(parameters: int) -> str:
    """Which of the card's columns is nearer, of the models that it calls 2B (2.51e9 parameters) and 7B (8.54e9)."""
    return "2B" if parameters < (2.51e9 * 8.54e9) ** 0.5 else "7B"


def beside(row: Row, metrics: Mapping[str, float], size: str) -> dict[str, Any]:
    """What the card says, and our figure in its unit."""
    own = metrics.get(row.metric)
    printed = dict(zip(("2B", "7B"), row.figures, strict=True))
    figure = printed[size]
    return {
        "row": row.card,
        "metric": row.metric,
        "figure": None if figure is None else round(figure / row.scale, 6),
        "size": size,
        "printed": printed,
        "own": None if own is None else own * row.scale,
        "stated": row.shots_stated,
        "says": row.stated,
        "safety": row.safety,
        "note": row.note,
        "source": SOURCE,
    }


def _reason(error: GemmaTuneError) -> str:
    first = error.problems[0]
    return f"{first.what}; {first.fix}" if first.fix else first.what


def render(found: Mapping[str, Any]) -> list[str]:
    """Two tables for the terminal, as the card has them; then what was left out, and notes."""
    entries = {name: entry for name, entry in found.items() if name not in RESERVED}
    lines: list[str] = []
    for safety, title in ((False, "Benchmarks; the card's are of the pretrained models"), (True, "Safety")):
        table = [(name, entry) for name, entry in entries.items() if entry["card"]["safety"] is safety]
        if table:
            lines += [title, _line("", "task", "shots", "own", "card 2B", "card 7B", "the card's shots")]
            lines += [_row(name, entry) for name, entry in table]
    for reason in dict.fromkeys(entry["skipped"] for entry in entries.values() if "skipped" in entry):
        names = [entry["card"]["row"] for entry in entries.values() if entry.get("skipped") == reason]
        lines.append(f"left out: {', '.join(names)}: {reason}")
    noted = [entry["card"] for entry in entries.values() if entry["card"]["note"] and "skipped" not in entry]
    lines += [f"{card['row']}: {card['note']}" for card in noted]
    limit = found.get("harness", {}).get("limit")
    if limit is not None:
        lines.append(f"only the first {limit:,} items of each task: not the card's figures")
    lines.append(f"card: {SOURCE}")
    return lines


def _row(name: str, entry: Mapping[str, Any]) -> str:
    card = entry["card"]
    small, large = (_figure(card["printed"][size], "blank") for size in ("2B", "7B"))
    said = card["says"] if card["stated"] else "; ".join(filter(None, (card["says"], f"shots {NOT_STATED}")))
    shots = "" if entry["shots"] is None else str(entry["shots"])
    return _line(card["row"], name.split(" ")[0], shots, _figure(card["own"]), small, large, said)


def _figure(value: float | None, missing: str = "left out") -> str:
    return missing if value is None else f"{value:.2f}"


def _line(row: str, task: str, shots: str, own: str, small: str, large: str, said: str) -> str:
    return f"{row:<18}{task:<22}{shots:>6}{own:>10}{small:>9}{large:>9}  {said}".rstrip()
