"""`gemma-tune reward` and `gemma-tune dpo` on tiny Gemmas of every generation: train, save, open, resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.tiny_runs import COLOURS, THINGS, document, lines, write_recipe
from tests.tiny import TINY_NAMES

Tiny = Callable[..., Path]
LORA = {"r": 4, "alpha": 8}


def write_pairs(path: Path, count: int = 48, **columns: Any) -> Path:
    """Pairs of which the chosen answer names the thing, the rejected one another: learnable, of equal length."""
    rows = []
    for number in range(count):
        thing, other = THINGS[number % len(THINGS)], THINGS[(number + 3) % len(THINGS)]
        colour = COLOURS[number % len(COLOURS)]
        rows.append(
            {
                "prompt": f"What is the colour of the {thing} number {number}?",
                "chosen": f"The {thing} is {colour}, as all know.",
                "rejected": f"The {other} is {colour}, who would care?",
                "score_chosen": 8.0,
                "score_rejected": 5.0 - number % 3,
                **columns,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_recipe(folder: Path, base: Path, stage: str, **changes: Any) -> Path:
    """A recipe of eight steps over pairs. Sections in `changes` are merged in."""
    data = {"sources": [{"name": str(write_pairs(folder / "pairs.jsonl"))}], "max_length": 128, "holdout": 8}
    own: dict[str, Any] = {"stage": stage, "data": data, "adapter": LORA}
    for section, values in changes.items():
        known = own.get(section)
        own[section] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    path = write_recipe(folder, base, **own)
    recipe = json.loads(path.read_text())
    recipe["adapter"] = own["adapter"]
    recipe["data"] = own["data"]
    if stage == "reward":
        del recipe["samples"]
    if own["adapter"] is None:
        del recipe["adapter"]
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def start_of(tiny: Tiny, folder: Path, name: str = "gemma3_text") -> Path:
    """A finished SFT run."""
    folder.mkdir(exist_ok=True)
    assert main(["sft", str(write_recipe(folder, tiny(name)))]) == 0
    return folder / "run"


# --- every generation


@pytest.mark.parametrize("name", TINY_NAMES)
def test_a_reward_model_of_every_generation(tiny: Tiny, tmp_path: Path, name: str) -> None:
    recipe = pair_recipe(tmp_path, tiny(name), "reward")
    assert main(["reward", str(recipe)]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    assert results["tuned"]["loss"] < results["base"]["loss"] and results["tuned"]["pairs"] == 8
    assert 0 <= results["tuned"]["accuracy"] <= 1 and results["tuned"]["std"] > 0
    names = {path.name for path in (run / "adapter").iterdir()}
    assert names >= {"adapter_model.safetensors", "reward_head.safetensors", "reward_stats.json", "README.md"}

    from gemma_tune.models.reward import load_reward

    model, _, family, stats = load_reward(run)
    assert stats["token_id"] == family.turn_end_id and stats["accuracy"] == results["tuned"]["accuracy"]
    assert not model.training and model.head.score.weight.dtype == torch.float32
    rows = [[*range(240, 240 + length), family.turn_end_id] for length in (7, 19, 12)]
    alone = torch.cat([rewards(model, [row], family.pad_id, "right") for row in rows])
    for side in ("left", "right"):
        torch.testing.assert_close(rewards(model, rows, family.pad_id, side), alone, atol=1e-5, rtol=0)
    assert alone.std() > 1e-3, "they differ"


def rewards(model: Any, rows: list[list[int]], pad_id: int, side: str) -> torch.Tensor:
    width = max(map(len, rows))
    padded = [[pad_id] * (width - len(row)) for row in rows]
    ids = [fill + row if side == "left" else row + fill for fill, row in zip(padded, rows, strict=True)]
    mask = [
        [0] * len(fill) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(fill)
        for fill, row in zip(padded, rows, strict=True)
    ]
    with torch.no_grad():
        found: torch.Tensor = model.rewards(torch.tensor(ids), torch.tensor(mask))
    return found


@pytest.mark.parametrize("name", TINY_NAMES)
def test_dpo_of_every_generation(tiny: Tiny, tmp_path: Path, name: str) -> None:
    recipe = pair_recipe(tmp_path, tiny(name), "dpo", dpo={"beta": 0.1})
    assert main(["dpo", str(recipe)]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    base, tuned = results["base"], results["tuned"]
    assert base["margin"] == 0 and base["loss"] == pytest.approx(0.6931, abs=1e-3), "the policy is its reference"
    assert tuned["loss"] < base["loss"] and tuned["margin"] > 0 and tuned["accuracy"] > 0.5
    assert {"kl", "kl_per_token", "kl_answers"} <= tuned.keys()
    assert results["answers"] and all(row["tuned"] for row in results["answers"])

    from gemma_tune.models.saved import load_run

    model, _, _ = load_run(run)
    assert list(model.peft_config) == ["default"]


# --- resume


@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_a_resumed_run_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path, stage: str) -> None:
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), stage)
    assert main([stage, str(recipe)]) == 0
    run, cut = tmp_path / "run", tmp_path / "cut"
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "adapter")
    shutil.rmtree(cut / "checkpoint-8")
    record = document(cut / "run.json")
    (cut / "run.json").write_text(json.dumps(record | {"status": "aborted"}))
    assert checkpoint.newest(cut).found.step == 6  # type: ignore[union-attr]
    assert main([stage, str(recipe), f"output={cut}", "--resume", "must"]) == 0
    for file in (run / "adapter").glob("*.safetensors"):
        assert file.read_bytes() == (cut / "adapter" / file.name).read_bytes(), file.name
    assert document(cut / "run.json")["results"]["tuned"] == document(run / "run.json")["results"]["tuned"]


# --- what a training begins with


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_dpo_from_an_sft_run(tiny: Tiny, tmp_path: Path, mode: str) -> None:
    start = start_of(tiny, tmp_path / "sft")
    changes: dict[str, Any] = {"model": {"adapter": str(start), "adapter_mode": mode}}
    changes["adapter"] = None if mode == "continue" else {"r": 2, "alpha": 4}
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), "dpo", **changes)
    assert main(["dpo", str(recipe)]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    assert results["base"]["margin"] == 0 and results["tuned"]["margin"] > 0
    ranks = {"continue": 4, "stack": 6}
    assert document(run / "adapter" / "adapter_config.json")["r"] == ranks[mode]
    # The base's answers are those of the SFT run's result, and the result opens as one plain adapter.
    tuned = {row["prompt"]: row["tuned"]["text"] for row in document(start / "run.json")["results"]["answers"]}
    prompt = "What is the capital of France?"
    [row] = [row for row in results["answers"] if row["prompt"] == prompt]
    assert row["base"]["text"] == tuned[prompt]
    from gemma_tune.models.saved import load_run

    model, tokenizer, family = load_run(run)
    from gemma_tune.gemma.chat import render_prompt
    from gemma_tune.gemma.conversation import Conversation, Message
    from gemma_tune.models.tokenizer import GemmaEncoder
    from gemma_tune.train.evaluate import answers

    ids = render_prompt(Conversation((Message("user", prompt),)), family, GemmaEncoder(tokenizer, family))
    [answer] = answers(model, tokenizer, family, [ids], max_new_tokens=8)
    assert answer.text == row["tuned"]["text"]


def test_sft_goes_on_from_an_sft_run(tiny: Tiny, tmp_path: Path) -> None:
    start = start_of(tiny, tmp_path / "first")
    recipe = write_recipe(tmp_path, tiny("gemma3_text"), model={"adapter": str(start)})
    written = json.loads(recipe.read_text())
    del written["adapter"]
    recipe.write_text(json.dumps(written))
    assert main(["sft", str(recipe)]) == 0
    first, second = (document(run / "run.json")["results"] for run in (start, tmp_path / "run"))
    assert second["base"]["loss"] == pytest.approx(first["tuned"]["loss"], abs=1e-4)
    assert second["tuned"]["loss"] < second["base"]["loss"]


def test_a_reward_model_is_no_policy(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "reward"
    folder.mkdir()
    assert main(["reward", str(pair_recipe(folder, tiny("gemma3_text"), "reward"))]) == 0
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), "dpo", model={"adapter": str(folder / "run")}, adapter=None)
    assert main(["dpo", str(recipe)]) == 2
    assert "reward model" in capsys.readouterr().err
    assert main(["chat", str(folder / "run"), "--prompt", "Hello"]) == 2
    assert "reward model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_start_is_another_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = start_of(tiny, tmp_path / "sft")
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), "dpo", model={"adapter": str(start)}, adapter=None)
    assert main(["dpo", str(recipe)]) == 0
    record = document(tmp_path / "run" / "run.json")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "aborted"}))
    shutil.rmtree(start)
    other = tmp_path / "sft"
    shutil.rmtree(other)
    other.mkdir()
    assert main(["sft", str(write_recipe(other, tiny("gemma3_text"))), "optim.max_steps=4"]) == 0
    capsys.readouterr()
    assert main(["dpo", str(recipe), "--resume", "auto"]) == 2
    assert "adapter.start" in capsys.readouterr().err


# --- the reference


def test_the_precomputed_reference_gives_the_same_training_and_is_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), "dpo")
    outputs = {name: str(tmp_path / name) for name in ("asked", "kept", "again")}
    assert main(["dpo", str(recipe), f"output={outputs['asked']}", "dpo.precompute_reference=false"]) == 0
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert main(["dpo", str(recipe), f"output={outputs['kept']}", "dpo.precompute_reference=true"]) == 0
    files = list((tmp_path / "cache").rglob("*.npy"))
    assert len(files) == 2, "training and held-out pairs"

    from gemma_tune.train.dpo_trainer import DpoTrainer

    monkeypatch.setattr(DpoTrainer, "score_reference", None)
    assert main(["dpo", str(recipe), f"output={outputs['again']}", "dpo.precompute_reference=true"]) == 0
    losses = {
        name: [row["loss"] for row in lines(Path(output) / "metrics.jsonl") if "loss" in row]
        for name, output in outputs.items()
    }
    assert losses["kept"] == losses["again"]
    assert losses["kept"] == pytest.approx(losses["asked"], abs=1e-5)


def test_metrics_of_a_dpo_run(tiny: Tiny, tmp_path: Path) -> None:
    assert main(["dpo", str(pair_recipe(tmp_path, tiny("gemma3_text"), "dpo"))]) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 8
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"} <= set(
        steps[0]
    )
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert {"eval_accuracy", "eval_margin", "eval_chosen_logps", "eval_rejected_logps"} <= set(evaluated[0])
    assert steps[-1]["tokens_seen"] > steps[-1]["tokens_trained"] > 0


def test_what_dpo_trains_on_are_the_ids_of_the_renderer(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches that TRL's loss is given, not those that we prepared."""
    from trl import DPOTrainer

    from gemma_tune.gemma.chat import render, render_prompt
    from gemma_tune.gemma.conversation import Conversation, Message
    from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
    from tests.seams.test_trl_seams import family_of_tiny

    seen: dict[tuple[int, ...], tuple[int, ...]] = {}
    own = DPOTrainer._compute_loss

    def heard(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        for ids, mask, answer in zip(
            inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"], strict=True
        ):
            seen[tuple(ids[mask == 1].tolist())] = tuple(ids[answer == 1].tolist())
        return own(self, model, inputs, *rest)

    monkeypatch.setattr(DPOTrainer, "_compute_loss", heard)
    for name in ("gemma3_text", "gemma4"):
        seen.clear()
        folder = tmp_path / name
        folder.mkdir()
        recipe = pair_recipe(folder, tiny(name), "dpo", optim={"max_steps": 10})
        assert main(["dpo", str(recipe)]) == 0
        family = family_of_tiny(name)
        encoder = GemmaEncoder(load_tokenizer(str(tiny(name)), None, family), family)
        for row in lines(folder / "pairs.jsonl"):
            asked = Message("user", row["prompt"])
            prompt = tuple(render_prompt(Conversation((asked,)), family, encoder))
            for side in ("chosen", "rejected"):
                rendered = render(Conversation((asked, Message("model", row[side]))), family, encoder)
                whole = tuple(rendered.ids[: rendered.turns[-1]])
                assert whole[-1] == family.turn_end_id
                assert seen.pop(whole) == whole[len(prompt) :] and whole[: len(prompt)] == prompt
        assert not seen


def test_metrics_of_a_reward_run(tiny: Tiny, tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), "reward", reward={"margin": "score"})
    assert main(["reward", str(recipe)]) == 0
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert {"accuracy", "margin", "mean_reward"} <= set(next(row for row in rows if "loss" in row))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 4, 8]
    assert {"eval_accuracy", "eval_margin", "eval_mean", "eval_std"} <= set(evaluated[0])


