"""What a model card says of how well it does: run.json and, where it is of these weights, evaluation.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune.export.markdown import flat, is_number, table, value_text, words
from gemma_tune.gemma.licences import last_name

if TYPE_CHECKING:
    from gemma_tune.export.subject import Subject

# Key in results.base and results.tuned of run.json -> what it is, with its unit.
FIGURES: dict[str, dict[str, str]] = {
    "sft": {"loss": "loss, nats a token", "perplexity": "perplexity", "token_accuracy": "token accuracy"},
    "reward": {
        "loss": "loss",
        "accuracy": "pairs rated right",
        "margin": "margin of the rewards",
        "mean": "mean reward",
        "std": "standard deviation of the rewards",
        "length_correlation": "correlation of reward and length",
    },
    "dpo": {
        "loss": "loss",
        "accuracy": "pairs whose chosen answer is preferred",
        "margin": "margin of the implicit rewards",
        "chosen_logps": "log-probability of chosen answers, nats",
        "rejected_logps": "log-probability of rejected answers, nats",
        "kl": "KL from the reference, nats an answer",
    },
    "kto": {
        "loss": "loss",
        "accuracy": "answers on their side of the KL point",
        "good_reward": "reward of good answers",
        "bad_reward": "reward of bad answers",
        "kl": "KL point, nats",
    },
    "ppo": {
        "score": "score of the responses",
        "kl": "KL from the reference, nats a response",
        "entropy": "entropy, nats a token",
        "response_length": "tokens of a response",
        "stopped": "responses that stop by themselves",
    },
}
_COUNTED = ("pairs", "prompts", "rows")
_SINCE = {"dpo": ("accuracy", "margin", "kl"), "kto": ("accuracy", "good_reward", "bad_reward", "kl")}
"""Figures against the reference, which the policy still is before the first step: there is no value before."""
_OF_ANSWERS = {
    "stop_rate": "answers that end by themselves, greedy, share",
    "format_rate": "answers that are well-formed turns, greedy, share",
}
_OF_REWARDS = {
    "length_rank_correlation": "rank correlation of reward and length",
    "difference_correlation": "correlation of the differences in a pair, of reward and length",
    "calibration_error": "calibration error of the differences",
}
_HELD_OUT_ROWS = "held-out rows of the training data"


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


def results_of(subject: Subject, evaluation: Mapping[str, Any]) -> list[Any]:
    """The figures after training for the hub's model-index; none where none were measured.

    Args:
        evaluation: from `evaluation_of`.
    """
    return [*_held_out_results(subject, evaluation), *_task_results(evaluation)]


def _held_out_results(subject: Subject, evaluation: Mapping[str, Any]) -> list[Any]:
    from huggingface_hub import EvalResult

    stage, tuned = str(subject.run.get("stage")), {**_measured_since(subject, evaluation), **tuned_of(subject)}
    names = FIGURES.get(stage, {}) | _OF_ANSWERS | (_OF_REWARDS if stage == "reward" else {})
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=_HELD_OUT_ROWS,
            metric_type=key,
            metric_value=tuned[key],
            metric_name=name,
        )
        for key, name in names.items()
        if is_number(tuned.get(key)) and math.isfinite(tuned[key])
    ]


def _task_results(evaluation: Mapping[str, Any]) -> list[Any]:
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
        for task, about in _tasks(evaluation)
        for metric, value in about["metrics"].items()
        if is_number(value) and math.isfinite(value) and not _is_error(metric)
    ]


def _tasks(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks of an evaluation; what else stands beside them says how they were asked."""
    for task, about in (evaluation.get("tasks") or {}).items():
        if isinstance(about, Mapping) and isinstance(about.get("metrics"), Mapping):
            yield last_name(str(task)), about


def _with_shots(metric: str, about: Mapping[str, Any]) -> str:
    shots = about.get("shots")
    return f"{metric}, {shots} shots" if is_number(shots) else metric


