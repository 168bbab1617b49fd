"""What recipes/quick_ppo.yaml names: the prompts of real dialogues, and a reward by a lexicon of sentiment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gemma_tune.data.sources import open_source
from gemma_tune.errors import TrainingError
from gemma_tune.recipe.shipped import copy_shipped
from gemma_tune.train.ppo.functions import load_function
from tests.unit.data.toys import prepare_prompts

RECIPES = Path(__file__).parents[3] / "recipes"


def test_prompts_are_the_beginnings_of_dialogues_and_each_is_a_group() -> None:
    pytest.importorskip("chitchat_dataset", reason="needs the package chitchat-dataset")
    found = prepare_prompts(f"{RECIPES}/chitchat.py:prompts", None, max_length=4096, holdout=64)
    report = found.report
    assert not report.repaired and set(report.dropped) <= {"repetition"}
    assert report.rows is not None and report.rows + 64 == 2962 - report.dropped.get("repetition", 0) > 2900
    assert len(found.held_out) == 64 and not report.remarks, "no group is larger than one prompt"
    prompts = [*found.train_examples, *found.held_out_examples]
    assert all([message.role for message in one.messages] == ["user", "model", "user"] for one in prompts)
    # The dialogues are those of the SFT recipe.
    talks = [row.value["messages"] for row in open_source({"name": f"{RECIPES}/chitchat.py:rows"})]
    begins = {tuple(message["content"] for message in talk[:3]) for talk in talks}
    assert all(tuple(message.content for message in one.messages) in begins for one in prompts)


def test_the_sentiment_of_a_response() -> None:
    pytest.importorskip("vaderSentiment", reason="needs the package vaderSentiment")
    responses = [
        "I love this, it is wonderful!",
        "This is awful and I hate it.",
        "The table has four legs.",
        "",
        "good",
    ]
    found = load_function(f"{RECIPES}/sentiment.py:score")([[]] * 5, responses)
    assert found[0] > 0.7 and found[1] < -0.7 and found[2:4] == [0.0, 0.0]
    assert 0 < found[4] < found[0] <= 1, "more good words are better"


def test_without_the_lexicon_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    score = load_function(f"{RECIPES}/sentiment.py:score")  # reading the file needs no lexicon
    monkeypatch.delitem(sys.modules, "vaderSentiment.vaderSentiment", raising=False)
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(TrainingError, match=r"sentiment\.py:\d+: .*which is not installed") as caught:
        score([[]], ["good"])
    assert "fix: pip install vaderSentiment" in str(caught.value)


def test_a_copy_of_the_recipe_brings_both_files(tmp_path: Path) -> None:
    copied = {path.name for path in copy_shipped("quick_ppo", tmp_path)}
    assert copied == {"quick_ppo.yaml", "chitchat.py", "sentiment.py"}
    text = (tmp_path / "quick_ppo.yaml").read_text("utf-8")
    assert f'reward: "{tmp_path}/sentiment.py:score"' in text and "recipes/" not in text