@pytest.mark.parametrize(
    "dpo",
    [
        *({"loss": loss} for loss in ("ipo", "hinge", "sigmoid_norm", "apo_zero", "apo_down")),
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss": "sigmoid", "label_smoothing": 0.1},
        {"loss": "sigmoid", "sft_weight": 0.5},
    ],
    ids=str,
)
def test_every_loss_of_the_recipe_trains(tiny: Tiny, tmp_path: Path, dpo: dict[str, Any]) -> None:
    recipe = pair_recipe(tmp_path, tiny("gemma3_text"), "dpo", dpo=dpo)
    assert main(["dpo", str(recipe), "optim.max_steps=2"]) == 0
    results = document(tmp_path / "run" / "run.json")["results"]
    assert results["tuned"]["loss"] != results["base"]["loss"]


def test_checkpointing_gives_the_same_training(tiny: Tiny, tmp_path: Path) -> None:
    for stage in ("reward", "dpo"):
        folder = tmp_path / stage
        folder.mkdir()
        recipe = pair_recipe(folder, tiny("gemma3_text"), stage)
        losses = []
        for mode in ("false", "true"):
            output = folder / mode
            overrides = [f"output={output}", f"memory.gradient_checkpointing={mode}"]
            assert main([stage, str(recipe), *overrides]) == 0
            losses.append([row["loss"] for row in lines(output / "metrics.jsonl") if "loss" in row])
        assert losses[0] == pytest.approx(losses[1], abs=1e-5), stage
