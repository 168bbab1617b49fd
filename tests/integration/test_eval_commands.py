"""`gemma-tune eval` on finished tiny runs of every stage: what it measures is what the training measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.cli import main
from gemma_tune.evaluation.target import find_target
from tests.integration.test_kto_tiny import kto_recipe
from tests.integration.test_ppo_tiny import ppo_recipe
from tests.integration.test_preferences_tiny import pair_recipe
from tests.integration.tiny_runs import document, lines, write_recipe
from tests.unit.models.test_gguf_files import as_gguf

Tiny = Callable[..., Path]
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> Path:
    return tiny("gemma3_text")


@pytest.fixture(scope="module")
def sft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    assert main(["sft", str(write_recipe(folder, base))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    assert main(["reward", str(pair_recipe(folder, base, "reward"))]) == 0
    return folder / "run"


def copy_of(run: Path, folder: Path) -> Path:
    """A copy that a test may write into. It still names its data and its base where they are."""
    shutil.copytree(run, folder / "copy")
    return folder / "copy"


def measured(run: Path, *words: str) -> dict[str, Any]:
    assert main(["eval", str(run), *words]) == 0
    return document(run / "evaluation.json")


# --- what was measured in the training


def check_equal(run: Path, found: dict[str, Any], *sides: str) -> None:
    results = document(run / "run.json")["results"]
    for side in sides:
        for key, value in results[side].items():
            assert found["held_out"][side][key] == pytest.approx(value, rel=1e-9, abs=1e-12), (side, key)


def test_the_figures_of_an_untouched_sft_run_are_those_of_its_training(sft: Path, tmp_path: Path) -> None:
    run = copy_of(sft, tmp_path)
    found = measured(run)
    check_equal(run, found, "base", "tuned")
    assert found["held_out"]["rows"] == 8 and found["held_out"]["tokens"] > 8
    trained = document(run / "run.json")["results"]["answers"]
    for now, then in zip(found["answers"], trained, strict=True):
        assert now["prompt"] == then["prompt"]
        for side in ("base", "tuned"):
            assert {key: now[side][key] for key in ("text", "ended", "tokens")} == then[side]
    rows = lines(run / "evaluation.rows.jsonl")
    one = [row for row in rows if row["part"] == "held_out" and row["model"] == "tuned"]
    assert len(one) == 8
    loss = sum(row["nats"] for row in one) / sum(row["tokens"] for row in one)
    assert loss == pytest.approx(found["held_out"]["tuned"]["loss"])


def test_a_full_fine_tune_is_compared_with_the_model_that_it_began_with(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base, optim={"max_steps": 2, "learning_rate": 1e-3})
    recipe.write_text(json.dumps({k: v for k, v in json.loads(recipe.read_text()).items() if k != "adapter"}))
    assert main(["sft", str(recipe), "--adapter", "null"]) == 0
    found = measured(tmp_path / "run")
    check_equal(tmp_path / "run", found, "base", "tuned")
    assert found["subject"]["adapter_sha256"] is None and found["subject"]["content"].startswith("content-")
    named = find_target(str(tmp_path / "run" / "model"))
    assert named.tuned and named.file == tmp_path / "run" / "evaluation.json", "its weights are no published model's"


def test_a_reward_model(reward: Path, tmp_path: Path, capsys: Output) -> None:
    run = copy_of(reward, tmp_path)
    found = measured(run)
    check_equal(run, found, "tuned")
    assert found["reward"]["accuracy"] == found["held_out"]["tuned"]["accuracy"]
    assert found["reward"]["length_correlation"] == pytest.approx(found["held_out"]["tuned"]["length_correlation"])
    assert sum(part["pairs"] for part in found["reward"]["by_length"].values()) == found["reward"]["pairs"] == 8
    said = capsys.readouterr().out
    assert "pairs rated right" in said and "correlation of reward and length" in said
    rows = lines(run / "evaluation.rows.jsonl")
    assert sum(row["chosen"] > row["rejected"] for row in rows) == round(8 * found["reward"]["accuracy"])


def test_dpo_on_top_of_a_run(base: Path, sft: Path, tmp_path: Path) -> None:
    """The result is one adapter, its reference is the run below: both are asked as in the training."""
    model = {"name": str(base), "quantization": "none", "precision": "fp32", "adapter": str(sft)}
    recipe = pair_recipe(tmp_path, base, "dpo", model={**model, "adapter_mode": "stack"})
    assert main(["dpo", str(recipe)]) == 0
    found = measured(tmp_path / "run")
    results = document(tmp_path / "run" / "run.json")["results"]
    for key, value in results["tuned"].items():
        if key == "kl_per_token" or key == "kl":  # drawn, from weights whose ranks were laid side by side
            continue
        assert found["held_out"]["tuned"][key] == pytest.approx(value, abs=1e-4), key
    assert found["held_out"]["tuned"]["kl"] == pytest.approx(results["tuned"]["kl"], abs=1e-3)
    assert found["held_out"]["base"]["margin"] == 0
    assert found["held_out"]["stage"] == "dpo"


def test_kto_and_what_becomes_of_a_start_that_has_changed(
    base: Path, sft: Path, tmp_path: Path, capsys: Output
) -> None:
    start = copy_of(sft, tmp_path)
    model = {"name": str(base), "quantization": "none", "precision": "fp32", "adapter": str(start)}
    recipe = kto_recipe(tmp_path, base, model=model, adapter=None)
    assert main(["kto", str(recipe)]) == 0
    check_equal(tmp_path / "run", measured(tmp_path / "run"), "base", "tuned")
    config = json.loads((start / "adapter" / "adapter_config.json").read_text())
    (start / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "which has changed since then" in said and "put that adapter back" in said


def test_ppo(base: Path, tmp_path: Path) -> None:
    assert main(["ppo", str(ppo_recipe(tmp_path, base))]) == 0
    found = measured(tmp_path / "run")
    check_equal(tmp_path / "run", found, "base", "tuned")
    assert found["held_out"]["stage"] == "ppo" and found["held_out"]["tuned"]["prompts"] == 8


# --- other targets, other rows


def test_a_plain_model_on_the_rows_of_a_recipe_is_the_base_of_the_run(
    base: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(base), "--recipe", str(sft.parent / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    assert "  base: " in said and "  tuned: " not in said
    found = document(tmp_path / f"{base.name}.evaluation.json")
    expected = document(sft / "run.json")["results"]["base"]
    assert found["held_out"]["base"]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["held_out"]["base"]["tokens"] == expected["tokens"] and "tuned" not in found["held_out"]


def test_a_checkpoint_is_evaluated_beside_its_run_and_is_another_subject(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    early = min(sft.glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[1]))
    assert main(["eval", str(early), "--no-base", "--limit", "2", "--max-new-tokens", "3"]) == 0
    found = document(tmp_path / f"{early.name}.evaluation.json")
    final = document(sft / "run.json")["results"]["weights"]["files"]["adapter_model.safetensors"]["sha256"]
    assert found["subject"]["adapter_sha256"] != final
    assert found["held_out"]["rows"] == 2 and "base" not in found["held_out"]
    assert all(row["tuned"]["tokens"] <= 3 for row in found["answers"])


def test_parts_that_were_not_measured_now_stay_until_the_weights_change(sft: Path, tmp_path: Path) -> None:
    run = copy_of(sft, tmp_path)
    measured(run, "--limit", "2")
    file = run / "evaluation.json"
    file.write_text(json.dumps(document(file) | {"tasks": {"mine": {"metrics": {"acc": 0.5}}}}))
    found = measured(run, "--limit", "3", "--no-base")
    assert found["tasks"] == {"mine": {"metrics": {"acc": 0.5}}} and found["held_out"]["rows"] == 3
    early = min(sft.glob("checkpoint-*"), key=lambda one: int(one.name.split("-")[1]))
    shutil.copy(early / "adapter_model.safetensors", run / "adapter")
    assert "tasks" not in measured(run, "--limit", "2", "--no-base")
    file.write_text("no evaluation")
    assert main(["eval", str(run)]) == 2 and file.read_text() == "no evaluation"


# --- two of them


def test_a_run_and_its_copy_do_not_differ(sft: Path, tmp_path: Path, capsys: Output) -> None:
    run = copy_of(sft, tmp_path)
    rows = [{"part": "task", "task": "t", "item": item, "metric": "acc", "correct": item % 2} for item in range(6)]
    assert main(["eval", str(run), "--limit", "2", "--no-base"]) == 0
    with (run / "evaluation.rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    capsys.readouterr()
    assert main(["eval", "--compare", str(run), str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]
    assert set(found["figures"]) == {"loss", "token_accuracy", "stop_rate", "format_rate"}
    for one in (*found["figures"].values(), found["tasks"]["t"]["acc"]):
        assert (one["difference"], one["low"], one["high"]) == (0, 0, 0)
    assert found["tasks"]["t"]["acc"]["mcnemar_p"] == 1 and found["tasks"]["t"]["acc"]["rows"] == 6
    assert found["trained_on_rows"] == {"a": "no", "b": "no"}


def test_a_run_and_its_base(
    base: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    run = copy_of(sft, tmp_path)
    found = measured(run)
    capsys.readouterr()
    assert main(["eval", "--compare", str(base), str(run), "--recipe", str(sft.parent / "recipe.yaml")]) == 0
    said = capsys.readouterr().out
    assert "trained on these rows: A not known" in said and "trained on these rows: B" not in said
    assert main(["eval", "--compare", str(run), str(base), "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["comparison"]["figures"]["loss"]
    assert loss["a"] == pytest.approx(found["held_out"]["tuned"]["loss"])
    assert loss["b"] == pytest.approx(found["held_out"]["base"]["loss"], rel=1e-5)
    assert loss["low"] <= loss["difference"] <= loss["high"] and loss["rows"] == 8
    assert "held_out" in document(run / "evaluation.json"), "it stays beside the comparison"


def test_who_was_trained_on_the_rows_is_refused(base: Path, sft: Path, tmp_path: Path, capsys: Output) -> None:
    other = write_recipe(tmp_path, base, seed=9, samples={"held_out": 0})
    assert main(["sft", str(other)]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", str(sft), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "it was trained on" in said and "of the 8 rows" in said
    # Nor is what goes on from it, with rows of its own.
    (tmp_path / "next").mkdir()
    model = {"name": str(base), "quantization": "none", "precision": "fp32", "adapter": str(tmp_path / "run")}
    later = write_recipe(tmp_path / "next", base, model=model, optim={"max_steps": 1}, seed=5)
    rows = tmp_path / "next" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is", "Tell me"))
    later.write_text(
        json.dumps({key: value for key, value in json.loads(later.read_text()).items() if key != "adapter"})
    )
    assert main(["sft", str(later)]) == 0
    capsys.readouterr()
    assert main(["eval", "--compare", str(sft), str(tmp_path / "next" / "run")]) == 2
    assert f"{tmp_path / 'run'}: it was trained on" in capsys.readouterr().err


def test_reward_models_are_compared_with_each_other_alone(
    reward: Path, sft: Path, tmp_path: Path, capsys: Output
) -> None:
    run = copy_of(reward, tmp_path)
    assert main(["eval", "--compare", str(run), str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["comparison"]["figures"]
    assert found["reward_accuracy"]["difference"] == 0
    assert main(["eval", "--compare", str(sft), str(run)]) == 2
    assert "no figure in common" in capsys.readouterr().err


# --- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare"], "needs two targets, and 1 came"),
        (["--shots", "2"], "--shots: is for --tasks"),
        (["--include-path", "."], "--include-path: is for"),
        (["--chat"], "--chat: is for"),
        (["--tasks", "t", "--recipe", "r.yaml"], "--recipe: is for held-out rows"),
        (["--limit", "0"], "--limit"),
        (["--output", "."], "--output: is a folder"),
    ],
)
def test_options_that_would_do_nothing(sft: Path, capsys: Output, words: list[str], said: str) -> None:
    assert main(["eval", str(sft), *words]) == 2
    assert said in capsys.readouterr().err


def test_targets_that_cannot_be_evaluated(base: Path, sft: Path, reward: Path, tmp_path: Path, capsys: Output) -> None:
    def refused(*words: str) -> str:
        capsys.readouterr()
        assert main(["eval", *words]) == 2
        return capsys.readouterr().err

    assert "no existing folder" in refused(str(tmp_path / "nowhere"))
    assert "rates answers and gives none" in refused(str(reward), "--tasks", "arc_easy")
    assert "which rows were held out" in refused(str(base))
    assert "one file for several targets" in refused(str(sft), str(sft), "--output", str(tmp_path / "x.json"))
    assert "only a run says which" in refused(str(base), "--memorisation")
    unfinished = copy_of(sft, tmp_path)
    shutil.rmtree(unfinished / "adapter")
    assert "let it finish, or resume" in refused(str(unfinished))


def test_data_that_changed_and_runs_that_held_nothing_out(base: Path, tmp_path: Path, capsys: Output) -> None:
    recipe = write_recipe(tmp_path, base, data={"holdout": 0}, evaluation=None, optim={"max_steps": 1})
    assert main(["sft", str(recipe)]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "no rows are held out" in capsys.readouterr().err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("red", "pink"))
    shutil.rmtree(tmp_path / "run")
    recipe = write_recipe(tmp_path, base, optim={"max_steps": 1}, samples={"held_out": 0})
    assert main(["sft", str(recipe)]) == 0
    rows.write_text(rows.read_text().replace("fox", "cat"))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "the data are not what they were" in capsys.readouterr().err


# --- what it is opened as


def test_a_quantised_base_in_bf16_gives_the_figures_of_its_training(base: Path, tmp_path: Path) -> None:
    model = {"name": str(base), "quantization": "nf4", "precision": "bf16"}
    recipe = write_recipe(tmp_path, base, model=model, optim={"max_steps": 2}, evaluation=None)
    assert main(["sft", str(recipe)]) == 0
    check_equal(tmp_path / "run", measured(tmp_path / "run"), "base", "tuned")


def test_a_gguf_file_on_the_rows_of_a_recipe(
    base: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    file = as_gguf(base, "gemma3_text", tmp_path / "model.gguf")
    assert main(["eval", str(file), "--recipe", str(sft.parent / "recipe.yaml")]) == 0
    assert "which multiplies with its weights unpacked" in capsys.readouterr().err
    found = document(tmp_path / "model.gguf.evaluation.json")
    before = document(sft / "run.json")["results"]["base"]
    assert found["held_out"]["base"]["tokens"] == before["tokens"]
    assert found["held_out"]["base"]["loss"] == pytest.approx(before["loss"], rel=0.01)  # bf16 here, fp32 there
    assert found["subject"]["content"].startswith("sha256:")


def test_tasks_are_asked_as_the_model_was_tuned_to_answer_and_their_items_are_kept(
    base: Path, sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """The command's part alone: `tests/unit/evaluation/test_harness.py` has what the harness does."""
    asked: list[dict[str, Any]] = []

    def run_tasks(model: Any, tokenizer: Any, family: Any, tasks: Any, **how: Any) -> dict[str, Any]:
        asked.append({"tasks": tasks, "family": family.name, **how})
        rows = [{"part": "task", "task": name, "item": 0, "metric": "acc", "correct": 1.0} for name in tasks]
        entry = {"metrics": {"acc": 1.0}, "shots": 0, "items": 1, "chat": how["chat"], "card": None}
        return {**dict.fromkeys(tasks, entry), "rows": rows}

    monkeypatch.setattr("gemma_tune.evaluation.harness.run_tasks", run_tasks)
    monkeypatch.chdir(tmp_path)
    run = copy_of(sft, tmp_path)
    measured(run, "--limit", "2", "--no-base")
    found = measured(run, "--tasks", " one, two,", "--limit", "5", "--shots", "3")
    assert asked[0]["tasks"] == ("one", "two") and asked[0]["chat"] and (asked[0]["limit"], asked[0]["shots"]) == (5, 3)
    assert found["tasks"].keys() == {"one", "two"} and found["held_out"]["rows"] == 2
    kinds = [(row["part"], row.get("task")) for row in lines(run / "evaluation.rows.jsonl")]
    assert kinds.count(("held_out", None)) == 2 and kinds.count(("task", "one")) == 1
    assert main(["eval", str(base), "--tasks", "one"]) == 0 and not asked[1]["chat"]
    assert main(["eval", str(base), "--tasks", "one", "--chat"]) == 0 and asked[2]["chat"]


