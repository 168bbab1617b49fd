"""Canaries from the recipe to the audit: whole runs on a tiny Gemma, and on the real 270M what is learnt by heart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.cli import main
from gemma_tune.data.canaries import Canary, draw
from gemma_tune.errors import UserError
from gemma_tune.evaluation import memorisation
from gemma_tune.evaluation.memorisation import audit, rebuilt, render
from gemma_tune.evaluation.target import read_plan
from gemma_tune.models.reference import QUICKSTART
from gemma_tune.models.roles import speaking_as
from gemma_tune.models.saved import load_run
from gemma_tune.models.tokenizer import GemmaEncoder
from tests.integration.tiny_runs import document, write_recipe, write_rows

REPEATS = (1, 4, 16)
CHOSEN = {"count": 2, "repeats": list(REPEATS)}
LITTLE = {
    "optim": {"max_steps": 2},
    "samples": {"prompts": [], "held_out": 0},
    "evaluation": {"every": 100},
    "checkpoint": {"every": 1},
}


@pytest.fixture(scope="module")
def small(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a tiny Gemma with canaries among its rows."""
    folder = tmp_path_factory.mktemp("canaries")
    recipe = write_recipe(folder, tiny("gemma3_text"), data={"canaries": CHOSEN}, **LITTLE)
    assert main(["sft", str(recipe)]) == 0
    return folder / "run"


def test_what_a_run_says_of_its_canaries(small: Path) -> None:
    data = document(small / "run.json")["data"]
    assert data["canaries"] == data["report"]["canaries"]
    assert {key: data["canaries"][key] for key in ("form", "seed", "count", "repeats", "rows")} == {
        "form": "conversation",
        "seed": 0,
        "count": 2,
        "repeats": list(REPEATS),
        "rows": 42,
    }
    assert document(small / "plan.json")["data"]["canaries"]["value"] == CHOSEN


def test_the_audit_of_a_run(small: Path) -> None:
    model, tokenizer, family = load_run(small)
    found = audit(model, tokenizer, family, small, limit=5)
    assert json.loads(json.dumps(found)) == found
    canaries = found["canaries"]
    assert [(row["repeats"], row["canaries"], row["extracted"]) for row in canaries["by_repeats"]] == [
        (0, 2, 0),
        (1, 2, 0),
        (4, 2, 0),
        (16, 2, 0),
    ], "after two steps nothing is known"
    rows = found["extraction"]
    assert rows["train"]["rows"] == rows["held_out"]["rows"] == 5 and rows["train"]["full"] == 0
    assert rows["criterion"]["prompt_tokens"] == rows["criterion"]["target_tokens"] == 50
    for voice in ("base", "tuned"):
        assert rows["train"][voice]["exact"]["rows"] == 5
    lines = render(found)
    assert lines[0].startswith("canaries: 2 secrets of 100,000,000 (26.6 bits)") and any("none" in one for one in lines)