def _measured_since(subject: Subject, evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluation adds to the run's own figures: of the same rows, and all of them."""
    part = evaluation.get("held_out") or {}
    own = (subject.run.get("data") or {}).get("fingerprint")
    tuned = part.get("tuned") or {}
    counted = next((key for key in _COUNTED if key in tuned), None)
    whole = counted is None or tuned[counted] == tuned_of(subject).get(counted, tuned[counted])
    if own is None or part.get("fingerprint") != own or not whole:
        return {}
    return {**(evaluation.get("reward") or {}), **tuned}


def tuned_of(subject: Subject) -> Mapping[str, Any]:
    """The figures after the training, where what leaves is what they were measured of."""
    return (subject.run.get("results") or {}).get("tuned") or {} if subject.measured else {}


def _unmeasured(subject: Subject) -> str | None:
    """Why the figures of a run are not those of what leaves; None where they are, or where there is no run."""
    scaled = any(one.weight != 1.0 for one in subject.adapters)
    if len(subject.adapters) > 1:
        shares = ", ".join(f"{one.weight:g}" for one in subject.adapters)
        what = f"This combination with the weights {shares}"
    elif scaled:
        what = f"This adapter, scaled by {subject.adapters[0].weight:g},"
    elif subject.run and not subject.measured:
        place = subject.adapters[0].folder if subject.adapters else subject.source.path
        what = f"This state of the model (`{place.name}`), which is not what its run ended with,"
    else:
        return None
    return f"{what} was not evaluated."


def evaluation_section(subject: Subject, evaluation: Mapping[str, Any], *, same: bool) -> str:
    """What was measured, before and after; tasks and memorisation where `evaluation` has them.

    Args:
        evaluation: from `evaluation_of`.
        same: what leaves computes as what was measured, up to rounding to 16 bits.
    """
    if why := _unmeasured(subject):
        return f"## Evaluation\n\n{why}\n"
    base, tuned = (subject.run.get("results") or {}).get("base") or {}, tuned_of(subject)
    names = FIGURES.get(str(subject.run.get("stage")), {})
    since = _SINCE.get(str(subject.run.get("stage")), ())
    rows = [
        (name, value_text(base[key]) if is_number(base.get(key)) and key not in since else "", value_text(tuned[key]))
        for key, name in names.items()
        if is_number(tuned.get(key))
    ]
    for source, rewards in (tuned.get("sources") or {}).items():
        before = (base.get("sources") or {}).get(source, {}).get("mean")
        rows.append(
            (f"reward by `{source}`", value_text(before) if before is not None else "", value_text(rewards["mean"]))
        )
    if tuned.get("answers"):
        ended = f"{tuned.get('ended')} of {tuned['answers']}"
        before = f"{base['ended']} of {base['answers']}" if base.get("answers") else ""
        rows.append(("answers that end by themselves, greedy", before, ended))
    rows += _rows_since(subject, evaluation)
    further = _further(evaluation)
    if not rows:
        return f"## Evaluation\n\n{further}" if further else ""
    counted = next((f"{tuned[key]:,} {key}" for key in _COUNTED if tuned.get(key)), "rows")
    text = f"## Evaluation\n\nOn {counted} that were held out of the training data, before and after the training"
    text += ":\n\n" if same else " (as it ran, before the export):\n\n"
    text += table(("figure", "before", "after"), rows)
    text += f"\nThe KL was measured on {tuned['kl_answers']} answers.\n" if tuned.get("kl_answers") else ""
    return f"{text}\n{further}" if further else text


def _rows_since(subject: Subject, evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Figures that `gemma-tune eval` adds to those of the run, on the same rows."""
    since = _measured_since(subject, evaluation)
    base = (evaluation.get("held_out") or {}).get("base") or {}
    names = {"format_rate": _OF_ANSWERS["format_rate"]} | _OF_REWARDS
    return [
        (name, value_text(base[key]) if is_number(base.get(key)) else "", value_text(since[key]))
        for key, name in names.items()
        if is_number(since.get(key))
    ]


def _further(evaluation: Mapping[str, Any]) -> str:
    """Tables of tasks and of memorisation; empty where neither was measured."""
    parts = []
    rows = [
        (task, _with_shots(metric, about), value_text(about.get("items") or ""), _with_error(about["metrics"], metric))
        for task, about in _tasks(evaluation)
        for metric, value in about["metrics"].items()
        if is_number(value) and not _is_error(metric)
    ]
    if rows:
        parts.append("Tasks of lm-evaluation-harness:\n\n" + table(("task", "metric", "items", "value"), rows))
    found = [
        (words(name), value_text(value))
        for name, value in flat(evaluation.get("memorisation") or {})
        if is_number(value)
    ]
    if found:
        parts.append("Memorisation of the training data:\n\n" + table(("figure", "value"), found))
    return "\n".join(parts)


def _is_error(metric: str) -> bool:
    """lm-eval puts the standard error of `acc,none` under `acc_stderr,none`."""
    return metric.partition(",")[0].endswith("_stderr")


def _with_error(metrics: Mapping[str, Any], metric: str) -> str:
    name, comma, kind = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{kind}")
    return value_text(metrics[metric]) + (f" ± {value_text(error)}" if is_number(error) else "")


def limits_of(subject: Subject, evaluation: Mapping[str, Any]) -> list[str]:
    """What the figures are not about."""
    asked = any(True for _ in _tasks(evaluation))
    lines = []
    if not subject.run:
        lines.append("How it was trained, on what, and how well it does is not recorded here.")
    elif subject.measured and not any(is_number(value) for value in tuned_of(subject).values()):
        lines.append(nothing_evaluated(subject))
    elif subject.measured and not asked:
        lines.append("It was evaluated on held-out rows of its own training data only.")
    if asked:
        lines.append(
            "Not evaluated: what the tasks above do not ask, and languages other than theirs and those of the data."
        )
    else:
        lines.append("Not evaluated: benchmarks, facts, safety, bias, and languages other than those of the data.")
    return lines


def nothing_evaluated(subject: Subject) -> str:
    held_out = ((subject.run.get("data") or {}).get("report") or {}).get("held_out")
    if held_out == 0:
        return "No rows were held out: nothing was evaluated."
    what = f"{held_out:,} rows were held out, and not evaluated" if is_number(held_out) else "Nothing was evaluated"
    return f"{what}." if subject.run.get("status") == "finished" else f"{what}: the run did not finish."
