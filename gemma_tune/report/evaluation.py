"""What evaluation.json says, as tables; and the held-out figures that the run took itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gemma_tune.report import audits
from gemma_tune.report.read import RunFiles, mapping
from gemma_tune.report.tables import SHOWN, Table, any_tables, plain
from gemma_tune.report.words import change, count, cut, figure, is_number, share, signed, when

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
_OF_STAGE = {
    "reward": {"loss": "Loss, nats a pair", "accuracy": "Pairs rated right"},
    "dpo": {"loss": "Loss, nats a pair", "accuracy": "Chosen preferred"},
    "kto": {"loss": "Loss", "accuracy": "On their side of the KL point"},
}
"""The same key in another stage."""
_KNOWN = {
    "format",
    "subject",
    "created",
    "versions",
    "held_out",
    "answers",
    "reward",
    "tasks",
    "memorisation",
    "comparison",
}
_SHARES = {"token_accuracy", "stop_rate", "format_rate", "accuracy", "stopped"}
_SIZES = ("rows", "tokens", "pairs", "prompts", "answers", "ended", "steps")
"""How much was looked at; no figure of a model."""


def held_out_table(files: RunFiles) -> Table | None:
    """Base and tuned on the held-out rows, as the run measured them."""
    results = files.record.get("results") or {}
    stage = str(files.record.get("stage"))
    return _before_after(
        "Held-out figures of the run", stage, mapping(results.get("base")), mapping(results.get("tuned"))
    )


def history(files: RunFiles, limit: int = 60) -> Table | None:
    """The held-out figures of each evaluation: the curves in numbers."""
    rows = [row for row in files.metrics if any(key.startswith("eval_") for key in row)]
    if len(rows) < 2:
        return None
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith("eval_")))[:8]
    stage = str(files.record.get("stage"))
    heads = ("step", *(_name(stage, key[5:]) for key in keys))
    if len(rows) > limit:
        rows = [rows[round(place * (len(rows) - 1) / (limit - 1))] for place in range(limit)]
    cells = tuple((count(row.get("step")), *(_shown(key[5:], row.get(key)) for key in keys)) for row in rows)
    return Table("Held-out figures, step by step", heads, cells)


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables of evaluation.json, in the order of its format; sections of it that are not known come last."""
    made = [_held_out(found.get("held_out")), *_reward(found.get("reward")), _tasks(found.get("tasks"))]
    made += audits.memorisation(mapping(found.get("memorisation")))
    made += audits.comparison(mapping(found.get("comparison")))
    for name in sorted(found.keys() - _KNOWN):
        made += any_tables(cut(plain(name).capitalize(), 120), found[name])
    return [table for table in made if table is not None and table.rows]


def about(found: Mapping[str, Any]) -> str:
    """When and of what evaluation.json was made."""
    subject = mapping(found.get("subject"))
    parts = [f"gemma-tune eval of {subject.get('target')}" if subject.get("target") else "gemma-tune eval"]
    if found.get("created"):
        parts.append(when(found["created"]))
    return ", ".join(parts)


def _name(stage: str, key: str) -> str:
    return _OF_STAGE.get(stage, {}).get(key) or _NAMES.get(key) or plain(key)


def _before_after(title: str, stage: str, base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Table | None:
    keys = [key for key in dict.fromkeys((*base, *tuned)) if key not in _SIZES]
    rows = []
    for key in keys:
        before, after = base.get(key), tuned.get(key)
        if is_number(before) or is_number(after):
            moved = _moved(key, before, after)
            rows.append((_name(stage, key), _shown(key, before), _shown(key, after), moved))
    if not rows:
        return None
    seen = {**base, **tuned}
    sizes = ", ".join(f"{count(seen[key])} {key}" for key in _SIZES[:4] if is_number(seen.get(key)))
    return Table(title, ("", "base", "tuned", "change"), tuple(rows), sizes)


def _moved(key: str, before: Any, after: Any) -> str:
    if not is_number(before) or not is_number(after):
        return ""
    if key in _SHARES:
        return f"{signed(100 * (after - before), 3)} points" if after != before else "0"
    return change(before, after) if key in ("loss", "perplexity") else signed(after - before)


def _shown(key: str, item: Any) -> str:
    if isinstance(item, int) and not isinstance(item, bool):
        return count(item)
    return share(item, 1) if key in _SHARES else figure(item)


def _held_out(found: Any) -> Table | None:
    rows = mapping(found)
    return _before_after(
        "Held-out rows", str(rows.get("stage", "sft")), mapping(rows.get("base")), mapping(rows.get("tuned"))
    )


def _reward(found: Any) -> Iterator[Table]:
    """The figures; what they are of answers by their length as a table of its own."""
    rows = mapping(found)
    plain_ones = {key: item for key, item in rows.items() if not isinstance(item, Mapping | list)}
    cells = tuple((_name("reward", key), _shown(key, item)) for key, item in plain_ones.items() if is_number(item))
    yield Table("Reward model", ("", "value"), cells)
    yield from any_tables("Reward model, more", {key: item for key, item in rows.items() if key not in plain_ones})


def _tasks(found: Any) -> Table | None:
    """Metric with its standard error, and beside the metric that the model card has, the card's figure.

    A task that did not run has one row, with the reason.
    """
    if not isinstance(found, Mapping):
        return None
    rows = []
    for task, one in found.items():
        if not isinstance(one, Mapping) or not isinstance(one.get("metrics"), Mapping):
            continue
        metrics, card = one["metrics"], mapping(one.get("card"))
        doubt = "" if card.get("stated", True) else " (shots not stated)"
        stated = f"{figure(card['figure'])}{doubt}" if is_number(card.get("figure")) else "–"
        if one.get("skipped"):
            left_out = f"left out: {cut(one['skipped'], 200)}"
            rows.append((cut(task, 80), cut(card.get("metric") or "–", 80), left_out, "–", "–", stated))
            continue
        for name, item in metrics.items():
            kind, comma, own = name.partition(",")  # lm-eval has the error of `acc,f` under `acc_stderr,f`
            if kind.endswith("_stderr") or not is_number(item):
                continue
            error = metrics.get(f"{kind}_stderr{comma}{own}")
            text = figure(item) + (f" ± {figure(error, 2)}" if is_number(error) else "")
            beside = stated if name == card.get("metric") else "–"
            rows.append((cut(task, 80), cut(name, 80), text, count(one.get("shots")), count(one.get("items")), beside))
    heads = ("task", "metric", "measured", "shots", "items", "model card")
    return Table("Tasks", heads, tuple(rows[:SHOWN]), "± is one standard error.") if rows else None
