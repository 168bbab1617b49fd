"""The adapter that a training begins with, and reward models: read from their files, refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.plan.starts import (
    REWARD_HEAD,
    STATS_FILE,
    WEIGHTS,
    adapter_folder,
    read_reward,
    read_start,
    rewards_of,
    start_of,
)
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


@pytest.mark.parametrize("left", [REWARD_HEAD, STATS_FILE])
def test_a_reward_model_is_no_start_not_even_half_a_copy_of_one(tmp_path: Path, left: str) -> None:
    (adapter(tmp_path) / left).write_bytes(b"")
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


# --- reward models

STATS: dict[str, Any] = {
    "family": FAMILY.name,
    "template_sha256": FAMILY.template_sha256,
    "token_id": FAMILY.turn_end_id,
    "mean": 0.5,
    "std": 2.0,
}


def reward(folder: Path, config: dict[str, Any] | None = None, stats: dict[str, Any] | None = None) -> str:
    """A run of `gemma-tune reward`, of which nobody reads the weights."""
    inside = adapter(folder / "adapter", config)
    (inside / REWARD_HEAD).write_bytes(b"")
    (inside / STATS_FILE).write_text(json.dumps(STATS | (stats or {})))
    return str(folder)


def test_a_reward_model_has_rank_and_targets(tmp_path: Path) -> None:
    found = read_reward(reward(tmp_path / "run"), BASE, FAMILY)
    assert (found.rank, found.targets) == (8, "mlp")
    assert found == read_reward(str(tmp_path / "run/adapter"), BASE, FAMILY)


@pytest.mark.parametrize(
    ("config", "stats", "said"),
    [
        ({"base_model_name_or_path": "google/gemma-2-2b"}, {}, "was trained on google/gemma-2-2b, and model.name is"),
        ({"r": "8"}, {}, "of the wrong kind"),
        ({"peft_type": "IA3"}, {}, "its kind is 'IA3'"),
        ({}, {"family": "gemma2"}, "trained with family 'gemma2', here it is 'gemma3_text'"),
        ({}, {"template_sha256": "0" * 64}, "trained with template_sha256 '0000"),
        ({}, {"token_id": 1}, "trained with token_id 1, here it is 106"),
        ({}, {"std": 0}, "gives no scale: mean 0.5, std 0"),
        ({}, {"mean": None}, "gives no scale: mean None, std 2.0"),
        ({}, {"std": float("nan")}, "gives no scale"),
        ({}, {"std": True}, "gives no scale"),
    ],
)
def test_reward_models_that_do_not_fit(
    tmp_path: Path, config: dict[str, Any], stats: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read_reward(reward(tmp_path, config, stats), BASE, FAMILY)
    problem = caught.value.problems[0]
    assert str(tmp_path) in problem.where and problem.fix


def test_a_scale_is_asked_for_only_where_rewards_are_scaled(tmp_path: Path) -> None:
    assert read_reward(reward(tmp_path, stats={"std": 0}), BASE, FAMILY, scaled=False).rank == 8


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        (REWARD_HEAD, f"{REWARD_HEAD} is missing"),
        (STATS_FILE, f"{STATS_FILE} is missing"),
        (WEIGHTS, f"{WEIGHTS} is missing"),
        ("adapter_config.json", "there is no adapter in"),
    ],
)
def test_reward_models_that_lack_a_file(tmp_path: Path, remove: str, said: str) -> None:
    target = reward(tmp_path)
    (tmp_path / "adapter" / remove).unlink()
    with pytest.raises(UserError, match=said):
        read_reward(target, BASE, FAMILY)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_damaged_statistics(tmp_path: Path, text: str) -> None:
    target = reward(tmp_path)
    (tmp_path / "adapter" / STATS_FILE).write_text(text)
    with pytest.raises(UserError) as caught:
        read_reward(target, BASE, FAMILY)
    assert STATS_FILE in caught.value.problems[0].where


def test_no_folder_of_a_reward_model() -> None:
    with pytest.raises(UserError, match="there is no folder 'runs/nowhere'") as caught:
        read_reward("runs/nowhere", BASE, FAMILY)
    assert caught.value.problems[0].where == "ppo.reward"


def test_the_rewards_of_a_recipe(tmp_path: Path) -> None:
    function = tmp_path / "mine.py"
    function.write_text("raise SystemExit")  # the file must be there; nobody runs it yet
    models = [reward(tmp_path / name, {"r": rank}) for name, rank in (("a", 4), ("b", 6))]
    sources = [{"source": models[0]}, {"source": f"{function}:score"}, {"source": models[1]}]
    recipe = make_recipe({"stage": "ppo", "ppo.reward": sources})
    assert [found.rank for found in rewards_of(recipe, FAMILY)] == [4, 6]
    assert rewards_of(make_recipe(), FAMILY) == ()
    function.unlink()
    with pytest.raises(UserError, match="there is no file"):
        rewards_of(recipe, FAMILY)


def test_check_refuses_a_reward_model_of_another_base(tmp_path: Path) -> None:
    from gemma_tune.commands import check

    other = reward(tmp_path / "run", {"base_model_name_or_path": "google/gemma-3-270m"})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"stage: ppo\nmodel: {{name: {BASE}}}\ndata: {{sources: [{{name: x.jsonl}}]}}\n"
        f"ppo: {{reward: {other}}}\noutput: x\n"
    )
    with pytest.raises(UserError, match="was trained on google/gemma-3-270m, and model"):
        check.run(str(recipe), [], "t4", True)
