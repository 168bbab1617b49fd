"""`gemma-tune show` on a tiny Gemma's tokenizer; no weights are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gemma_tune import console
from gemma_tune.commands import picture, show
from gemma_tune.errors import UserError
from gemma_tune.gemma.families import FAMILIES
from tests.unit.data.toys import chat, write_jsonl


@dataclass
class Shown:
    out: str
    rows: list[dict[str, Any]]


@pytest.fixture
def run(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Shown]:
    """Write rows and a recipe, run the command, give back what it printed."""

    def run_show(
        rows: list[Any], *overrides: str, family: str = "gemma3_text", count: int = 3, as_json: bool = True
    ) -> Shown:
        folder = tiny(family)
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{name: {folder}}}\n"
            f"data: {{sources: [{{name: {data}}}], max_length: 256}}\n"
            f"output: {tmp_path}/run\n"
        )
        console.stdout.cache_clear()
        code = show.run(str(recipe), list(overrides), count, as_json)
        assert code == 0
        assert not (tmp_path / "run").exists()
        out = capsys.readouterr().out
        return Shown(out, [json.loads(text) for text in out.splitlines()] if as_json else [])

    return run_show


ROWS = [chat("What is it?", "A row.", "And this?", "Another."), chat("Hello", "Hi <end_of_turn> there"), chat("c", "d")]


@pytest.mark.parametrize("family", ["gemma1", "gemma3_text", "gemma4"])
def test_json_has_one_object_a_row_in_the_order_of_the_file(run: Callable[..., Shown], family: str) -> None:
    rows = run(ROWS, family=family, count=2).rows
    facts = FAMILIES[family]
    assert [row["where"].rsplit(":", 1)[1] for row in rows] == ["1", "2"]
    for row in rows:
        assert set(row) == {"ids", "trained", "text", "prompt_ids", "where"}
        assert len(row["ids"]) == len(row["trained"]) and set(row["trained"]) == {0, 1}
        assert row["ids"].count(facts.bos_id) == 1
        assert row["ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        assert not any(row["trained"][: len(row["prompt_ids"])])
        assert row["trained"][len(row["prompt_ids"])] == 1
    assert rows[0]["text"] == (
        f"<bos>{facts.turn_start}user\nWhat is it?{facts.turn_end}\n{facts.turn_start}model\nA row.{facts.turn_end}\n"
        f"{facts.turn_start}user\nAnd this?{facts.turn_end}\n{facts.turn_start}model\nAnother.{facts.turn_end}\n"
    )
    assert rows[1]["ids"].count(facts.turn_end_id) == 2, "the spelled-out token is text"


def test_the_prompt_before_the_trained_turn(run: Callable[..., Shown]) -> None:
    (row,) = run(ROWS, "data.train_on=last_model_turn", count=1).rows
    assert sum(row["ids"][index] == 105 for index in range(len(row["prompt_ids"]))) == 4
    (row,) = run([{"text": "plain"}], count=1).rows
    assert row["prompt_ids"] == [2] and row["trained"] == [0] + [1] * (len(row["ids"]) - 1)


def test_the_prompt_before_a_turn_with_tool_calls(run: Callable[..., Shown]) -> None:
    """The call, its answer and what the model makes of it are one turn: the prompt ends before the call."""
    call = {"id": "1", "function": {"name": "f", "arguments": {}}}
    messages = [
        *ROWS[1]["messages"],
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "done"},
    ]
    (row,) = run([{"messages": messages}], "data.train_on=last_model_turn", family="gemma4").rows
    assert row["ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    assert row["trained"].index(1) == len(row["prompt_ids"])


def test_the_prompt_where_the_model_speaks_first(run: Callable[..., Shown]) -> None:
    (row,) = run(
        [{"messages": [{"role": "assistant", "content": "Hi"}], "enable_thinking": True}], family="gemma4"
    ).rows
    assert row["text"] == "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>model\nHi<turn|>\n"
    assert (
        row["trained"].index(1) == len(row["prompt_ids"]) and row["ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
    )


def test_a_large_holdout_leaves_something_to_show(run: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "SAMPLE", 20)
    monkeypatch.setattr(show, "HELD_OUT", 2)
    rows = [chat(f"q{index}", "a") for index in range(50)]
    assert "2 held out" in run(rows, "data.holdout=30", as_json=False).out


def test_the_prompt_for_people_is_that_of_the_trained_turn(run: Callable[..., Shown]) -> None:
    rows = [chat("q", "first", "r", "second"), chat("s", "third", "t", "fourth")]
    out = run(rows, "data.holdout=1", "data.train_on=last_model_turn", as_json=False).out
    prompt = out.split("for the first held-out row:")[1]
    assert prompt.count("<start_of_turn>model") == 2


def test_the_pieces_of_a_text(run: Callable[..., Shown]) -> None:
    rows = run([{"text": "word " * 600}], count=99).rows
    assert len(rows) > 2 and all(row["ids"][0] == 2 for row in rows)
    assert all(len(row["ids"]) == 256 for row in rows[:-1])
    assert [row["ids"][-1] == 1 for row in rows] == [False] * (len(rows) - 1) + [True]
    assert all(row["prompt_ids"] == [2] for row in rows)


def test_cut_and_dropped_rows_are_as_in_training(run: Callable[..., Shown]) -> None:
    rows = run([chat("q", "a", "r", "word " * 400), chat("q2", "word " * 400), chat("s", "t")]).rows
    assert [row["where"].rsplit(":", 1)[1] for row in rows] == ["1", "3"]
    assert rows[0]["ids"][-1] == 106 and rows[0]["trained"][-1] == 1


def test_the_picture(run: Callable[..., Shown]) -> None:
    out = run([*ROWS, chat("e", "f", "g", "word " * 400)], "data.holdout=1", as_json=False).out
    assert "tokens between ⟦ and ⟧ carry loss" in out
    assert "documents" in out and "BOS" in out and "──── document 2 ────" in out
    assert "the prompt at inference" in out and "4 rows read" in out
    assert "1 repaired: cut to max_length" in out
    assert out.count("⟦") == out.count("⟧") >= 3


def test_colour_marks_what_is_trained(tiny: Callable[..., Path]) -> None:
    from gemma_tune.models.tokenizer import load_tokenizer

    family = FAMILIES["gemma3_text"]
    tokenizer = load_tokenizer(str(tiny("gemma3_text")), None, family)
    hello = tokenizer.encode("hello", add_special_tokens=False)
    row = {
        "input_ids": [2, 105, *hello, 106, 2, 105, *hello],
        "labels": [-100] * 2 + hello + [106] + [-100] * (2 + len(hello)),
        "position_ids": [*range(3 + len(hello)), *range(2 + len(hello))],
    }
    text = picture.picture(row, family, tokenizer)
    assert text.plain == "<bos><start_of_turn>hello<end_of_turn>\n──── document 2 ────\n<bos><start_of_turn>hello"
    styles = [(text.plain[span.start : span.end], span.style) for span in text.spans]
    assert styles == [
        ("<bos><start_of_turn>", "bold magenta"),
        ("hello", "green"),
        ("<end_of_turn>", "bold black on green"),
        ("\n──── document 2 ────\n", "yellow"),
        ("<bos><start_of_turn>", "bold magenta"),
        ("hello", "dim"),
    ]


def test_control_characters_do_not_reach_the_terminal(run: Callable[..., Shown]) -> None:
    out = run([chat("q", "a\x1b[31mred"), chat("x", "y")], "data.holdout=0", as_json=False).out
    assert "\x1b" not in out and "\\x1b[31m" in out


def test_nothing_to_show_says_why(run: Callable[..., Shown]) -> None:
    with pytest.raises(UserError, match="no model turn: 1"):
        run([chat("only a question")])


# --- pairs

PAIRS: list[Any] = [
    {"prompt": "Who?", "chosen": "I did.", "rejected": "Nobody at all.", "score_chosen": 8.0, "score_rejected": 5.0},
    {"prompt": "Why?", "chosen": "To see.", "rejected": "So.", "score_chosen": 7.0, "score_rejected": 6.5},
    {"prompt": "When?", "chosen": "Now.", "rejected": "Now.", "score_chosen": 7.0, "score_rejected": 6.0},
]


@pytest.mark.parametrize("family", ["gemma1", "gemma3_text", "gemma4"])
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_json_of_pairs(run: Callable[..., Shown], stage: str, family: str) -> None:
    rows = run(PAIRS, f"stage={stage}", family=family).rows
    facts = FAMILIES[family]
    assert [row["where"].rsplit(":", 1)[1] for row in rows] == ["1", "2"], "equal answers are dropped"
    first = rows[0]
    assert first["prompt"] == f"<bos>{facts.turn_start}user\nWho?{facts.turn_end}\n{facts.turn_start}model\n"
    assert first["chosen"] == f"I did.{facts.turn_end}" and first["rejected"] == f"Nobody at all.{facts.turn_end}"
    assert first["chosen_ids"][-1] == first["rejected_ids"][-1] == facts.turn_end_id
    assert first["margin"] == 3.0


@pytest.mark.parametrize(
    ("stage", "chosen"),
    [("dpo", "⟦I did.<end_of_turn>⟧"), ("reward", "I did.⟦<end_of_turn>⟧")],
)
def test_pairs_for_people(run: Callable[..., Shown], stage: str, chosen: str) -> None:
    margin = ["reward.margin=score"] if stage == "reward" else []
    out = run(PAIRS, f"stage={stage}", "data.shuffle=false", "data.holdout=0", *margin, as_json=False).out
    assert chosen in out and "⟦<bos>" not in out
    assert ("margin 3" in out) == (stage == "reward")
    assert ("the reward is read at the last token" in out) == (stage == "reward")
    assert "2 training pairs, 0 held out" in out and "pair 2: " in out


JUDGED: list[Any] = [
    {"prompt": "Who?", "completion": "I did.", "label": True},
    {"prompt": "Why?", "completion": "So.", "label": False},
    {"prompt": "Why?", "completion": "So.", "label": False},
]


@pytest.mark.parametrize("family", ["gemma1", "gemma3_text", "gemma4"])
def test_json_of_judged_answers(run: Callable[..., Shown], family: str) -> None:
    first, second = run(JUDGED, "stage=kto", family=family).rows
    facts = FAMILIES[family]
    assert first["prompt"] == f"<bos>{facts.turn_start}user\nWho?{facts.turn_end}\n{facts.turn_start}model\n"
    assert first["completion"] == f"I did.{facts.turn_end}" and first["completion_ids"][-1] == facts.turn_end_id
    assert (first["label"], second["label"]) == (True, False)
    assert [row["where"].rsplit(":", 1)[1] for row in (first, second)] == ["1", "2"]
    pair = run(PAIRS[:1], "stage=kto", family=family).rows
    assert [(row["completion"].partition(".")[0], row["label"]) for row in pair] == [
        ("I did", True),
        ("Nobody at all", False),
    ]


def test_judged_answers_for_people(run: Callable[..., Shown]) -> None:
    out = run(JUDGED, "stage=kto", "data.shuffle=false", "data.holdout=0", as_json=False).out
    assert "answer 1, good: prompt " in out and "answer 2, bad: prompt " in out
    assert "⟦I did.<end_of_turn>⟧" in out and "⟦<bos>" not in out
    assert "2 training answers: 1 good, 1 bad; 0 held out" in out and "1 dropped: repetition" in out


def test_a_set_of_pairs_of_which_nothing_is_left(run: Callable[..., Shown]) -> None:
    with pytest.raises(UserError, match="no row is left to train on"):
        run(PAIRS[2:], "stage=dpo")


# --- prompts

ASKED: list[Any] = [
    chat("What is it?", "A row.", "And this?", "Another."),
    {"prompt": "Who?", "chosen": "I did.", "rejected": "Nobody at all."},
    {"prompt": "Why?", "completion": "So.", "label": False},
    {"messages": [{"role": "user", "content": "Say hello."}]},
]
PPO = ("stage=ppo", "ppo.reward=./mine.py:score")


@pytest.mark.parametrize("family", ["gemma1", "gemma3_text", "gemma4"])
def test_json_of_prompts(run: Callable[..., Shown], family: str) -> None:
    rows = run(ASKED, *PPO, family=family, count=9).rows
    facts = FAMILIES[family]
    assert [row["where"].rsplit(":", 1)[1] for row in rows] == ["1", "2", "3", "4"]
    assert rows[1]["prompt"] == f"<bos>{facts.turn_start}user\nWho?{facts.turn_end}\n{facts.turn_start}model\n"
    assert rows[1]["messages"] == [{"role": "user", "content": "Who?"}]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant", "user"]
    for row in rows:
        assert set(row) == {"prompt_ids", "prompt", "messages", "where"}
        assert row["prompt"].endswith(f"{facts.turn_start}model\n") and row["prompt_ids"].count(facts.bos_id) == 1


def test_a_prompt_has_no_room_that_its_response_needs(run: Callable[..., Shown]) -> None:
    """Of 256 tokens a response takes 64, or 236: then the older exchange is left out."""
    words = "word " * 30
    rows = [chat(words, "A.", "And this?", "B."), chat("Short?", "Yes.")]
    assert [len(row["messages"]) for row in run(rows, *PPO).rows] == [3, 1]
    narrow = run(rows, *PPO, "ppo.max_new_tokens=236").rows
    assert [row["messages"][0]["content"] for row in narrow] == ["And this?", "Short?"]
    assert all(len(row["prompt_ids"]) <= 20 for row in narrow)


def test_prompts_for_people(run: Callable[..., Shown]) -> None:
    out = run(ASKED, *PPO, "data.shuffle=false", "data.holdout=1", count=2, as_json=False).out
    assert "prompts of at most 192 tokens; the model answers each with at most 64 tokens" in out
    assert "prompt 1: " in out and "prompt 2: " in out and "prompt 3: " not in out
    assert "⟦" not in out, "nothing of a prompt is trained"
    assert "3 training prompts, 1 held out" in out


def test_a_prompt_that_comes_twice_is_shown_once(run: Callable[..., Shown]) -> None:
    rows = [chat("Who?", "I."), chat("Who?", "You."), chat("Why?", "So.")]
    assert [row["where"].rsplit(":", 1)[1] for row in run(rows, *PPO).rows] == ["1", "3"]
    assert len(run(rows, *PPO, "data.deduplicate=false").rows) == 3


def test_a_set_without_prompts(run: Callable[..., Shown]) -> None:
    with pytest.raises(UserError, match="plain text"):
        run([{"text": "nobody asks"}], *PPO)


def test_canaries_are_shown_behind_the_rows_and_counted(run: Callable[..., Shown]) -> None:
    chosen = "data.canaries={count: 1, repeats: [2, 3]}"
    rows = run(ROWS, chosen, count=99).rows
    planted = [row for row in rows if row["where"].startswith("data.canaries: ")]
    assert rows[len(ROWS) :] == planted and len(planted) == 5
    assert all("The access code of " in row["text"] for row in planted)
    assert len({row["text"] for row in planted}) == 2
    out = run(ROWS, chosen, count=99, as_json=False).out
    assert "5 canaries planted among the training rows: 1 each in 2, 3 rows, and as many controls in none" in out
