"""Task items that two evaluations have in common, and how a comparison is said."""

from __future__ import annotations

from typing import Any

from gemma_tune.evaluation.compare import asked_unlike, compare_tasks, render, yes_or_no


def rows(values: list[float], task: str = "t", metric: str = "acc", first: int = 0) -> list[dict[str, Any]]:
    return [
        {"part": "task", "task": task, "metric": metric, "item": first + place, "correct": value}
        for place, value in enumerate(values)
    ]


def test_items_are_paired_by_their_number_and_not_by_their_place() -> None:
    a = rows([0, 0, 0, 1, 1, 1])
    b = list(reversed(rows([1, 1, 1, 1, 1, 0])))
    found = compare_tasks(a, b)["t"]["acc"]
    assert (found["only_a"], found["only_b"], found["rows"]) == (1, 3, 6)
    assert found["difference"] == 2 / 6 and found["mcnemar_p"] == 10 / 16


def test_only_what_both_have_is_compared() -> None:
    a = [*rows([1, 0, 1]), *rows([1], "mine"), *rows([0.5, 1], metric="f1")]
    b = [*rows([1, 1], first=2), *rows([1, 1], metric="f1"), *rows([1], "other")]
    found = compare_tasks(a, b)
    assert found.keys() == {"t"} and found["t"]["acc"]["rows"] == 1
    assert found["t"]["f1"]["difference"] == 0.25 and "mcnemar_p" not in found["t"]["f1"]
    assert compare_tasks(a, []) == {}


def test_how_it_is_said() -> None:
    subject = {"target": "runs/a"}
    found = {
        "a": subject,
        "b": {"target": "runs/b"},
        "trained_on_rows": {"a": "no", "b": "not known: there is no plan"},
        "figures": {"stop_rate": yes_or_no([0] * 12, [1] * 12)},
        "tasks": {"t": {"acc": yes_or_no([1, 0], [1, 0])}},
    }
    assert render(found) == [
        "A: runs/a",
        "B: runs/b",
        "trained on these rows: B not known: there is no plan",
        "answers that end by themselves: 0.0000 -> 1.0000, +1.0000 [+1.0000, +1.0000] over 12 rows, "
        "McNemar p = 0.000488",
        "t, acc: 0.5000 -> 0.5000, +0.0000 [+0.0000, +0.0000] over 2 items, McNemar p = 1",
        "12 rows are few: the true interval is wider than it looks",
    ]


def test_items_that_were_asked_otherwise_are_not_compared() -> None:
    a, b = ([row | {"shots": shots, "chat": False, "version": 1} for row in rows([1, 0])] for shots in (0, 5))
    assert asked_unlike(a, b) == {"t": "shots 0 and 5"} and asked_unlike(a, a) == {}
    assert asked_unlike(a, rows([1], "other")) == {}
    subject = {"target": "runs/a"}
    found = {"a": subject, "b": subject, "trained_on_rows": {}, "figures": {}, "tasks_asked_unlike": asked_unlike(a, b)}
    assert render(found)[-1].startswith("t is not compared, since it was asked in two ways (shots 0 and 5)")
