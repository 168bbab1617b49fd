"""The held-out figures of a run in a few lines: base -> tuned, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Results = Mapping[str, Any]


def figures(stage: str, results: Results) -> list[str]:
    """The lines for `results` of run.json. Figures that are not there are left out."""
    return [*held_out(stage, results), *_answers(results), _cost(results)]


def held_out(stage: str, results: Results) -> list[str]:
    """The lines for the held-out rows alone."""
    return _HELD_OUT[stage](results)


def _sft(results: Results) -> list[str]:
    base, tuned = _both(results)
    if base.get("loss") is None or tuned.get("loss") is None:
        return []
    return [
        f"held-out loss: {base['loss']:.4f} -> {tuned['loss']:.4f} ({-100 * results['relative_fall']:+.1f} %), "
        f"perplexity {base['perplexity']:.2f} -> {tuned['perplexity']:.2f}, "
        f"token accuracy {base['token_accuracy']:.3f} -> {tuned['token_accuracy']:.3f}"
    ]


def _reward(results: Results) -> list[str]:
    base, tuned = _both(results)
    if base.get("accuracy") is None or tuned.get("accuracy") is None:
        return []
    lines = [
        f"held-out pairs rated right: {base['accuracy']:.1%} -> {tuned['accuracy']:.1%} of {tuned['pairs']:,}, "
        f"margin {base['margin']:.3f} -> {tuned['margin']:.3f}",
        f"rewards: mean {base['mean']:.3f} -> {tuned['mean']:.3f}, "
        f"standard deviation {base['std']:.3f} -> {tuned['std']:.3f}",
    ]
    if tuned.get("length_correlation") is not None:
        was = base.get("length_correlation")
        before = f"{was:+.2f} -> " if was is not None else ""
        lines.append(f"correlation of reward and length of the answer: {before}{tuned['length_correlation']:+.2f}")
    return lines


def _dpo(results: Results) -> list[str]:
    base, tuned = _both(results)
    lines = []
    if base.get("loss") is not None and tuned.get("loss") is not None:
        # Before the first step policy and reference are one: no pair is won and no margin is there to speak of.
        lines.append(
            f"held-out loss: {base['loss']:.4f} -> {tuned['loss']:.4f}, chosen preferred to rejected in "
            f"{tuned['accuracy']:.1%} of {tuned['pairs']:,} pairs, margin {tuned['margin']:.3f}"
        )
        lines.append(
            f"log-probability of the answers: chosen {base['chosen_logps']:.1f} -> {tuned['chosen_logps']:.1f}, "
            f"rejected {base['rejected_logps']:.1f} -> {tuned['rejected_logps']:.1f} nats"
        )
    if tuned.get("kl") is not None:
        lines.append(f"distance from the reference (KL): {tuned['kl']:.2f} nats an answer")
    return lines


def _kto(results: Results) -> list[str]:
    base, tuned = _both(results)
    if base.get("loss") is None or tuned.get("loss") is None:
        return []
    rewards = ((name, tuned.get(f"{name}_reward")) for name in ("good", "bad"))
    shown = ", ".join(f"{name} {value:+.3f}" for name, value in rewards if value is not None)
    # As with DPO, all rewards are 0 before the first step.
    return [
        f"held-out loss: {base['loss']:.4f} -> {tuned['loss']:.4f}, {tuned['accuracy']:.1%} of {tuned['rows']:,} "
        "answers on their side of the KL point",
        f"rewards of the answers: {shown}; KL point {tuned['kl']:.2f} nats",
    ]


def _ppo(results: Results) -> list[str]:
    base, tuned = _both(results)
    if base.get("score") is None or tuned.get("score") is None:
        return []
    rise = results.get("score_rise")  # in what chance would move the mean of one step's responses by
    chance = f", {rise:+.1f} standard deviations of a step's mean" if rise is not None else ""
    return [
        f"score of responses to {tuned['prompts']:,} held-out prompts: {_pair(base, tuned, 'score', '.3f')} "
        f"({tuned['score'] - base['score']:+.3f}{chance})",
        f"distance from the reference (KL): {_pair(base, tuned, 'kl', '.2f')} nats a response "
        f"(k3: {_pair(base, tuned, 'kl_k3', '.2f')}); entropy {_pair(base, tuned, 'entropy', '.2f')} nats a token",
        f"length of a response: {_pair(base, tuned, 'response_length', '.1f')} tokens; stopped by themselves: "
        f"{_pair(base, tuned, 'stopped', '.1%')}",
    ]


def _pair(base: Results, tuned: Results, key: str, form: str) -> str:
    """`0.120 -> 0.840`."""
    return f"{base[key]:{form}} -> {tuned[key]:{form}}"


_HELD_OUT: dict[str, Callable[[Results], list[str]]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "kto": _kto,
    "ppo": _ppo,
}


def _both(results: Results) -> tuple[Results, Results]:
    return results.get("base", {}), results.get("tuned", {})


def _answers(results: Results) -> list[str]:
    base, tuned = _both(results)
    if not tuned.get("answers"):
        return []
    return [f"answers that end by themselves: {base['ended']} -> {tuned['ended']} of {tuned['answers']} prompts"]


def _cost(results: Results) -> str:
    memory = results.get("peak_memory", {})
    peak = ", ".join(f"{size / 2**30:.2f} GiB {name}" for name, size in memory.items())
    speed = results.get("tokens_per_second") or 0
    return (
        f"{results.get('steps', 0):,} steps, {results.get('tokens_seen', 0):,} tokens in "
        f"{results.get('train_seconds', 0):,.1f} s of training ({speed:,.0f} tokens/s); peak memory {peak}"
    )
