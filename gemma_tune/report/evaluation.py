"""What evaluation.json says, as tables; and the held-out figures that the run took itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.report.read import RunFiles, mapping
from gemma_tune.report.words import change, count, cut, figure, is_number, share, signed, when

SHOWN = 200
"""Rows of a table at most."""

_NAMES = {
    "loss": "Loss, nats a token",
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
    "stop_rate": "Answers that end by themselves",
    "format_rate": "Answers in the format of the data",
    "accuracy": "Rated right",
    "margin": "Margin",
    "mean": "Mean reward",
    "std": "Standard deviation of rewards",
    "chosen_mean": "Mean reward, chosen",
    "rejected_mean": "Mean reward, rejected",
    "length_correlation": "Correlation of reward and length",
    "chosen_logps": "log p of chosen answers, nats",
    "rejected_logps": "log p of rejected answers, nats",
    "chosen_rewards": "Implicit reward, chosen",
    "rejected_rewards": "Implicit reward, rejected",
    "good_reward": "Implicit reward, good answers",
    "bad_reward": "Implicit reward, bad answers",
    "kl": "KL from the reference, nats",
    "kl_k3": "the same, estimator k3",
    "score": "Score",
    "score_std": "Standard deviation of scores",
    "entropy": "Entropy, nats a token",
    "response_length": "Tokens of a response",
    "stopped": "Stopped by themselves",
    "pairs": "Pairs",
}
_SHARES = {"token_accuracy", "stop_rate", "format_rate", "accuracy", "stopped"}
_SIZES = ("rows", "tokens", "pairs", "prompts", "answers", "ended", "steps")
"""How much was looked at; no figure of a model."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: `title`, the heads of its columns, rows whose first cell names them, and a sentence below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    about: str = ""


def held_out_table(files: RunFiles) -> Table | None:
    """Base and tuned on the held-out rows, as the run measured them."""
    results = files.record.get("results") or {}
    return _before_after("Held-out figures of the run", results.get("base") or {}, results.get("tuned") or {})


