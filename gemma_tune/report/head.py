"""The first screen of a report: what ran, how it ended, what came of it, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from gemma_tune.report.read import RunFiles, mapping
from gemma_tune.report.words import change, count, duration, figure, is_number, moment, share, short_count, signed, size

Results = Mapping[str, Any]

STAGES = {
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation",
    "kto": "KTO",
    "ppo": "PPO",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One of the figures that matter: `before` is empty where there is nothing to compare with."""

    name: str
    before: str
    after: str
    about: str


@dataclass(frozen=True, slots=True)
class Command:
    """Something to do next; `text` is what to type."""

    about: str
    text: str


def title(files: RunFiles) -> str:
    """The name of the run: its folder's."""
    return files.folder.name or files.folder.resolve().name


def subtitle(files: RunFiles) -> str:
    """`Supervised fine-tuning of google/gemma-3-270m, QLoRA`."""
    stage = str(files.record.get("stage", ""))
    model = files.record.get("model") or {}
    text = f"{STAGES.get(stage, stage)} of {model.get('name') or 'an unknown model'}"
    return f"{text}, {method(files.plan)}" if files.plan else text


def method(plan: Mapping[str, Any]) -> str:
    """`QLoRA r=16`, `LoRA r=8`, `all weights`."""
    lora, quantised = chosen(plan, "lora"), chosen(plan, "quantization")
    if not lora:
        return "all weights"
    kind = "QLoRA" if quantised.get("load_in_4bit") or quantised.get("load_in_8bit") else "LoRA"
    return f"{kind} r={lora.get('r')}"


