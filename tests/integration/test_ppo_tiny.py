"""`gemma-tune ppo` on tiny Gemmas of every generation: train, save, open, resume; and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.cli import main
from gemma_tune.train import checkpoint
from tests.integration.test_preferences_tiny import LORA, pair_recipe, start_of
from tests.integration.tiny_runs import COLOURS, THINGS, document, lines, write_recipe
from tests.tiny import TINY_NAMES

Tiny = Callable[..., Path]

REWARD = """
def score(responses):
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in responses]
"""


def write_prompts(path: Path, count: int = 40) -> Path:
    rows = [
        {"prompt": f"What is the colour of the {THINGS[number % len(THINGS)]} {COLOURS[number % 5]} {number}?"}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ppo_recipe(folder: Path, base: Path, reward: Any = None, **changes: Any) -> Path:
    """A recipe of four steps of eight responses. Sections in `changes` are merged in."""
    if reward is None:
        (folder / "mine.py").write_text(REWARD, encoding="utf-8")
        reward = f"{folder / 'mine.py'}:score"
    own: dict[str, Any] = {
        "stage": "ppo",
        "data": {"sources": [{"name": str(write_prompts(folder / "prompts.jsonl"))}], "max_length": 96, "holdout": 8},
        "ppo": {"reward": reward, "max_new_tokens": 8, "minibatches": 2},
        "optim": {"learning_rate": 1e-3, "epochs": 1, "max_steps": 4},
        "batch": {"size": 8, "micro": 4},
        "evaluation": {"every": 2},
        "checkpoint": {"every": 1},
    }
    for section, values in changes.items():
        known = own.get(section)
        own[section] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    path = write_recipe(folder, base, **own)
    recipe = json.loads(path.read_text()) | {"adapter": LORA, "data": own["data"]}
    if "adapter" in recipe["model"] and "adapter_mode" not in recipe["model"]:
        del recipe["adapter"]  # the policy's is as it was saved
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def reward_model(tiny: Tiny, folder: Path, name: str = "gemma3_text", *words: str) -> Path:
    """A finished run of `gemma-tune reward`."""
    folder.mkdir(exist_ok=True)
    assert main(["reward", str(pair_recipe(folder, tiny(name), "reward")), *words]) == 0
    return folder / "run"


def outcome(run: Path) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions."""
    results = document(run / "run.json")["results"]
    timeless = [
        {key: value for key, value in row.items() if not key.startswith(("time", "peak")) and "second" not in key}
        for row in lines(run / "metrics.jsonl")
        if "objective/scores" in row
    ]
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return timeless, weights, results["base"], results["tuned"], results["tokens_seen"]


# --- every generation


@pytest.mark.parametrize("name", TINY_NAMES)
def test_ppo_of_every_generation(tiny: Tiny, tmp_path: Path, name: str) -> None:
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny(name)))]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    assert results["base"]["kl"] == results["base"]["kl_k3"] == 0, "the policy begins as its reference"
    assert results["tuned"]["prompts"] == 8 and results["tuned"]["kl_k3"] > 0
    assert results["answers"] and all({"score", "text"} <= row["tuned"].keys() for row in results["answers"])
    steps = [row for row in lines(run / "metrics.jsonl") if "objective/scores" in row]
    assert len(steps) == 4 and all(row["val/first_ratio_gap"] == 0 for row in steps)

    from gemma_tune.models.saved import load_run

    model, _, _ = load_run(run)
    assert list(model.peft_config) == ["default"], "the policy is one plain adapter"


# --- whose reward


