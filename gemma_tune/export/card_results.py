"""What a model card says of how well it does, by the figures of its run and what was evaluated since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune.export.card_evaluation import further_tables, task_results, tasks_of
from gemma_tune.export.markdown import is_number, table, value_text

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


def results_of(subject: Subject, evaluation: Mapping[str, Any]) -> list[Any]:
    """The figures after training for the hub's model-index; none where none were measured.

    Args:
        evaluation: from `evaluation_of`.
    """
    return [*_held_out_results(subject, evaluation), *task_results(evaluation)]


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
    further = further_tables(evaluation)
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


def limits_of(subject: Subject, evaluation: Mapping[str, Any]) -> list[str]:
    """What the figures are not about."""
    asked = any(True for _ in tasks_of(evaluation))
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