def chosen(plan: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Key -> value of a section of plan.json."""
    found = plan.get(section)
    if not isinstance(found, Mapping):
        return {}
    return {key: item.get("value") for key, item in found.items() if isinstance(item, Mapping)}


# --- how it ended ---------------------------------------------------------------------------------------------------


def status(files: RunFiles) -> tuple[str, str]:
    """(kind, sentence); the kind is `finished`, `running`, `stopped`, `failed` or `aborted`."""
    kind = str(files.record.get("status", "unknown"))
    step, total = last_step(files), planned_steps(files)
    done = f"after {count(step)}{f' of {count(total)}' if total and total > step else ''} steps"
    words = {
        "finished": f"finished {done}",
        "running": f"running, or ended without a word; last seen {done}",
        "stopped": f"stopped by a signal {done}",
        "aborted": f"aborted {done}",
        "failed": f"failed {done}",
    }
    return kind, words.get(kind, kind)


def last_step(files: RunFiles) -> int:
    """The last step that anything is known of."""
    steps = [row["step"] for row in files.metrics[-1:] if is_number(row.get("step"))]
    steps += [one.get("to_step") for one in _segments(files) if is_number(one.get("to_step"))]
    results = files.record.get("results") or {}
    steps += [results["steps"]] if is_number(results.get("steps")) else []
    return int(max(steps, default=0))


def planned_steps(files: RunFiles) -> int | None:
    """Steps of the whole run, where they can be told: written out, or from the share of epochs that is done."""
    trainer = chosen(files.plan, "trainer")
    if is_number(trainer.get("max_steps")) and trainer["max_steps"] > 0:
        return int(trainer["max_steps"])
    epochs = trainer.get("num_train_epochs")
    row = next((row for row in reversed(files.metrics) if is_number(row.get("epoch")) and row["epoch"] > 0), None)
    if row is None or not is_number(epochs) or not is_number(row.get("step")):
        return None
    return round(row["step"] * epochs / row["epoch"])


def seconds(files: RunFiles) -> float | None:
    """Wall-clock seconds of all parts of the run that ended."""
    spans = [(moment(one.get("started")), moment(one.get("finished"))) for one in _segments(files)]
    known = [(end - begin).total_seconds() for begin, end in spans if begin and end]
    return sum(known) if known else None


def _segments(files: RunFiles) -> list[Mapping[str, Any]]:
    return [one for one in files.record.get("segments") or () if isinstance(one, Mapping)]


def cost(files: RunFiles) -> list[tuple[str, str]]:
    """What it took: (name, value)."""
    results = files.record.get("results") or {}
    last: Results = next((row for row in reversed(files.metrics) if is_number(row.get("tokens_seen"))), {})
    known = {**last, **{key: item for key, item in results.items() if item is not None}}
    peak = results.get("peak_memory") or {
        name.removeprefix("peak_"): item for name, item in last.items() if name.startswith("peak_")
    }
    found = [
        ("Steps", count(last_step(files))),
        ("Tokens", short_count(known.get("tokens_seen"))),
        ("Training", duration(known.get("train_seconds"))),
        ("In all", duration(seconds(files))),
        ("Speed", f"{count(known.get('tokens_per_second'))} tokens/s"),
        *((f"Peak memory{', GPU' if name == 'cuda' else ''}", size(item)) for name, item in peak.items()),
    ]
    return [(name, text) for name, text in found if not text.startswith("–")]


# --- the figures that matter ----------------------------------------------------------------------------------------


def figures(files: RunFiles) -> list[Figure]:
    """At most three, of what the stage is about; before and after, or what is known so far."""
    results = files.record.get("results") or {}
    base, tuned = dict(results.get("base") or {}), dict(results.get("tuned") or {})
    newest = None
    if not tuned:  # not at its end: the newest held-out figures
        rows = [row for row in files.metrics if any(key.startswith("eval_") for key in row)]
        if rows and rows[-1].get("step"):
            tuned = {key.removeprefix("eval_"): item for key, item in rows[-1].items() if key.startswith("eval_")}
            newest = f"at step {count(rows[-1]['step'])}"
    found = _OF_STAGE.get(str(files.record.get("stage")), _sft)(base, tuned, results)
    shown = [one for one in found if one is not None][:3]
    return [replace(one, about="; ".join(filter(None, (newest, one.about)))) for one in shown] if newest else shown


def _pair(
    name: str, base: Results, tuned: Results, key: str, shown: Callable[[Any], str], about: str = ""
) -> Figure | None:
    if not is_number(tuned.get(key)):
        return Figure(name, "", shown(base[key]), "before the training") if is_number(base.get(key)) else None
    before = shown(base[key]) if is_number(base.get(key)) else ""
    return Figure(name, before, shown(tuned[key]), about)


def _ended(base: Results, tuned: Results) -> Figure | None:
    if not tuned.get("answers"):
        return None
    about = f"of {count(tuned['answers'])} answers"
    return Figure("Answers that end by themselves", count(base.get("ended")), count(tuned.get("ended")), about)


def _sft(base: Results, tuned: Results, results: Results) -> list[Figure | None]:
    fall = change(base.get("loss"), tuned.get("loss"))
    rows = f"{count(tuned['rows'])} rows, {count(tuned.get('tokens'))} tokens" if tuned.get("rows") else "nats a token"
    perplexity = f"perplexity {figure(base.get('perplexity'))} → {figure(tuned.get('perplexity'))}"
    return [
        _pair("Held-out loss", base, tuned, "loss", figure, f"{fall}; {rows}" if fall else rows),
        _pair("Token accuracy", base, tuned, "token_accuracy", lambda item: share(item, 1), perplexity),
        _ended(base, tuned),
    ]


def _reward(base: Results, tuned: Results, results: Results) -> list[Figure | None]:
    pairs = f"of {count(tuned['pairs'])} held-out pairs" if tuned.get("pairs") else "of held-out pairs"
    return [
        _pair("Pairs rated right", base, tuned, "accuracy", lambda item: share(item, 1), pairs),
        _pair("Margin", base, tuned, "margin", lambda item: signed(item), "reward of chosen − rejected"),
        _pair(
            "Reward and length",
            base,
            tuned,
            "length_correlation",
            lambda item: signed(item, 2),
            "correlation; near +1 it counts tokens",
        ),
    ]


def _dpo(base: Results, tuned: Results, results: Results) -> list[Figure | None]:
    pairs = f"of {count(tuned['pairs'])} held-out pairs" if tuned.get("pairs") else "of held-out pairs"
    won = (
        Figure("Chosen preferred", "", share(tuned["accuracy"], 1), pairs) if is_number(tuned.get("accuracy")) else None
    )
    kl = tuned.get("kl")
    return [
        won,
        _pair("Held-out loss", base, tuned, "loss", figure, change(base.get("loss"), tuned.get("loss"))),
        Figure("Distance from the reference", "", f"{figure(kl, 3)} nats", "KL, an answer") if is_number(kl) else None,
        _pair("Margin", base, tuned, "margin", lambda item: signed(item), "implicit reward of chosen − rejected"),
    ]


def _kto(base: Results, tuned: Results, results: Results) -> list[Figure | None]:
    right = tuned.get("accuracy")
    rows = f"of {count(tuned['rows'])} held-out answers" if tuned.get("rows") else "of held-out answers"
    return [
        Figure("On their side of the KL point", "", share(right, 1), rows) if is_number(right) else None,
        _pair("Held-out loss", base, tuned, "loss", figure, change(base.get("loss"), tuned.get("loss"))),
        _pair("KL point", base, tuned, "kl", lambda item: f"{figure(item, 3)}", "nats"),
    ]


def _ppo(base: Results, tuned: Results, results: Results) -> list[Figure | None]:
    prompts = f"{count(tuned['prompts'])} held-out prompts" if tuned.get("prompts") else "held-out prompts"
    return [
        _pair("Score of a response", base, tuned, "score", lambda item: figure(item, 3), prompts),
        _pair("Distance from the reference", base, tuned, "kl", lambda item: figure(item, 3), "KL, nats a response"),
        _pair("Entropy", base, tuned, "entropy", lambda item: figure(item, 3), "nats a token"),
    ]


_OF_STAGE: dict[str, Callable[[Results, Results, Results], list[Figure | None]]] = {
    "sft": _sft,
    "reward": _reward,
    "dpo": _dpo,
    "kto": _kto,
    "ppo": _ppo,
}


# --- what to do next ------------------------------------------------------------------------------------------------


def quoted(files: RunFiles) -> str:
    """The run folder as a shell takes it."""
    return shlex.quote(str(files.folder))


def commands(files: RunFiles) -> list[Command]:
    """What to type next, depending on how the run ended."""
    run = quoted(files)
    found = []
    if files.record.get("status") != "finished":
        resume = resume_command(files)
        processes = mapping(files.record.get("machine")).get("world_size")
        # Each process records its own command, which does not say what started it.
        many = is_number(processes) and processes > 1
        about = "go on where it stopped" + (f"; add what started its {count(processes)} processes" if many else "")
        found += [Command(about, resume)] if resume else []
    if not (files.record.get("results") or {}).get("weights"):
        return found
    if files.record.get("stage") == "reward":
        found.append(
            Command("rate answers with it, in Python", f"gemma_tune.models.reward.load_reward({str(files.folder)!r})")
        )
    else:
        found.append(Command("talk to it", f"gemma-tune chat {run}"))
    found.append(Command("measure it", f"gemma-tune eval {run}"))
    if chosen(files.plan, "lora") and files.record.get("stage") != "reward":
        found.append(Command("merge the adapter into its base", f"gemma-tune merge {run}"))
        found.append(Command("write it for llama.cpp", f"gemma-tune export {run} --format gguf"))
    return found


def resume_command(files: RunFiles) -> str | None:
    """The command of the run with `--resume auto`; None where it was started in another way."""
    words = [str(word) for word in files.record.get("command") or ()]
    stage = str(files.record.get("stage"))
    if stage not in words[1:]:
        return None
    rest = words[words.index(stage, 1) :]
    kept = [
        word
        for place, word in enumerate(rest)
        if not word.startswith("--resume=") and word != "--resume" and (place == 0 or rest[place - 1] != "--resume")
    ]
    return shlex.join(["gemma-tune", *kept, "--resume", "auto"])