def test_from_sft_and_a_reward_model_to_ppo(tiny: Tiny, tmp_path: Path) -> None:
    start = start_of(tiny, tmp_path / "sft")
    reward = reward_model(tiny, tmp_path / "reward")
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), str(reward), model={"adapter": str(start)})
    assert main(["ppo", str(recipe)]) == 0
    run = tmp_path / "run"
    results = document(run / "run.json")["results"]
    assert results["base"]["kl"] == 0 and abs(results["base"]["score"]) < 20
    first = next(row for row in lines(run / "metrics.jsonl") if "objective/scores" in row)
    assert first["val/first_ratio_gap"] == 0 and first["policy/clipfrac_avg"] < 1
    before = (start / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() != before, "a copy was trained"


def test_a_mix_of_a_model_and_a_function(tiny: Tiny, tmp_path: Path) -> None:
    reward = str(reward_model(tiny, tmp_path / "reward"))
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    function = f"{tmp_path / 'mine.py'}:score"
    mix = [{"source": reward, "weight": 0.5}, {"source": function, "weight": 2.0}]
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny("gemma3_text"), mix))]) == 0
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        if "objective/scores" in row:
            total = 0.5 * row[f"scores/{reward}"] + 2 * row[f"scores/{function}"]
            assert row["objective/scores"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{"estimator": "rloo", "samples_per_prompt": 2}, {"estimator": "reinforce_pp"}, {"critic": "head"}]
)
def test_the_other_estimators_and_critics(tiny: Tiny, tmp_path: Path, settings: dict[str, Any]) -> None:
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny("gemma3_text"), ppo=settings))]) == 0
    steps = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "objective/scores" in row]
    assert len(steps) == 4
    assert all(("loss/value_avg" in row) == ("critic" in settings) for row in steps)


def test_stacked_on_a_frozen_adapter_it_is_saved_as_one(tiny: Tiny, tmp_path: Path) -> None:
    start = start_of(tiny, tmp_path / "sft")
    model = {"adapter": str(start), "adapter_mode": "stack"}
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny("gemma3_text"), model=model))]) == 0
    from gemma_tune.models.saved import load_run

    opened, _, _ = load_run(tmp_path / "run")
    assert list(opened.peft_config) == ["default"] and opened.peft_config["default"].r == 8


@pytest.mark.parametrize(("stop_kl", "steps"), [(None, 4), (1e-12, 1)])
def test_the_speed_of_the_update_counts_what_was_learnt_from(
    tiny: Tiny, tmp_path: Path, stop_kl: float | None, steps: int
) -> None:
    """Two epochs of two minibatches, or what `stop_kl` leaves of them."""
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny("gemma3_text"), ppo={"stop_kl": stop_kl}))]) == 0
    first = next(row for row in lines(tmp_path / "run" / "metrics.jsonl") if "objective/scores" in row)
    learnt = first["update/tokens_per_second"] * first["time/update"]
    assert first["optimizer_steps"] == steps and learnt == pytest.approx(first["tokens_seen"] * steps / 2)


# --- resume


@pytest.mark.parametrize("source", ["function", "model"])
def test_a_run_that_was_killed_within_a_step_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path, source: str) -> None:
    reward = str(reward_model(tiny, tmp_path / "reward")) if source == "model" else None
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), reward, ppo={"kl_target": 0.5})
    assert main(["ppo", str(recipe), f"output={tmp_path / 'straight'}"]) == 0
    child = os.fork()
    if not child:
        from gemma_tune.train.ppo.trainer import PpoTrainer

        learn = PpoTrainer.learn

        def killed(self: Any, *args: Any, **keywords: Any) -> Any:
            if self.state.global_step == 2:  # the third step's responses are drawn and scored
                os.kill(os.getpid(), signal.SIGKILL)
            return learn(self, *args, **keywords)

        PpoTrainer.learn = killed  # type: ignore[method-assign]
        os._exit(main(["ppo", str(recipe), f"output={tmp_path / 'cut'}"]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert checkpoint.checkpoints(tmp_path / "cut")[0][0] == 2
    assert main(["ppo", str(recipe), f"output={tmp_path / 'cut'}", "--resume", "must"]) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "straight")


def test_a_stop_during_the_rollout_gives_it_up(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"))
    assert main(["ppo", str(recipe), f"output={tmp_path / 'straight'}"]) == 0
    from gemma_tune.train.ppo.trainer import PpoTrainer

    drawn = PpoTrainer.roll_out

    def stopped(self: Any, *args: Any) -> Any:
        if self.state.global_step == 1 and self.evaluated_at == 0:
            signal.raise_signal(signal.SIGTERM)
        return drawn(self, *args)

    monkeypatch.setattr(PpoTrainer, "roll_out", stopped)
    assert main(["ppo", str(recipe), f"output={tmp_path / 'cut'}"]) == 75
    assert checkpoint.checkpoints(tmp_path / "cut")[0][0] == 1
    monkeypatch.undo()
    assert main(["ppo", str(recipe), f"output={tmp_path / 'cut'}", "--resume", "must"]) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "straight")


def test_a_full_disk_leaves_whole_checkpoints_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, saved, own = ppo_recipe(tmp_path, tiny("gemma3_text")), [], torch.save

    def full_at_the_second(*args: Any, **keywords: Any) -> None:
        saved.append(args)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(*args, **keywords)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    assert main(["ppo", str(recipe)]) == 4
    assert "the disk is full" in capsys.readouterr().err
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"checkpoint-1"}
    assert main(["ppo", str(recipe), "--resume", "must"]) == 0


