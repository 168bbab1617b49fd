"""What `gemma-tune sft`, `reward`, `dpo`, `kto` and `ppo` print at their end; each takes recipes of its stage only."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma_tune import console
from gemma_tune.commands import train
from gemma_tune.errors import UserError
from tests.unit.plan.recipes import plan_for

RESULTS: dict[str, Any] = {
    "base": {"loss": 4.0, "perplexity": 54.6, "token_accuracy": 0.25, "ended": 1, "answers": 3},
    "tuned": {"loss": 2.0, "perplexity": 7.39, "token_accuracy": 0.5, "ended": 3, "answers": 3},
    "relative_fall": 0.5,
    "answers": [
        {
            "prompt": "Who?\nYou?",
            "base": {"text": "\x1b[31mnobody", "ended": False, "tokens": 4},
            "tuned": {"text": "I.", "ended": True, "tokens": 3},
        },
        {"prompt": "long " * 100, "base": {"text": "x", "ended": True, "tokens": 1}},
    ],
    "steps": 1200,
    "tokens_seen": 34567,
    "train_seconds": 12.34,
    "tokens_per_second": 2801.0,
    "peak_memory": {"rss": 2**30},
    "weights": {"folder": "adapter", "files": {}},
}


def printed(monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], stage: str = "sft", **settings: Any) -> str:
    stream = io.StringIO()
    screen = Console(file=stream, width=200, markup=False, highlight=False, **settings)
    monkeypatch.setattr(console, "stdout", lambda: screen)
    train.report(stage, results, Path("runs/x"))
    return stream.getvalue()


def test_in_a_pipe_one_line_a_text_and_nothing_drives_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, RESULTS).splitlines()
    assert lines[:3] == ["prompt: Who? You?", r"  base: \x1b[31mnobody [cut]", "  tuned: I."]
    assert lines[3].endswith("...") and lines[5] == "  tuned: -"
    assert lines[6:] == [
        "held-out loss: 4.0000 -> 2.0000 (-50.0 %), perplexity 54.60 -> 7.39, token accuracy 0.250 -> 0.500",
        "answers that end by themselves: 1 -> 3 of 3 prompts",
        "1,200 steps, 34,567 tokens in 12.3 s of training (2,801 tokens/s); peak memory 1.00 GiB rss",
        "result: runs/x/adapter",
        "talk to it: gemma-tune chat runs/x",
    ]


def test_on_a_terminal_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, RESULTS, force_terminal=True)
    assert "base" in text and "tuned" in text and "│" in text and "Who? You?" in text
    assert "\x1b[31m" not in text.replace("\\x1b[31m", "")


def test_without_held_out_rows_there_is_still_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed(monkeypatch, {"steps": 2, "base": {"answers": 0}, "tuned": {"answers": 0}, "answers": []})
    assert "held-out" not in text and "2 steps" in text


COST = {
    "steps": 12,
    "tokens_seen": 3456,
    "train_seconds": 1.5,
    "tokens_per_second": 2304.0,
    "peak_memory": {"rss": 2**30},
}
REWARD: dict[str, Any] = {
    "base": {"accuracy": 0.48, "margin": -0.01, "mean": 0.3, "std": 1.2, "length_correlation": 0.5, "pairs": 1200},
    "tuned": {"accuracy": 0.715, "margin": 1.5, "mean": 0.02, "std": 1.1, "length_correlation": -0.1, "pairs": 1200},
    **COST,
    "weights": {"folder": "adapter", "files": {}},
}
DPO: dict[str, Any] = {
    "base": {"loss": 0.6931, "accuracy": 0.0, "margin": 0.0, "chosen_logps": -80.0, "rejected_logps": -82.0}
    | {"pairs": 40, "ended": 2, "answers": 3},
    "tuned": {"loss": 0.5, "accuracy": 0.75, "margin": 0.66, "chosen_logps": -84.5, "rejected_logps": -99.0}
    | {"pairs": 40, "ended": 3, "answers": 3, "kl": 1.234},
    **COST,
}


def test_a_reward_model_is_rated_and_cannot_be_talked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, REWARD, "reward").splitlines() == [
        "held-out pairs rated right: 48.0% -> 71.5% of 1,200, margin -0.010 -> 1.500",
        "rewards: mean 0.300 -> 0.020, standard deviation 1.200 -> 1.100",
        "correlation of reward and length of the answer: +0.50 -> -0.10",
        "12 steps, 3,456 tokens in 1.5 s of training (2,304 tokens/s); peak memory 1.00 GiB rss",
        "result: runs/x/adapter",
        "rate answers with it: gemma_tune.models.reward.load_reward('runs/x')",
    ]


def test_dpo_says_how_far_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, DPO, "dpo").splitlines() == [
        "held-out loss: 0.6931 -> 0.5000, chosen preferred to rejected in 75.0% of 40 pairs, margin 0.660",
        "log-probability of the answers: chosen -80.0 -> -84.5, rejected -82.0 -> -99.0 nats",
        "distance from the reference (KL): 1.23 nats an answer",
        "answers that end by themselves: 2 -> 3 of 3 prompts",
        "12 steps, 3,456 tokens in 1.5 s of training (2,304 tokens/s); peak memory 1.00 GiB rss",
        "talk to it: gemma-tune chat runs/x",
    ]


KTO: dict[str, Any] = {
    "base": {"loss": 0.5, "accuracy": 0.0, "good_reward": 0.0, "bad_reward": 0.0, "kl": 0.0, "rows": 40},
    "tuned": {"loss": 0.41, "accuracy": 0.825, "good_reward": 0.5, "bad_reward": -0.25, "kl": 1.234, "rows": 40},
    **COST,
}


def test_kto_says_on_which_side_the_answers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = printed(monkeypatch, KTO, "kto").splitlines()
    assert first == "held-out loss: 0.5000 -> 0.4100, 82.5% of 40 answers on their side of the KL point"
    assert second == "rewards of the answers: good +0.500, bad -0.250; KL point 1.23 nats"
    only_good = KTO["tuned"] | {"bad_reward": None}
    assert "answers: good +0.500; KL" in printed(monkeypatch, KTO | {"tuned": only_good}, "kto")


PPO: dict[str, Any] = {
    "base": {"score": -0.25, "score_std": 0.5, "kl": 0.0, "kl_k3": 0.0, "entropy": 2.345, "response_length": 60.25}
    | {"stopped": 0.125, "prompts": 1200, "ended": 1, "answers": 3},
    "tuned": {"score": 0.75, "score_std": 0.25, "kl": 4.5, "kl_k3": 4.321, "entropy": 1.5, "response_length": 40.0}
    | {"stopped": 0.9, "prompts": 1200, "ended": 3, "answers": 3},
    "score_rise": 16.0,
    **COST,
    "weights": {"folder": "adapter", "files": {}},
}


def test_ppo_says_what_it_won_and_how_far_it_went(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, PPO, "ppo").splitlines() == [
        "score of responses to 1,200 held-out prompts: -0.250 -> 0.750 (+1.000, +16.0 standard deviations of a "
        "step's mean)",
        "distance from the reference (KL): 0.00 -> 4.50 nats a response (k3: 0.00 -> 4.32); entropy 2.35 -> 1.50 nats "
        "a token",
        "length of a response: 60.2 -> 40.0 tokens; stopped by themselves: 12.5% -> 90.0%",
        "answers that end by themselves: 1 -> 3 of 3 prompts",
        "12 steps, 3,456 tokens in 1.5 s of training (2,304 tokens/s); peak memory 1.00 GiB rss",
        "result: runs/x/adapter",
        "talk to it: gemma-tune chat runs/x",
    ]
    first, *_ = printed(monkeypatch, PPO | {"score_rise": None}, "ppo").splitlines()
    assert first.endswith("0.750 (+1.000)")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo"])
def test_without_held_out_pairs_only_the_cost_is_told(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    lines = printed(monkeypatch, COST | {"base": {}, "tuned": {}}, stage).splitlines()
    assert len(lines) == 2 and lines[0].startswith("12 steps")


def test_a_length_that_does_not_vary_has_no_correlation(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = REWARD["tuned"] | {"length_correlation": None}
    assert "correlation" not in printed(monkeypatch, REWARD | {"tuned": tuned}, "reward")
    base = REWARD["base"] | {"length_correlation": None}
    assert "answer: -0.10" in printed(monkeypatch, REWARD | {"base": base}, "reward")


@pytest.mark.parametrize(
    ("command", "stage"), [("sft", "ppo"), ("reward", "sft"), ("dpo", "kto"), ("kto", "reward"), ("ppo", "dpo")]
)
def test_a_recipe_of_another_stage_names_its_command(command: str, stage: str, tmp_path: Path) -> None:
    recipe = tmp_path / "my recipe.yaml"
    lines = [
        f"stage: {stage}",
        "model: {name: google/gemma-3-1b-it}",
        "data: {sources: [{name: x.jsonl}]}",
        "output: x",
        *(["ppo: {reward: runs/reward}"] if stage == "ppo" else []),
    ]
    recipe.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=f"this recipe is for gemma-tune {stage}") as caught:
        train.run(command, str(recipe), [])
    assert caught.value.problems[0].fix == f"gemma-tune {stage} '{recipe}'"


def test_a_package_can_be_hidden_while_others_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.util import find_spec

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with train.unseen("colorsys"):
        assert find_spec("colorsys") is None
        with pytest.raises(ImportError):
            import colorsys
    import colorsys

    with train.unseen("colorsys"):
        assert sys.modules["colorsys"] is colorsys, "what is imported already stays"


def test_the_plan_in_two_lines() -> None:
    changes = {"stage": "dpo", "model.adapter": "runs/quickstart", "batch.micro": 2}
    first, second = train.summary(plan_for(changes)).splitlines()
    assert "LoRA r=4 on from runs/quickstart, on rtx4090" in first
    assert second.startswith("batch 16 = 2 pairs x 8 steps x 1 processes, 1024 tokens a prompt with its answer")
    stacked = train.summary(plan_for(changes | {"model.adapter_mode": "stack"}))
    assert "LoRA r=16 on top of runs/quickstart" in stacked
    _, second = train.summary(plan_for({"stage": "ppo", "ppo.max_new_tokens": 64, "batch.micro": 8})).splitlines()
    assert second == (
        "batch 16 = 8 responses x 2 steps x 1 processes, 960 tokens a prompt and 64 a response, learning rate 1e-05"
    )
    assert "= 4 rows x 4 steps" in train.summary(plan_for({"batch.micro": 4}))
