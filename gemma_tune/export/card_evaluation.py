"""What a model card takes from evaluation.json: tasks and memorisation, where they are of exactly these weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune.export.markdown import is_number, table, value_text
from gemma_tune.gemma.licences import last_name

if TYPE_CHECKING:
    from gemma_tune.export.subject import Subject


def evaluation_of(subject: Subject) -> Mapping[str, Any]:
    """evaluation.json of the run, where it is about exactly the weights that leave; empty where it is not.

    An adapter is told by its hash, all weights by their content: what was trained on after an evaluation has another.
    """
    file = subject.run_folder / "evaluation.json" if subject.run_folder else None
    if file is None or not file.is_file() or not subject.measured:
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        about = found["subject"]
        known = about["adapter_sha256"] if subject.adapters else about["content"]
        matches = found["format"] == 1 and known is not None and known == _identity(subject)
    except (ValueError, KeyError, TypeError):
        return {}
    return found if matches else {}


def _identity(subject: Subject) -> str:
    """As `evaluation.target.Target.subject` tells adapters apart, or models of which all weights were trained."""
    from gemma_tune.models.lora import WEIGHTS
    from gemma_tune.train.checkpoint import sha256_of
    from gemma_tune.train.provenance import fingerprint

    if not subject.adapters:
        return fingerprint(subject.source.path)
    file = subject.adapters[0].folder / WEIGHTS
    return sha256_of(file) if file.is_file() else ""


def task_results(evaluation: Mapping[str, Any]) -> list[Any]:
    """Tasks for the hub's model-index, which has no place for how many items were asked: whole tasks alone."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
            metric_name=_with_shots(metric, about),
        )
        for task, about in tasks_of(evaluation)
        if about.get("items") == about.get("of", about.get("items"))
        for metric, value in about["metrics"].items()
        if is_number(value) and math.isfinite(value) and not _is_error(metric)
    ]


def tasks_of(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks of an evaluation; what else stands beside them says how they were asked."""
    for task, about in (evaluation.get("tasks") or {}).items():
        if isinstance(about, Mapping) and isinstance(about.get("metrics"), Mapping):
            yield last_name(str(task)), about


def _with_shots(metric: str, about: Mapping[str, Any]) -> str:
    """A metric and how it was asked: scores of turns and of plain text are not comparable."""
    shots, chat = about.get("shots"), about.get("chat")
    parts = [metric, *([f"{shots} shots"] if is_number(shots) else [])]
    return ", ".join([*parts, *(["in turns" if chat else "plain text"] if isinstance(chat, bool) else [])])


def _items(about: Mapping[str, Any]) -> str:
    asked, all_of_it = about.get("items"), about.get("of")
    part = is_number(asked) and is_number(all_of_it) and asked != all_of_it
    return f"{value_text(asked)} of {value_text(all_of_it)}" if part else value_text(asked or "")


def further_tables(evaluation: Mapping[str, Any]) -> str:
    """Tables of tasks and of memorisation; empty where neither was measured."""
    parts = []
    rows = [
        (task, _with_shots(metric, about), _items(about), _with_error(about["metrics"], metric))
        for task, about in tasks_of(evaluation)
        for metric, value in about["metrics"].items()
        if is_number(value) and not _is_error(metric)
    ]
    if rows:
        parts.append("Tasks of lm-evaluation-harness:\n\n" + table(("task", "metric", "items", "value"), rows))
    if found := list(_memorised(evaluation.get("memorisation") or {})):
        parts.append("Memorisation of the training data:\n\n" + table(("asked for", "before", "after"), found))
    return "\n".join(parts)


def _memorised(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What was written word for word of what was asked for (`evaluation.memorisation`)."""
    names = {"train": "training rows", "held_out": "held-out rows"}
    for key, name in names.items():
        part = (found.get("extraction") or {}).get(key) or {}
        if not (part.get("tuned") or {}).get("exact"):
            continue
        base = (part.get("base") or {}).get("exact")
        yield f"{name}, the rest word for word", _of(base, "rows"), _of(part["tuned"]["exact"], "rows")
    for group in (found.get("canaries") or {}).get("by_repeats") or ():
        yield f"canaries that were planted {group['repeats']} times", "", _of(group, "canaries")


def _of(found: Mapping[str, Any] | None, counted: str) -> str:
    return f"{found['extracted']} of {found[counted]}" if found else ""


def _is_error(metric: str) -> bool:
    """lm-eval puts the standard error of `acc,none` under `acc_stderr,none`."""
    return metric.partition(",")[0].endswith("_stderr")


def _with_error(metrics: Mapping[str, Any], metric: str) -> str:
    name, comma, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return value_text(metrics[metric]) + (f" ± {value_text(error)}" if is_number(error) else "")
