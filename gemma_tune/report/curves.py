"""Which curves a report of each stage has, and what they are made of: keys of metrics.jsonl, names, units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gemma_tune.report.series import Series, Value, columns, make_series, speeds
from gemma_tune.report.words import GIB, is_number, size

TRAIN, HELD_OUT, PLAIN, SECOND = "train", "held_out", "plain", "second"
"""Roles of a curve: each has its colour, the same in all charts."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve: its key in metrics.jsonl, what its label says, its role, and a factor."""

    key: str
    name: str
    role: str = PLAIN
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Sheet:
    """What is drawn together.

    Attributes:
        title, unit: above the chart.
        curves: those of them that the run has are drawn.
        about: one sentence on how to read it.
        wide: whether it has the whole width.
        share: whether values are fractions, shown as percent.
        spiky: whether one step can be many times the others, so that powers of ten may be needed.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    about: str = ""
    wide: bool = False
    share: bool = False
    spiky: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """A sheet with its data. `marks`: (value, what lies there) of horizontal lines; `resumed`: steps."""

    sheet: Sheet
    series: tuple[Series, ...]
    marks: tuple[tuple[float, str], ...] = ()
    resumed: tuple[int, ...] = field(default=())


def _both(key: str, held: str | None = None) -> tuple[Curve, ...]:
    return Curve(key, "training", TRAIN), Curve(held or f"eval_{key}", "held-out", HELD_OUT)


_LOSS = Sheet(
    "Loss",
    "nats a token",
    _both("loss"),
    "Lower is better. Where the held-out curve turns up while training goes on down, the model learns rows by heart.",
    wide=True,
)
_ACCURACY = Sheet("Token accuracy", "first guess right", _both("token_accuracy"), share=True)
_PAIR_LOSS = Sheet("Loss", "nats a pair", _both("loss"), "Lower is better; 0.693 is a coin's.", wide=True)

_SHEETS: Mapping[str, tuple[Sheet, ...]] = {
    "sft": (_LOSS, _ACCURACY),
    "reward": (
        _PAIR_LOSS,
        Sheet("Pairs rated right", "share", _both("accuracy"), "Half is what chance gets.", share=True),
        Sheet("Margin", "reward of chosen − rejected", _both("margin")),
        Sheet(
            "Held-out rewards",
            "mean",
            (
                Curve("eval_chosen_mean", "chosen", HELD_OUT),
                Curve("eval_rejected_mean", "rejected", SECOND),
                Curve("eval_mean", "all", PLAIN),
            ),
        ),
        Sheet("Reward and length", "correlation", (Curve("eval_length_correlation", "held-out", HELD_OUT),)),
    ),
    "dpo": (
        _PAIR_LOSS,
        Sheet("Chosen preferred", "share of pairs", _both("rewards/accuracies", "eval_accuracy"), share=True),
        Sheet("Margin", "implicit reward of chosen − rejected", _both("rewards/margins", "eval_margin")),
        Sheet(
            "Log-probability of answers",
            "nats an answer",
            (
                Curve("eval_chosen_logps", "chosen", HELD_OUT),
                Curve("eval_rejected_logps", "rejected", SECOND),
            ),
            "Held-out. Both often fall; the chosen ones should fall less.",
        ),
        Sheet(
            "Implicit rewards",
            "mean",
            (Curve("rewards/chosen", "chosen", TRAIN), Curve("rewards/rejected", "rejected", SECOND)),
            "In training.",
        ),
    ),
    "kto": (
        Sheet("Loss", "mean of an answer", _both("loss"), "Lower is better.", wide=True),
        Sheet(
            "On their side of the KL point",
            "share of held-out answers",
            (Curve("eval_accuracy", "held-out", HELD_OUT),),
            share=True,
        ),
        Sheet(
            "Rewards of held-out answers",
            "mean",
            (Curve("eval_good_reward", "good", HELD_OUT), Curve("eval_bad_reward", "bad", SECOND)),
        ),
        Sheet("Margin", "reward of good − bad, in training", (Curve("rewards/margins", "training", TRAIN),)),
        Sheet("KL point", "nats", _both("kl")),
    ),
    "ppo": (
        Sheet(
            "Reward",
            "score of a response",
            _both("objective/scores", "eval_score"),
            "Of the recipe's reward, before clipping and penalties. Rising is what PPO does; whether the answers are "
            "better, the answers show.",
            wide=True,
        ),
        Sheet(
            "Distance from the reference (KL)",
            "nats a response",
            _both("objective/kl", "eval_kl"),
            "What the reward was bought with.",
        ),
        Sheet("Entropy", "nats a token", _both("objective/entropy", "eval_entropy"), "Near 0, all answers are one."),
        Sheet(
            "Clip fraction",
            "share of tokens",
            (Curve("policy/clipfrac_avg", "policy", TRAIN), Curve("val/clipfrac_avg", "value", SECOND)),
            share=True,
        ),
        Sheet(
            "Explained variance",
            "of the returns, by the critic",
            (Curve("val/explained_variance", "critic", SECOND),),
            "1 is a perfect critic; below 0, a constant would do better.",
        ),
        Sheet("KL of an update", "nats a token", (Curve("policy/approxkl_avg", "policy", TRAIN),), spiky=True),
        Sheet(
            "Length of a response",
            "tokens",
            _both("rollout/length", "eval_response_length"),
        ),
        Sheet("Stopped by themselves", "share of responses", _both("rollout/stopped", "eval_stopped"), share=True),
        Sheet("Policy loss", "mean of a token", (Curve("loss/policy_avg", "policy", TRAIN),)),
        Sheet("Value loss", "mean of a token", (Curve("loss/value_avg", "value", SECOND),), spiky=True),
        Sheet("KL coefficient", "of the penalty", (Curve("objective/kl_coefficient", "coefficient", PLAIN),)),
    ),
}
_SHARED = (
    Sheet("Learning rate", "", (Curve("learning_rate", "learning rate"),)),
    Sheet(
        "Gradient norm",
        "before clipping",
        (
            Curve("grad_norm", "gradient", TRAIN),
            Curve("policy/grad_norm", "policy", TRAIN),
            Curve("value/grad_norm", "value", SECOND),
        ),
        spiky=True,
    ),
)
_SPEED = Sheet("Speed", "tokens a second, padding not counted", ())
_MEMORY = Sheet(
    "Memory",
    "GiB, the highest so far",
    (Curve("peak_cuda", "GPU", TRAIN, 1 / GIB), Curve("peak_rss", "process", PLAIN, 1 / GIB)),
)


def make_charts(
    stage: str,
    metrics: Sequence[Mapping[str, Any]],
    *,
    estimate: float | None = None,
    room: float | None = None,
    resumed: Sequence[int] = (),
) -> list[Chart]:
    """The charts of a run, those of its stage first. A sheet without any finite value is left out.

    Args:
        stage: of the run.
        metrics: lines of metrics.jsonl.
        estimate: bytes that the plan counted on, of the device's memory.
        room: bytes that the device has.
        resumed: steps after which the run was resumed.
    """
    found = columns(metrics)
    sheets = (*_SHEETS.get(stage, (_LOSS,)), *_SHARED)
    charts = [chart for sheet in sheets if (chart := _chart(sheet, found, resumed)) is not None]
    if (speed := make_series("speed", speeds(metrics), PLAIN)) is not None:
        charts.append(Chart(_SPEED, (speed,), (), tuple(resumed)))
    if (memory := _chart(_MEMORY, found, resumed)) is not None:
        charts.append(Chart(_MEMORY, memory.series, tuple(_limits(memory, estimate, room)), tuple(resumed)))
    return charts


def _chart(sheet: Sheet, found: Mapping[str, Sequence[Value]], resumed: Sequence[int]) -> Chart | None:
    series = tuple(
        replace(one, measured=curve.key.startswith("eval_"))
        for curve in sheet.curves
        if (one := make_series(curve.name, found.get(curve.key, ()), curve.role, scale=curve.scale)) is not None
    )
    return Chart(sheet, series, (), tuple(resumed)) if series else None


def _limits(memory: Chart, estimate: float | None, room: float | None) -> Iterator[tuple[float, str]]:
    """The plan's estimate, and the memory of the device where the run came near it."""
    highest = max(one.highest[1] for one in memory.series) * GIB
    if is_number(estimate):
        yield estimate / GIB, f"estimated {size(estimate)}"
    if is_number(room) and room <= 2 * max(highest, estimate or 0):
        yield room / GIB, f"the device has {size(room)}"


def unused_keys(stage: str, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys of metrics.jsonl that no chart of the stage shows."""
    drawn = {curve.key for sheet in (*_SHEETS.get(stage, (_LOSS,)), *_SHARED, _MEMORY) for curve in sheet.curves}
    counters = {"step", "epoch", "tokens_seen", "tokens_trained", "train_seconds", "tokens_per_second"}
    return sorted({key for row in metrics for key in row} - drawn - counters)