def test_a_run_whose_plan_says_nothing_of_prompts_and_passes_as_those_on_tpus(sft: Path, tmp_path: Path) -> None:
    run = copy_of(sft, tmp_path)
    plan = document(run / "plan.json")
    del plan["session"]["samples"], plan["trainer"]["per_device_eval_batch_size"], plan["session"]["distributed"]
    plan["machine"] = {"name": "TPU v5e", "device": "tpu", "mesh": {"fsdp": 4, "tp": 2}, "world_size": 1}
    (run / "plan.json").write_text(json.dumps(plan))
    found = measured(run, "--max-new-tokens", "4")
    expected = document(run / "run.json")["results"]["tuned"]["loss"]
    assert found["held_out"]["tuned"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["answers"] and all(row["held_out"] for row in found["answers"])


def test_a_gpu_that_is_too_small_is_no_bug(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def measure(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("gemma_tune.evaluation.measure.measure", measure)
    assert main(["eval", str(copy_of(sft, tmp_path))]) == 3
    assert "not enough memory" in capsys.readouterr().err


def test_the_report_of_the_run_has_the_evaluation_and_stdout_nothing_but_json(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    run = copy_of(sft, tmp_path)
    part = {"stage": "sft", "rows": 1, "tuned": {"loss": 900.25, "perplexity": float("inf")}}
    monkeypatch.setattr("gemma_tune.evaluation.measure.measure", lambda *_, **__: ({"held_out": part}, []))
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["held_out"]["tuned"] == {"loss": 900.25, "perplexity": None}
    assert "900.2" in (run / "report.html").read_text(encoding="utf-8")
    (run / "report.html").unlink()
    assert main(["eval", str(run), "--output", str(tmp_path / "other.json")]) == 0
    assert not (run / "report.html").exists()  # it is about evaluation.json of the run
    monkeypatch.setattr("gemma_tune.report.write_report", lambda folder: refuse("no report"))
    assert main(["eval", str(run)]) == 0
    assert "no report was written" in capsys.readouterr().err


def test_reward_models_are_not_compared_on_rows_that_are_no_pairs(reward: Path, sft: Path, capsys: Output) -> None:
    recipe = str(sft.parent / "recipe.yaml")
    assert main(["eval", "--compare", str(reward), str(reward), "--recipe", recipe]) == 2
    assert "these rows are none" in capsys.readouterr().err
