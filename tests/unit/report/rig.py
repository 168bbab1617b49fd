"""Run folders of every stage, made up: what a run writes, without a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma_tune.data.report import DataReport
from tests.unit.plan.recipes import plan_for

HOSTILE = (
    "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "\x1b[31m\u202egnp.exe\u202c {{ 7 * 7 }} ]]> &amp; <!-- '\" \x00 \u2028 مرحبا"
)
"""Text that must be shown and nothing else."""

STAGES = ("sft", "reward", "dpo", "kto", "ppo")

_HELD_OUT: dict[str, dict[str, float]] = {
    "sft": {"loss": 4.0, "perplexity": 54.6, "token_accuracy": 0.25},
    "reward": {"loss": 0.7, "accuracy": 0.5, "margin": 0.1, "mean": 0.0, "std": 1.0, "length_correlation": 0.2},
    "dpo": {"loss": 0.693, "accuracy": 0.5, "margin": 0.2, "chosen_logps": -110.0, "rejected_logps": -120.0},
    "kto": {"loss": 0.5, "accuracy": 0.4, "good_reward": 0.3, "bad_reward": -0.4, "kl": 0.6},
    "ppo": {"score": 0.2, "score_std": 0.1, "kl": 0.3, "entropy": 4.0, "response_length": 12.0, "stopped": 0.4},
}
_STEP: dict[str, dict[str, float]] = {
    "sft": {"loss": 4.2, "token_accuracy": 0.2},
    "reward": {"loss": 0.7, "accuracy": 0.5, "margin": 0.1},
    "dpo": {"loss": 0.7, "rewards/accuracies": 0.5, "rewards/margins": 0.1, "rewards/chosen": 0.1},
    "kto": {"loss": 0.5, "rewards/margins": 0.2, "kl": 0.4},
    "ppo": {
        "objective/scores": 0.2,
        "objective/kl": 0.3,
        "objective/entropy": 4.0,
        "policy/clipfrac_avg": 0.05,
        "val/clipfrac_avg": 0.02,
        "val/explained_variance": 0.4,
        "policy/approxkl_avg": 0.001,
        "rollout/length": 12.0,
        "rollout/stopped": 0.4,
        "loss/policy_avg": -0.01,
        "loss/value_avg": 0.1,
        "objective/kl_coefficient": 0.05,
        "policy/grad_norm": 1.0,
        "value/grad_norm": 2.0,
    },
}


def metrics(stage: str, steps: int, every: int) -> Iterator[dict[str, Any]]:
    """Lines of metrics.jsonl: every figure falls or rises with some noise."""
    for step in range(steps + 1):
        wave = 1 - 0.6 * step / max(steps, 1) + 0.08 * math.sin(step * 12.9898) * math.sin(step * 0.7)
        counters = {
            "epoch": 3 * step / max(steps, 1),
            "tokens_seen": 900 * step,
            "tokens_trained": 400 * step,
            "train_seconds": round(step * 0.31 + 0.02 * math.sin(step), 3),
            "tokens_per_second": 2900.0,
            "peak_rss": 4_000_000_000 + 1000 * step,
            "peak_cuda": 9_000_000_000,
        }
        if step:
            shared = {"learning_rate": 2e-4 * (1 - step / steps), **({} if stage == "ppo" else {"grad_norm": 2 * wave})}
            yield {"step": step, **{key: value * wave for key, value in _STEP[stage].items()}, **shared, **counters}
        if step % every == 0:
            held = {f"eval_{key}": value * wave for key, value in _HELD_OUT[stage].items()}
            yield {"step": step, **held, **counters}


def make_run(
    folder: Path,
    stage: str = "sft",
    *,
    steps: int = 60,
    every: int = 20,
    status: str = "finished",
    prompts: int = 3,
    text: str = "The sea is wide.",
    **record: Any,
) -> Path:
    """A run folder of `stage` with `steps` steps; `text` is each prompt and answer."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_for({"stage": stage}).to_json()
    base = _HELD_OUT[stage] | {"rows": 40, "tokens": 1500, "ended": 1, "answers": prompts, "stop_rate": 0.1}
    tuned = {key: value * 0.5 if isinstance(value, float) else value for key, value in base.items()} | {"ended": 2}
    sampled = [0, steps // 2, steps] if stage != "reward" else []
    samples = [
        {
            "step": step,
            "prompt": f"{number}: {text}",
            "answer": f"{text} {step}",
            "ended": step > 0,
            "tokens": 7,
            "held_out": number > 0,
            "reference": text,
        }
        for step in sampled
        for number in range(prompts)
    ]
    part = {"name": "row", "tokens": 9, "text": f"<bos>{text}", "lengths": f"5 {len(text)}", "kinds": "Pt"}
    report = DataReport(
        read={"ultrachat": 360},
        repaired={},
        dropped={"longer than max_length": 4},
        noted={},
        first={"longer than max_length": f"rows.jsonl:7 {text}"},
        remarks=(text,),
        held_out=40,
        documents=316,
        rows=93,
        tokens=20_000,
        trained_tokens=12_000,
        fill=0.87,
    )
    finished = status == "finished"
    document: dict[str, Any] = {
        "stage": stage,
        "status": status,
        "command": ["gemma-tune", stage, "recipes/mine.yaml", "--resume", "auto", "seed=1"],
        "versions": {"python": "3.11.7", "gemma-tune": "0.1.0", "torch": "2.13.0"},
        "git": {"commit": "8f969c25", "dirty": True},
        "machine": plan["machine"],
        "model": {"name": "google/gemma-3-1b-it", "revision": "abc", "licence": "gemma"},
        "template": {"file": "gemma3.jinja", "revision": "gemma3 (trl 1.16)", "sha256": "7de1"},
        "data": {
            "fingerprint": "85f3",
            "report": report.to_json(),
            "preview": [{"held_out": False, "parts": [part | {"begins": "", "more": 0}]}],
        },
        "seed": 1,
        "segments": [
            {
                "from_step": 0,
                "to_step": steps // 3,
                "started": "2026-11-23T22:00:05+00:00",
                "finished": "2026-11-23T22:01:05+00:00",
                "status": "stopped",
            },
            {
                "from_step": steps // 3,
                "to_step": steps,
                "started": "2026-11-23T23:00:05+00:00",
                "finished": "2026-11-23T23:03:28+00:00",
                "status": status,
            },
        ],
        "started": "2026-11-23T22:00:05+00:00",
        "finished": "2026-11-23T23:03:28+00:00",
        "results": {
            "base": base,
            **({"tuned": tuned, "steps": steps} if finished else {}),
            **({"weights": {"folder": "adapter", "files": {"a": {"size": 7, "sha256": "0"}}}} if finished else {}),
            **({"peak_memory": {"rss": 4_100_000_000, "cuda": 9_000_000_000}} if finished else {}),
        },
    }
    write(folder / "run.json", document | record)
    write(folder / "plan.json", plan)
    (folder / "recipe.yaml").write_text(f"stage: {stage}\n# {text}\n", encoding="utf-8")
    write_lines(folder / "metrics.jsonl", metrics(stage, steps, every))
    write_lines(folder / "samples.jsonl", samples)
    return folder


def evaluation(text: str = "arc_easy") -> dict[str, Any]:
    """evaluation.json with every part."""
    figures = {"loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.5, "stop_rate": 1.0, "format_rate": 0.9}
    return {
        "format": 1,
        "subject": {"target": "runs/mine", "base": "google/gemma-3-1b-it", "revision": "abc", "adapter_sha256": None},
        "created": "2026-11-24T08:00:00+00:00",
        "held_out": {"rows": 40, "tokens": 1500, "base": figures | {"loss": 4.0}, "tuned": figures},
        "reward": {"pairs": 120, "accuracy": 0.71, "margin": 0.9, "length_correlation": 0.31},
        "tasks": {
            text: {
                "metrics": {"acc": 0.712, "acc_stderr": 0.013},
                "shots": 5,
                "items": 570,
                "card": {"metric": "acc", "figure": 0.735, "stated": False},
            }
        },
        "memorisation": {
            "canaries": {
                "ceiling": 10.0,
                "by_repeats": [
                    {
                        "repeats": 16,
                        "canaries": 4,
                        "extracted": 3,
                        "rate": 0.75,
                        "interval": [0.3, 0.95],
                        "exposure": 9.1,
                    }
                ],
                "each": [{"secret": "do not print"}],
            },
            "extraction": {
                "criterion": {"prompt_tokens": 50, "target_tokens": 50, "least_tokens": 20, "edits": 0.1},
                "train": {
                    "rows": 100,
                    "base": {"exact": {"rate": 0.0}, "approximate": {"rate": 0.01}},
                    "tuned": {"exact": {"rate": 0.07}, "approximate": {"rate": 0.11}},
                },
                "held_out": {"rows": 0, "base": None, "tuned": None},
            },
        },
        "comparison": {
            "a": {"target": "runs/a"},
            "b": {"target": "runs/b"},
            "method": "paired bootstrap",
            "figures": {"loss": {"a": 2.1, "b": 2.0, "difference": -0.1, "low": -0.15, "high": -0.05, "rows": 40}},
        },
        "something_new": {"deep": {"er": 1.5}, "list": [{"x": 1, "y": "z"}]},
    }


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, rows: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