def history(files: RunFiles, limit: int = 60) -> Table | None:
    """The held-out figures of each evaluation: the curves in numbers."""
    rows = [row for row in files.metrics if any(key.startswith("eval_") for key in row)]
    if len(rows) < 2:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith("eval_")))[:8]
    heads = ("Step", *(_NAMES.get(key[5:], key[5:]) for key in keys))
    if len(rows) > limit:
        rows = [rows[round(place * (len(rows) - 1) / (limit - 1))] for place in range(limit)]
    cells = tuple((count(row.get("step")), *(_shown(key[5:], row.get(key)) for key in keys)) for row in rows)
    return Table("Held-out figures, step by step", heads, cells)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of evaluation.json, in the order of its format; sections of it that are not known come last."""
    made = [_held_out(found.get("held_out")), _reward(found.get("reward")), _tasks(found.get("tasks"))]
    made += list(_plain("Memorisation", found.get("memorisation")))
    known = {"format", "subject", "created", "versions", "held_out", "answers", "reward", "tasks", "memorisation"}
    for name in sorted(found.keys() - known):
        made += list(_plain(name.replace("_", " ").capitalize(), found[name]))
    return [table for table in made if table is not None and table.rows]


def about(found: Mapping[str, Any]) -> str:
    """When and of what evaluation.json was made."""
    subject = mapping(found.get("subject"))
    parts = [f"gemma-tune eval of {subject.get('target')}" if subject.get("target") else "gemma-tune eval"]
    if found.get("created"):
        parts.append(when(found["created"]))
    return ", ".join(parts)


def _before_after(title: str, base: Mapping[str, Any], tuned: Mapping[str, Any], note: str = "") -> Table | None:
    keys = [key for key in dict.fromkeys((*base, *tuned)) if key not in _SIZES]
    rows = []
    for key in keys:
        before, after = base.get(key), tuned.get(key)
        if is_number(before) or is_number(after):
            moved = _moved(key, before, after)
            rows.append((_NAMES.get(key, key.replace("_", " ")), _shown(key, before), _shown(key, after), moved))
    if not rows:
        return None
    seen = {**base, **tuned}
    sizes = ", ".join(f"{count(seen[key])} {key}" for key in _SIZES[:4] if is_number(seen.get(key)))
    return Table(title, ("", "base", "tuned", "change"), tuple(rows), ". ".join(filter(None, (sizes, note))))


def _moved(key: str, before: Any, after: Any) -> str:
    if not is_number(before) or not is_number(after):
        return ""
    if key in _SHARES:
        return f"{signed(100 * (after - before), 3)} points" if after != before else "0"
    return change(before, after) if key in ("loss", "perplexity") else signed(after - before)


def _shown(key: str, item: Any) -> str:
    return share(item, 1) if key in _SHARES else figure(item)


def _held_out(found: Any) -> Table | None:
    if not isinstance(found, Mapping):
        return None
    sizes = ", ".join(f"{count(found[key])} {key}" for key in ("rows", "tokens") if is_number(found.get(key)))
    return _before_after("Held-out rows", mapping(found.get("base")), mapping(found.get("tuned")), sizes)


def _reward(found: Any) -> Table | None:
    if not isinstance(found, Mapping):
        return None
    if isinstance(found.get("base"), Mapping) or isinstance(found.get("tuned"), Mapping):
        return _before_after("Reward model", found.get("base") or {}, found.get("tuned") or {})
    rows = tuple((_NAMES.get(key, key.replace("_", " ")), _shown(key, item)) for key, item in _leaves(found))
    return Table("Reward model", ("", "value"), rows)


def _tasks(found: Any) -> Table | None:
    """Metric with its standard error, and the figure of the model card where there is one."""
    if not isinstance(found, Mapping):
        return None
    rows = []
    for task, one in found.items():
        if not isinstance(one, Mapping) or not isinstance(one.get("metrics"), Mapping):
            continue
        metrics, card = one["metrics"], one.get("card")
        for name, item in metrics.items():
            if name.endswith("_stderr") or not is_number(item):
                continue
            error = metrics.get(f"{name}_stderr")
            text = figure(item) + (f" ± {figure(error, 2)}" if is_number(error) else "")
            stated = "–"
            if isinstance(card, Mapping):
                doubt = "" if card.get("stated", True) else " (shots not stated)"
                stated = f"{figure(card.get('figure'))}{doubt}"
            rows.append((cut(task, 80), name, text, count(one.get("shots")), count(one.get("items")), stated))
    heads = ("Task", "metric", "tuned", "shots", "items", "model card")
    return Table("Tasks", heads, tuple(rows[:SHOWN]), "± is one standard error.") if rows else None


def _plain(title: str, found: Any) -> Iterator[Table]:
    """Any mapping as a table of its leaves; lists of mappings as tables of their own."""
    if not isinstance(found, Mapping):
        return
    rows = tuple((key, _leaf(item)) for key, item in _leaves(found))
    if rows:
        yield Table(title, ("", "value"), rows[:SHOWN])
    for name, items in found.items():
        if isinstance(items, Mapping):
            yield from _lists(f"{title}: {name.replace('_', ' ')}", items)
    yield from _lists(title, found)


def _lists(title: str, found: Mapping[str, Any]) -> Iterator[Table]:
    for name, items in found.items():
        if not isinstance(items, Sequence) or isinstance(items, str):
            continue
        lines = [item for item in items if isinstance(item, Mapping)]
        keys = list(dict.fromkeys(key for line in lines for key in line))[:8]
        if keys:
            rows = tuple(tuple(_leaf(line.get(key)) for key in keys) for line in lines[:SHOWN])
            yield Table(f"{title}, {name.replace('_', ' ')}", tuple(key.replace("_", " ") for key in keys), rows)


def _leaves(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in found.items():
        name = f"{before}{str(key).replace('_', ' ')}"
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{name}, ")
        elif isinstance(item, str | int | float) or item is None:
            yield (name if before else str(key), item)


def _leaf(item: Any) -> str:
    if item is None:
        return "–"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return count(item)
    return figure(item) if isinstance(item, float) else cut(item, 120)