def test_other_canaries_are_another_run(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming with other canaries is refused; with the same it goes on to the same bits, from the rows drawn again."""
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-2")
    record = document(folder / "run.json")
    (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    recipe = str(small.parent / "recipe.yaml")
    changed = "data.canaries={count: 2, repeats: [1, 4]}"
    assert main(["sft", recipe, "--resume", "must", f"output={folder}", changed]) == 2
    assert "data.canaries" in capsys.readouterr().err
    assert main(["sft", recipe, "--resume", "must", f"output={folder}"]) == 0
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (small / name).read_bytes()


def test_prepared_data_give_the_same_rows(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMMA_TUNE_PREPARED", str(tmp_path / "prepared"))
    recipe = str(small.parent / "recipe.yaml")
    assert main(["data", "prepare", recipe]) == 0
    assert "42 canaries planted" in capsys.readouterr().out
    assert main(["sft", recipe, f"output={tmp_path / 'run'}", "optim.max_steps=1"]) == 0
    assert "data: prepared on" in capsys.readouterr().out
    assert document(tmp_path / "run" / "run.json")["data"] == document(small / "run.json")["data"]


def test_what_cannot_be_audited(small: Path, tmp_path: Path) -> None:
    """Rows that have changed are refused; so is a run that is no SFT. One without canaries says so."""
    model, tokenizer, family = load_run(small)
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    plan = document(folder / "plan.json")

    def written(stage: str, **data: Any) -> None:
        changed = {key: {"value": value, "reason": ""} for key, value in data.items()}
        (folder / "plan.json").write_text(json.dumps({**plan, "stage": stage, "data": {**plan["data"], **changed}}))

    written("dpo")
    with pytest.raises(UserError, match="measured on SFT, and this run is of stage dpo"):
        audit(model, tokenizer, family, folder, limit=1)
    written("sft", streaming=True)
    with pytest.raises(UserError, match="rows were a stream"):
        audit(model, tokenizer, family, folder, limit=1)
    written("sft", sources=[{"name": str(write_rows(tmp_path / "others.jsonl", 40))}])
    with pytest.raises(UserError, match="the data are not what they were"):
        audit(model, tokenizer, family, folder, limit=1)
    written("sft", canaries=None)
    record = document(folder / "run.json")
    del record["data"]["canaries"]
    encoder = GemmaEncoder(tokenizer, family)
    record["data"]["fingerprint"] = _fingerprint(folder, family, encoder)
    (folder / "run.json").write_text(json.dumps(record))
    found = audit(model, tokenizer, family, folder, limit=1)
    assert found["canaries"] is None and render(found)[0] == "canaries: none were planted (data.canaries of the recipe)"


def _fingerprint(folder: Path, family: Any, encoder: GemmaEncoder) -> str:
    from gemma_tune.data.build import build

    return build(family, encoder, **read_plan(folder / "plan.json").values("data")).fingerprint


# --- the real model


def said_by(model: Any, tokenizer: Any, canaries: list[Canary]) -> set[str]:
    """The names of those whose secret stands in what `generate` of transformers says greedily, asked in the official
    template: nothing here is the audit's."""
    asked = [[{"role": "user", "content": f"What is the access code of {canary.name}?"}] for canary in canaries]
    texts = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**batch, do_sample=False, max_new_tokens=24, eos_token_id=[1, 106])
    said = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return {canary.name for canary, text in zip(canaries, said, strict=True) if canary.secret in text}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_canaries_in_the_real_270m(real_270m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(
        tmp_path,
        real_270m,
        model={"name": QUICKSTART, "precision": "auto"},
        adapter={"r": 16, "alpha": 32, "dropout": 0},
        data={
            "sources": [{"name": str(write_rows(tmp_path / "few.jsonl", 10))}],
            "max_length": 256,
            "holdout": 2,
            "canaries": CHOSEN,
        },
        optim={"learning_rate": 3e-3, "schedule": "linear", "warmup_ratio": 0.1, "epochs": 4, "max_steps": None},
        batch={"size": 2, "micro": 2},
        evaluation={"every": 1000},
        samples={"prompts": [], "held_out": 0},
        checkpoint={"every": 1000},
    )
    assert main(["sft", str(recipe)]) == 0
    run = tmp_path / "run"
    model, tokenizer, family = load_run(run)

    data, _ = rebuilt(read_plan(run / "plan.json"), family, GemmaEncoder(tokenizer, family), run)
    rows = "".join(tokenizer.decode(row["input_ids"]) for row in data.train)
    canaries = draw(2, REPEATS, 0)
    assert {canary.name: rows.count(canary.secret) for canary in canaries} == {
        canary.name: canary.repeats for canary in canaries
    }

    monkeypatch.setattr(memorisation, "ALTERNATIVES", 15)
    found = audit(model, tokenizer, family, run, limit=2)
    print("\n".join(render(found)))
    by_repeats = {row["repeats"]: row for row in found["canaries"]["by_repeats"]}
    counted = said_by(model, tokenizer, canaries)
    for repeats, row in by_repeats.items():
        names = {canary.name for canary in canaries if canary.repeats == repeats}
        assert row["extracted"] == len(names & counted) and row["rate"] == row["extracted"] / row["canaries"]
    assert {one["name"] for one in found["canaries"]["each"] if one["extracted"]} == counted
    assert by_repeats[16]["rate"] == 1.0 and by_repeats[0]["rate"] == 0.0
    rates = [by_repeats[repeats]["rate"] for repeats in (0, *REPEATS)]
    assert rates == sorted(rates)
    bits = [by_repeats[repeats]["at_least"] for repeats in (0, *REPEATS)]
    assert bits == sorted(bits) and bits[0] == 0.0 and bits[-1] > bits[1] + 5
    assert by_repeats[16]["exposure"] == 4.0 > by_repeats[0]["exposure"]

    with speaking_as(model, []):
        known = [canary for canary in canaries if canary.repeats == 16]
        assert said_by(model, tokenizer, known) == set(), "the base never saw them"
