"""What evaluation.json adds to a model card, and that it is left out where it is about other weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.export.papers import make_papers, recorded_subject
from gemma_tune.export.subject import Subject
from gemma_tune.train.checkpoint import sha256_of
from tests.unit.export.test_papers import front_of, make_run

HELD_OUT = {"rows": 40, "fingerprint": "f", "base": {"format_rate": 0.0}, "tuned": {"format_rate": 0.75, "rows": 40}}
TASKS = {
    "arc_easy": {"metrics": {"acc": 0.5, "acc_stderr": 0.01}, "shots": 0, "items": 200},
    "gsm8k": {"metrics": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.02}, "shots": 5, "items": 100},
    "harness": {"name": "lm-eval", "version": "0.4.13"},
}


def evaluated(folder: Path, **changes: Any) -> Subject:
    """A run with an evaluation of its adapter."""
    run = make_run(folder, data={"fingerprint": "f", "report": {"held_out": 40}})
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"weights")
    subject = {"target": "/home/me/run", "adapter_sha256": sha256_of(weights), "content": None}
    exact = {"base": {"exact": {"rows": 50, "extracted": 1}}, "tuned": {"exact": {"rows": 50, "extracted": 9}}}
    planted = {"each": ["a secret canary"], "by_repeats": [{"repeats": 16, "canaries": 4, "extracted": 3}]}
    memorisation = {"extraction": {"criterion": {"edits": 0.1}, "train": exact}, "canaries": planted}
    document = {"format": 1, "subject": subject, "held_out": HELD_OUT, "tasks": TASKS, "memorisation": memorisation}
    (run / "evaluation.json").write_text(json.dumps(document | changes))
    return recorded_subject(run)


def card_of(subject: Subject, kind: Any = "adapter") -> str:
    return make_papers(subject, kind=kind, facts={})["README.md"]


def index_of(card: str) -> dict[tuple[str, str], float]:
    """(data set, metric) -> value."""
    results = front_of(card)["model-index"][0]["results"]
    return {
        (result["dataset"]["type"], metric["type"]): metric["value"]
        for result in results
        for metric in result["metrics"]
    }


def test_tasks_and_rates_are_in_the_card_and_in_its_index(tmp_path: Path) -> None:
    card = card_of(evaluated(tmp_path / "run"))
    assert "| arc_easy | acc, 0 shots | 200 | 0.5 ± 0.01 |" in card
    assert "| gsm8k | exact_match,strict, 5 shots | 100 | 0.25 ± 0.02 |" in card
    assert "| answers that are well-formed turns, greedy, share | 0 | 0.75 |" in card
    assert "| training rows, the rest word for word | 1 of 50 | 9 of 50 |" in card
    assert "| canaries that were planted 16 times |  | 3 of 4 |" in card
    assert "secret canary" not in card and "/home/me" not in card
    found = index_of(card)
    assert found["arc_easy", "acc"] == 0.5 and found["gsm8k", "exact_match,strict"] == 0.25
    assert found["held-out", "loss"] == 2.5 and found["held-out", "format_rate"] == 0.75
    assert not any("stderr" in metric for _, metric in found) and "harness" not in {task for task, _ in found}
    assert "held-out rows of its own training data only" not in card and "what the tasks above do not ask" in card


def test_an_evaluation_of_other_weights_is_left_out(tmp_path: Path) -> None:
    subject = evaluated(tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"trained on")
    card = card_of(subject)
    assert "arc_easy" not in card and "well-formed" not in card
    assert set(index_of(card)) == {("held-out", key) for key in ("loss", "perplexity", "token_accuracy")}
    assert "Not evaluated: benchmarks" in card


@pytest.mark.parametrize(
    "held_out", [HELD_OUT | {"fingerprint": "other"}, HELD_OUT | {"tuned": {"format_rate": 1, "rows": 2}}]
)
def test_figures_of_other_rows_are_left_out(tmp_path: Path, held_out: dict[str, Any]) -> None:
    card = card_of(evaluated(tmp_path / "run", held_out=held_out))
    assert "well-formed" not in card and "arc_easy" in card


def test_what_was_not_measured_of_the_files_themselves_is_in_no_index(tmp_path: Path) -> None:
    card = card_of(evaluated(tmp_path / "run"), "gguf")
    assert "model-index" not in front_of(card) and "(as it ran, before the export)" in card


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "subject": {}}', '{"format": 1, "subject": null}'])
def test_a_damaged_evaluation_costs_no_card(tmp_path: Path, text: str) -> None:
    subject = evaluated(tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").write_text(text)
    assert "| loss, nats a token | 4.5 | 2.5 |" in card_of(subject)


def test_a_part_of_a_task_is_not_in_the_index_and_the_card_says_how_it_was_asked(tmp_path: Path) -> None:
    part = {"metrics": {"acc": 0.8}, "shots": 0, "items": 5, "of": 2376, "chat": True}
    card = card_of(evaluated(tmp_path / "run", tasks={"part": part, "whole": part | {"of": 5, "chat": False}}))
    assert "| part | acc, 0 shots, in turns | 5 of 2,376 | 0.8 |" in card
    assert "| whole | acc, 0 shots, plain text | 5 | 0.8 |" in card
    found = index_of(card)
    assert ("part", "acc") not in found and found["whole", "acc"] == 0.8