def test_another_reward_is_another_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), optim={"max_steps": 2})
    assert main(["ppo", str(recipe)]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "mine.py").write_text(REWARD.replace("aeiou", "xyz"), encoding="utf-8")
    assert main(["ppo", str(recipe), "--resume", "auto"]) == 2
    assert "ppo.reward" in capsys.readouterr().err


# --- what it refuses


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def score(responses):\n    return [float('nan')] * len(responses)", "finite"),
        ("def score(responses):\n    return [1.0]", "8 responses"),
        ("def score(responses):\n    raise KeyError('lost')", "lost"),
        ("def score(responses):\n    return ['good'] * len(responses)", "not a number"),
    ],
)
def test_a_bad_reward_function_is_named(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, said: str
) -> None:
    (tmp_path / "bad.py").write_text(code, encoding="utf-8")
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), f"{tmp_path / 'bad.py'}:score")
    assert main(["ppo", str(recipe)]) == 4
    assert said in capsys.readouterr().err


def test_a_reward_model_of_another_base_is_refused_before_the_training(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = reward_model(tiny, tmp_path / "reward", "gemma2")
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny("gemma3_text"), str(reward)))]) == 2
    assert "trained on" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_without_a_reward_head_is_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = start_of(tiny, tmp_path / "sft")
    assert main(["ppo", str(ppo_recipe(tmp_path, tiny("gemma3_text"), str(start)))]) == 2
    assert "reward" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_start_that_is_on_the_lm_head_is_refused(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny("gemma3_text"))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(tmp_path / "foreign"), save_embedding_layers=False)
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), model={"adapter": str(tmp_path / "foreign")})
    assert main(["ppo", str(recipe)]) == 2
    assert "lm_head" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_file_that_switches_gradients_off_stops_no_training(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "off.py").write_text("import torch\ntorch.set_grad_enabled(False)\n" + REWARD, encoding="utf-8")
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), f"{tmp_path / 'off.py'}:score", optim={"max_steps": 1})
    try:
        assert main(["ppo", str(recipe)]) == 0
    finally:
        torch.set_grad_enabled(True)


def test_a_warm_up_over_all_steps_is_refused(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four steps: 32 prompts once, 8 a step."""
    recipe = ppo_recipe(tmp_path, tiny("gemma3_text"), ppo={"critic_warmup": 4}, optim={"max_steps": None})
    assert main(["ppo", str(recipe)]) == 2
    assert "leaves none of the run's 4 steps" in capsys.readouterr().err


def test_a_policy_that_never_stops_is_counted_and_penalised(tiny: Tiny, tmp_path: Path) -> None:
    recipe = ppo_recipe(
        tmp_path, tiny("gemma3_text"), ppo={"max_new_tokens": 1, "missing_stop_penalty": 3.0}, optim={"max_steps": 1}
    )
    assert main(["ppo", str(recipe)]) == 0
    [row] = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "objective/scores" in row]
    assert row["rollout/length"] == 1
    lost = row["objective/scores"] - row["objective/rlhf_reward"] + row["objective/non_score_reward"]
    assert lost == pytest.approx(3.0 * (1 - row["rollout/stopped"]), abs=1e-5)
