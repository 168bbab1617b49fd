"""Two models on the same held-out rows, with intervals for their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from gemma_tune.errors import UserError
from gemma_tune.evaluation.answers import Given, answer_prompts
from gemma_tune.evaluation.bootstrap import CONFIDENCE, RESAMPLES, mcnemar, paired_difference
from gemma_tune.evaluation.held_out import Rows, TokenScores, score_tokens, token_rows
from gemma_tune.evaluation.overlap import check_unseen
from gemma_tune.evaluation.result import read, read_rows, same_subject
from gemma_tune.evaluation.rewards import PairScores, score_pairs
from gemma_tune.evaluation.target import Opened, Target, open_target

FEW = 20
"""Below so many rows an interval from drawing them again is too narrow to be believed."""


@dataclass(frozen=True)
class Measured:
    """One of the two on the rows. What its kind does not have is None."""

    tokens: TokenScores | None
    given: Given | None
    pairs: PairScores | None


def check_two(a: Target, b: Target) -> None:
    """Both can be measured by the same figures.

    Raises:
        UserError: one is a reward model and the other is not.
    """
    if a.is_reward != b.is_reward:
        one, other = (a, b) if a.is_reward else (b, a)
        raise UserError(
            f"{one.name} rates answers, and {other.name} gives them: they have no figure in common",
            where="--compare",
            fix="compare two models of one kind",
        )


def compare(a: Target, b: Target, opened: Opened, rows: Rows) -> dict[str, Any]:
    """`comparison` of evaluation.json: figures of both, and differences b - a with intervals.

    Args:
        a, b: checked by `check_two`.
        opened: a. It is let go before b is opened: both need not fit into memory.
        rows: on which both are measured; a's own held-out rows, or others.

    Raises:
        UserError: b was trained on some of the rows, or writes other tokens than a.
    """
    trained_on = {"a": "no" if a.plan is rows.plan else check_unseen(a, rows), "b": check_unseen(b, rows)}
    first = measure(a, opened, rows)
    opened.let_go()
    second_opened = open_target(b, rows.plan)
    if second_opened.encoder.sha256 != rows.encoder.sha256 or second_opened.family is not rows.family:
        raise UserError(
            f"it writes other tokens than {a.name}: losses a token cannot be compared",
            where=b.name,
            fix="compare their figures in --tasks, evaluated one by one",
        )
    second = measure(b, second_opened, rows)
    found = {
        "a": a.subject(),
        "b": b.subject(),
        "trained_on_rows": trained_on,
        "rows_fingerprint": rows.data.fingerprint,
        "method": f"paired bootstrap over rows, percentile interval of {CONFIDENCE:.0%}, {RESAMPLES:,} resamples",
        "figures": differences(first, second),
    }
    ours, theirs = _task_rows(a), _task_rows(b)
    unlike = asked_unlike(ours, theirs)
    tasks = compare_tasks(*([row for row in some if row["task"] not in unlike] for some in (ours, theirs)))
    return found | ({"tasks": tasks} if tasks else {}) | ({"tasks_asked_unlike": unlike} if unlike else {})


def measure(target: Target, opened: Opened, rows: Rows) -> Measured:
    """All figures of one model that can be paired row by row."""
    plan = target.plan if target.plan is not None and target.plan.stage == rows.stage else None
    if opened.head is not None:
        pairs = score_pairs(
            opened.reward(), rows.rows, batch_size=rows.batch_size, pad_id=opened.family.pad_id, plan=plan
        )
        return Measured(None, None, pairs)
    scored = token_rows(rows)
    tokens = score_tokens(opened, scored, batch_size=rows.batch_size, plan=plan) if scored else None
    return Measured(tokens, answer_prompts(opened, rows) if rows.prompts else None, None)


def differences(a: Measured, b: Measured) -> dict[str, Any]:
    """Name of a figure -> both values, their difference and its interval."""
    found: dict[str, Any] = {}
    if a.tokens is not None and b.tokens is not None:
        size = a.tokens.tokens
        found["loss"] = paired_difference(a.tokens.nats, b.tokens.nats, size).to_json()
        found["token_accuracy"] = paired_difference(a.tokens.correct, b.tokens.correct, size).to_json()
    if a.given is not None and b.given is not None:
        counted = a.given.counted()
        ended = [[one.answers[number].ended for number in counted] for one in (a.given, b.given)]
        formed = [[not one.faults[number] for number in counted] for one in (a.given, b.given)]
        found |= {"stop_rate": yes_or_no(*ended), "format_rate": yes_or_no(*formed)}
    if a.pairs is not None and b.pairs is not None:
        found["reward_accuracy"] = yes_or_no(a.pairs.right, b.pairs.right)
    return found


def yes_or_no(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """The difference of two rates, with McNemar's test: where all rows agree, drawing them again shows no chance."""
    lost, won, p = mcnemar(a, b)
    return paired_difference(a, b).to_json() | {"only_a": lost, "only_b": won, "mcnemar_p": p}


