"""The adapter that a training begins with: read from its configuration, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.plan.starts import REWARD_HEAD, WEIGHTS, adapter_folder, read_start, start_of
from tests.unit.plan.recipes import make_recipe

FAMILY = FAMILIES["gemma3_text"]
BASE = "google/gemma-3-1b-it"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": BASE,
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": FAMILY.lora_targets["mlp"],
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "rank_pattern": {},
}


def adapter(folder: Path, changes: dict[str, Any] | None = None, text: str | None = None) -> Path:
    """An adapter folder whose weights nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (changes or {})) if text is None else text)
    (folder / WEIGHTS).write_bytes(b"")
    return folder


def test_a_run_and_its_adapter_folder_are_the_same(tmp_path: Path) -> None:
    adapter(tmp_path / "run/adapter")
    found = read_start(str(tmp_path / "run"), BASE, FAMILY)
    assert found == read_start(str(tmp_path / "run/adapter"), BASE, FAMILY)
    assert (found.rank, found.alpha, found.dropout, found.targets) == (8, 16, 0.05, "mlp")
    assert found.target_modules == FAMILY.lora_targets["mlp"] and not found.dora and not found.rslora


def test_a_recipe_without_one() -> None:
    assert start_of(make_recipe(), FAMILY) is None


def test_a_recipe_with_one(tmp_path: Path) -> None:
    recipe = make_recipe({"model.adapter": str(adapter(tmp_path / "a", {"use_dora": True}))})
    found = start_of(recipe, FAMILY)
    assert found is not None and found.dora, "DoRA may be trained on"


@pytest.mark.parametrize(
    ("modules", "preset"),
    [
        (["q_proj", "v_proj"], "attention"),
        (["model.layers.0.mlp.up_proj", "gate_proj"], "mlp"),
        (["q_proj", "down_proj"], "all-linear"),
        ("all-linear", "all-linear"),
        (r".*\.q_proj", "all-linear"),
        (FAMILY.lora_targets["attention"], "attention"),
        ("({0})|({0})".format(FAMILY.lora_targets["mlp"]), "mlp"),
        ("({})|({})".format(FAMILY.lora_targets["mlp"], FAMILY.lora_targets["attention"]), "all-linear"),
    ],
)
def test_the_preset_of_foreign_adapters(tmp_path: Path, modules: Any, preset: str) -> None:
    assert read_start(str(adapter(tmp_path, {"target_modules": modules})), BASE, FAMILY).targets == preset


def test_a_local_base_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    folder = adapter(tmp_path / "a", {"base_model_name_or_path": str(tmp_path / "base")})
    monkeypatch.chdir(tmp_path)
    assert read_start(str(folder), "./base", FAMILY).rank == 8
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="was trained on"):
        read_start(str(folder), "./other", FAMILY)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_name_or_path": "google/gemma-2-2b"}, "google/gemma-2-2b, and model.name is google/gemma-3-1b"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"peft_type": "IA3"}, "its kind is 'IA3'"),
        ({"bias": "lora_only"}, "biases"),
        ({"modules_to_save": ["embed_tokens"]}, "whole layers"),
        ({"rank_pattern": {"q_proj": 4}}, "ranks differ"),
        ({"alpha_pattern": {"q_proj": 4}}, "scales differ"),
        ({"init_lora_weights": "pissa_niter_4"}, "its base was altered"),
        ({"r": "8"}, "of the wrong kind"),
        ({"r": True}, "of the wrong kind"),
        ({"r": 0}, "of the wrong kind"),
        ({"lora_alpha": None}, "of the wrong kind"),
        ({"target_modules": []}, "of the wrong kind"),
        ({"target_modules": [1]}, "of the wrong kind"),
        ({"target_modules": "((("}, "of the wrong kind"),
        ({"task_type": "SEQ_CLS"}, "trained for SEQ_CLS"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_start(str(adapter(tmp_path, changes)), BASE, FAMILY)
    problem = caught.value.problems[0]
    assert str(tmp_path) in problem.where and problem.fix


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_damaged_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_start(str(adapter(tmp_path, text=text)), BASE, FAMILY)
    assert "adapter_config.json" in caught.value.problems[0].where


def test_a_reward_model_is_no_start(tmp_path: Path) -> None:
    (adapter(tmp_path) / REWARD_HEAD).write_bytes(b"")
    with pytest.raises(UserError, match="this is a reward model"):
        read_start(str(tmp_path), BASE, FAMILY)


def test_missing_weights(tmp_path: Path) -> None:
    (adapter(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(UserError, match="safetensors is missing"):
        read_start(str(tmp_path), BASE, FAMILY)


@pytest.mark.parametrize(
    "kind",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["up_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"lora_bias": True},
    ],
    ids=str,
)
def test_what_cannot_be_added_up(tmp_path: Path, kind: dict[str, object]) -> None:
    folder = str(adapter(tmp_path, kind))
    with pytest.raises(UserError, match="cannot be added up") as caught:
        read_start(folder, BASE, FAMILY, stack=True)
    assert caught.value.problems[0].fix == "set model.adapter_mode: continue"
    assert read_start(folder, BASE, FAMILY).rank == 8


@pytest.mark.parametrize(
    ("files", "said", "fix"),
    [
        ([], "there is no adapter in", "finished run"),
        (["plan.json"], "holds no adapter yet", "let it finish"),
        (["plan.json", "model/config.json"], "trained all weights", "set model.name: "),
    ],
)
def test_a_folder_without_an_adapter(tmp_path: Path, files: list[str], said: str, fix: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=said) as caught:
        read_start(str(tmp_path), BASE, FAMILY)
    problem = caught.value.problems[0]
    assert problem.where == "model.adapter" and fix in problem.fix
    with pytest.raises(UserError, match=said) as caught:
        adapter_folder(tmp_path, where="the command line")
    assert caught.value.problems[0].where == "the command line"


def test_no_folder() -> None:
    with pytest.raises(UserError, match="there is no folder 'runs/nowhere'"):
        read_start("runs/nowhere", BASE, FAMILY)
