"""What a run folder holds, read for the report. A file that is missing or half written is a gap, and is named.

A report is most wanted of a run that went wrong, so nothing here insists on more than run.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import UserError
from gemma_tune.train.provenance import redact


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of one run.

    Attributes:
        folder: as it was named.
        record: run.json.
        plan: plan.json; empty where it is missing.
        metrics: lines of metrics.jsonl.
        samples: lines of samples.jsonl.
        recipe: recipe.yaml, as its user wrote it.
        evaluation: evaluation.json; empty where nobody asked for one.
        gaps: what is missing or could not be read, one sentence each.
    """

    folder: Path
    record: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    recipe: str
    evaluation: Mapping[str, Any]
    gaps: tuple[str, ...]


_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("data", "results", "model", "machine", "template", "git", "versions"), dict),
    **dict.fromkeys(("data.report", "results.base", "results.tuned", "results.peak_memory"), dict),
    **dict.fromkeys((f"data.report.{name}" for name in ("read", "dropped", "repaired", "noted", "first")), dict),
    **dict.fromkeys((f"data.report.{name}" for name in ("pairs", "judged", "prompts")), dict),
    **dict.fromkeys(("segments", "command", "memory", "notes", "data.preview", "data.report.remarks"), list),
}
"""Kinds of the parts of run.json and plan.json that others are looked for in; null is as good as missing."""


def mapping(found: Any) -> Mapping[str, Any]:
    """`found` where it is a JSON object, else an empty one."""
    return found if isinstance(found, Mapping) else {}


def load_run_files(folder: Path) -> RunFiles:
    """Read the run in `folder`.

    Raises:
        UserError: there is no run.json, or it is none of ours.
    """
    gaps: list[str] = []
    record = _document(folder / "run.json", gaps)
    if not record:
        missing = not (folder / "run.json").is_file()
        raise UserError(
            "there is no run.json here" if missing else "run.json cannot be read",
            where=str(folder),
            fix="name the folder that a recipe's `output` names; a run writes run.json when it begins",
        )
    evaluated = (folder / "evaluation.json").is_file()
    return RunFiles(
        folder=folder,
        record=_sound(record, "run.json", gaps),
        plan=_sound(_document(folder / "plan.json", gaps), "plan.json", gaps),
        metrics=_lines(folder / "metrics.jsonl", gaps),
        samples=_lines(folder / "samples.jsonl", gaps) if (folder / "samples.jsonl").is_file() else [],
        recipe=_text(folder / "recipe.yaml", gaps),
        evaluation=_document(folder / "evaluation.json", gaps) if evaluated else {},
        gaps=tuple(gaps),
    )


def _text(path: Path, gaps: list[str]) -> str:
    """The file, its secrets masked as in run.json: answers and held-out rows were written as they are."""
    try:
        return redact(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as exc:
        gaps.append(f"{path.name} is missing" if not path.exists() else f"{path.name}: {exc.strerror}")
        return ""


def _document(path: Path, gaps: list[str]) -> dict[str, Any]:
    text = _text(path, gaps)
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        gaps.append(f"{path.name} is not the JSON that a run writes")
        return {}
    return found


def _sound(found: dict[str, Any], name: str, gaps: list[str], before: str = "") -> dict[str, Any]:
    """`found` without the parts that are of another kind than a run writes, each of which is a gap."""
    kept = {}
    for key, item in found.items():
        kind = _KINDS.get(f"{before}{key}")
        if kind is not None and item is not None and not isinstance(item, kind):
            gaps.append(f"{name}: `{before}{key}` is not what a run writes, and is left out")
        else:
            kept[key] = _sound(item, name, gaps, f"{before}{key}.") if kind is dict and item is not None else item
    return kept


def _lines(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    rows, bad = [], 0
    for line in _text(path, gaps).split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        many = f"{bad:,} lines cannot be read and are" if bad > 1 else "1 line cannot be read and is"
        gaps.append(f"{path.name}: {many} left out")
    return rows