def compare_tasks(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Task -> metric -> difference of its means, with McNemar's exact test where an item is either right or wrong.

    Args:
        a, b: rows of part `task` of either evaluation.rows.jsonl. Items that one of both lacks are left out.
    """
    first, second = _by_metric(a), _by_metric(b)
    found: dict[str, Any] = {}
    for task, metric in sorted(first.keys() & second.keys()):
        ours, theirs = first[task, metric], second[task, metric]
        items = sorted(ours.keys() & theirs.keys(), key=str)
        if not items:
            continue
        pair = [np.array([float(one[item]) for item in items]) for one in (ours, theirs)]
        binary = all(np.isin(values, (0.0, 1.0)).all() for values in pair)
        found.setdefault(task, {})[metric] = yes_or_no(*pair) if binary else paired_difference(*pair).to_json()
    return found


def asked_unlike(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Task -> in what the two were not asked alike: such scores are not compared."""
    ours, theirs = ({row["task"]: row for row in some} for some in (a, b))
    found = {}
    for task in sorted(ours.keys() & theirs.keys()):
        keys = [key for key in ("shots", "chat", "version") if ours[task].get(key) != theirs[task].get(key)]
        if keys:
            found[task] = ", ".join(f"{key} {ours[task].get(key)} and {theirs[task].get(key)}" for key in keys)
    return found


def _task_rows(target: Target) -> list[dict[str, Any]]:
    """The task items that were measured of this subject."""
    earlier = read(target.file)
    if not earlier or not same_subject(earlier["subject"], target.subject()):
        return []
    return [row for row in read_rows(target.file) if row.get("part") == "task"]


def _by_metric(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[Any, float]]:
    """(task, metric) -> item -> value."""
    found: dict[tuple[str, str], dict[Any, float]] = {}
    for row in rows:
        found.setdefault((row["task"], row["metric"]), {})[row["item"]] = row["correct"]
    return found


_NAMES = {
    "loss": "held-out loss, nats a token",
    "token_accuracy": "token accuracy",
    "stop_rate": "answers that end by themselves",
    "format_rate": "answers that are well-formed",
    "reward_accuracy": "pairs rated right",
}


def render(found: Mapping[str, Any]) -> list[str]:
    """`comparison` of evaluation.json in a few lines."""
    lines = [f"A: {found['a']['target']}", f"B: {found['b']['target']}"]
    lines += [
        f"trained on these rows: {name.upper()} {said}"
        for name, said in found["trained_on_rows"].items()
        if said != "no"
    ]
    for name, one in found["figures"].items():
        lines.append(_line(_NAMES[name], one, "rows"))
    for task, metrics in found.get("tasks", {}).items():
        lines += [_line(f"{task}, {metric}", one, "items") for metric, one in metrics.items()]
    for task, how in found.get("tasks_asked_unlike", {}).items():
        lines.append(f"{task} is not compared, since it was asked in two ways ({how}): measure one of them again")
    few = min((one["rows"] for one in found["figures"].values()), default=FEW)
    if few < FEW:
        lines.append(f"{few:,} rows are few: the true interval is wider than it looks")
    return lines


def _line(name: str, one: Mapping[str, Any], unit: str) -> str:
    interval = f"[{one['low']:+.4f}, {one['high']:+.4f}]" if one["low"] is not None else "no interval"
    test = f", McNemar p = {one['mcnemar_p']:.3g}" if "mcnemar_p" in one else ""
    both = f"{one['a']:.4f} -> {one['b']:.4f}, {one['difference']:+.4f}"
    return f"{name}: {both} {interval} over {one['rows']:,} {unit}{test}"
