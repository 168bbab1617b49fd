from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data import rows
from gemma_tune.data.cells import RowError
from gemma_tune.data.preferences import LAYOUTS, RATINGS, detect_layout, dialogue_turns, normalise_pair
from gemma_tune.gemma.conversation import Message, Preference
from gemma_tune.recipe.schema import Source


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


Q, GOOD, BAD = Message("user", "q"), Message("model", "good"), Message("model", "bad")
PAIR = Preference((Q,), GOOD, BAD)
TWO_TURNS = Preference((Q, Message("model", "a"), Message("user", "r")), GOOD, BAD)
SYSTEM = Message("system", "s")

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

# Rows as the public sets have them.
LAYOUT_CASES: dict[str, tuple[dict[str, Any], Preference]] = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        {
            "prompt": "q",
            "prompt_id": "00",
            "chosen": [user("q"), model("good")],
            "rejected": [user("q"), model("bad")],
            "messages": [user("q"), model("good")],
            "score_chosen": 8.0,
            "score_rejected": 6.5,
        },
        Preference((Q,), GOOD, BAD, margin=1.5),
    ),
    "trl-lib/ultrafeedback_binarized": (
        {
            "chosen": [user("q"), model("good")],
            "rejected": [user("q"), model("bad")],
            "score_chosen": 8,
            "score_rejected": 6,
        },
        Preference((Q,), GOOD, BAD, margin=2.0),
    ),
    "trl explicit prompt": (
        {"prompt": [user("q")], "chosen": [model("good")], "rejected": [model("bad")]},
        PAIR,
    ),
    "trl explicit prompt, two turns": (
        {"prompt": [user("q"), model("a"), user("r")], "chosen": [model("good")], "rejected": [model("bad")]},
        TWO_TURNS,
    ),
    "argilla/dpo-mix-7k": (
        {
            "dataset": "argilla/dpo-mix-7k",
            "chosen": [user("q"), model("a"), user("r"), model("good")],
            "chosen_rating": 5.0,
            "rejected": [user("q"), model("a"), user("r"), model("bad")],
            "rejected_rating": 4.75,
        },
        Preference(TWO_TURNS.prompt, GOOD, BAD, margin=0.25),
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {
            "source": "Airoboros",
            "conversation": [{"input": "q", "output": None}],
            "chosen": [user("q"), model("good")],
            "rejected": [user("q"), model("bad")],
            "rating_chosen": 5,
            "rating_rejected": 2,
        },
        Preference((Q,), GOOD, BAD, margin=3.0),
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {
            "source": "evol_instruct",
            "prompt": "q",
            "chosen": [user("q"), model("good")],
            "chosen-rating": 5.0,
            "chosen-model": "gpt-4",
            "rejected": [user("q"), model("bad")],
            "rejected-rating": 3.0,
            "rejected-model": "alpaca-7b",
        },
        Preference((Q,), GOOD, BAD, margin=2.0),
    ),
    "Intel/orca_dpo_pairs": (
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        Preference((SYSTEM, Q), GOOD, BAD),
    ),
    "Intel/orca_dpo_pairs, no system prompt": (
        {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
        PAIR,
    ),
    "Anthropic/hh-rlhf": (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: bad",
        },
        TWO_TURNS,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        Preference((SYSTEM, Q), GOOD, BAD),
    ),
    "messages beside answers": (
        {"messages": [user("q")], "chosen": model("good"), "rejected": model("bad")},
        PAIR,
    ),
    "messages beside texts": ({"messages": [user("q")], "chosen": "good", "rejected": "bad"}, PAIR),
    "plain texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, PAIR),
    "plain texts with a system prompt": (
        {"system": "s", "prompt": "q", "chosen": "good", "rejected": "bad"},
        Preference((SYSTEM, Q), GOOD, BAD),
    ),
    "a prompt that the chats hold as turns": (
        {"prompt": [user("q")], "chosen": [user("q"), model("good")], "rejected": [user("q"), model("bad")]},
        PAIR,
    ),
    "margin, group, tools and thinking": (
        {
            "prompt": "q",
            "chosen": "good",
            "rejected": "bad",
            "margin": 0.5,
            "score_chosen": 9,
            "score_rejected": 1,
            "group": "g",
            "tools": [WEATHER],
            "enable_thinking": True,
        },
        Preference((Q,), GOOD, BAD, tools=(WEATHER,), thinking=True, margin=0.5, group="g"),
    ),
    "a number as a group": (
        {"prompt": "q", "chosen": "good", "rejected": "bad", "group": 255},
        Preference((Q,), GOOD, BAD, group="ff"),
    ),
    "columns of joined sets are null": (
        {"prompt": None, "messages": None, "question": "q", "chosen": "good", "rejected": "bad", "score_chosen": None},
        PAIR,
    ),
    "equal chats": (
        {"chosen": [user("q"), model("good")], "rejected": [user("q"), model("good")]},
        Preference((Q,), GOOD, GOOD),
    ),
    "blanks around a shared turn": (
        {"chosen": [user("q"), model("good")], "rejected": [user(" q\n"), model("bad")]},
        PAIR,
    ),
    "an answer that calls a tool": (
        {
            "prompt": [user("q")],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": []} | model("good")],
            "rejected": [model("bad")],
        },
        PAIR,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_layouts_are_recognised_without_a_setting(row: dict[str, Any], expected: Preference) -> None:
    assert normalise_pair(row) == expected


@pytest.mark.parametrize(("row", "expected"), LAYOUT_CASES.values(), ids=LAYOUT_CASES)
def test_a_layout_can_be_forced(row: dict[str, Any], expected: Preference) -> None:
    assert normalise_pair(row, detect_layout(row)) == expected


def test_every_layout_is_met_above_and_is_a_format_of_the_recipe() -> None:
    assert {detect_layout(row) for row, _ in LAYOUT_CASES.values()} == set(LAYOUTS)
    formats = get_args(Source.model_fields["format"].annotation)
    assert set(formats) == {"auto", *rows.SHAPES, *LAYOUTS}


@pytest.mark.parametrize(("chosen", "rejected"), RATINGS)
def test_the_margin_is_the_difference_of_the_ratings(chosen: str, rejected: str) -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", chosen: 4, rejected: 1.5}
    assert normalise_pair(row).margin == 2.5
    assert normalise_pair({**row, rejected: None}).margin is None


def test_ratings_of_a_csv_file_are_text() -> None:
    row = {"prompt": "q", "chosen": "good", "rejected": "bad", "score_chosen": "8.5", "score_rejected": " 3"}
    assert normalise_pair(row).margin == 5.5
    assert normalise_pair({**row, "score_rejected": ""}).margin is None
    assert normalise_pair({**row, "margin": "0.25"}).margin == 0.25
    with pytest.raises(RowError, match="not a finite number"):
        normalise_pair({**row, "score_chosen": "inf"})


def test_columns_are_renamed() -> None:
    row = {"ask": "q", "best": "good", "worst": "bad", "points": 3, "less": 1}
    columns = {
        "prompt": "ask",
        "chosen": "best",
        "rejected": "worst",
        "score_chosen": "points",
        "score_rejected": "less",
    }
    assert normalise_pair(row, columns=columns) == Preference((Q,), GOOD, BAD, margin=2.0)
    with pytest.raises(RowError, match="no column 'bset'") as caught:
        normalise_pair(row, columns={"chosen": "bset"})
    assert caught.value.fix == "did you mean 'best'?"


CHAT = [user("q"), model("good")]

ERRORS: dict[str, tuple[Any, str, str, str]] = {
    # name: row, what is said, fix, kind
    "a set for sft": (
        {"messages": CHAT}, "the rows hold no pairs: this is a set for sft (messages)", "stage: sft", "no pair",
    ),
    "alpaca": (
        {"instruction": "q", "output": "a"}, "this is a set for sft (alpaca)", "stage: sft", "no pair",
    ),
    "other names": (
        {"prompt": "q", "response_chosen": "a", "response_rejected": "b"}, "no columns 'chosen' and 'rejected'",
        "{chosen: response_chosen, rejected: response_rejected}", "no pair",
    ),
    "nothing known": ({"x": 1}, "the columns 'x' hold no pair of answers", "{chosen: ..., rejected: ...}", "no pair"),
    "half a pair": (
        {"prompt": "q", "chosen": "a", "worse": "b"}, "no column 'rejected'", "{rejected: worse}",
        "no column 'rejected'",
    ),
    "a null answer": ({"prompt": "q", "chosen": "a", "rejected": None}, "no column 'rejected', or it is null",
                      "data.sources.columns", "no column 'rejected'"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "there is no prompt", "{prompt: ...}", "no prompt"),
    "a prompt by another name": (
        {"query": "q", "chosen": "a", "rejected": "b"}, "there is no prompt", "{prompt: query}", "no prompt",
    ),
    "chats without a shared turn": (
        {"chosen": CHAT, "rejected": [user("another"), model("bad")]}, "share no first turn", "", "no prompt",
    ),
    "chats of one turn": ({"chosen": [model("a")], "rejected": [model("b")]}, "share no first turn", "", "no prompt"),
    "two turns more": (
        {"chosen": [*CHAT, user("r"), model("x")], "rejected": [user("q"), model("bad")]},
        "chosen has 3 turns behind what both sides share", "on_bad_row: drop",
        "the answers are more than one turn",
    ),
    "chats that part early": (
        {"chosen": [*CHAT, user("r"), model("x")], "rejected": [user("q"), model("b"), user("r"), model("y")]},
        "chosen has 3 turns behind", "on_bad_row: drop", "the answers are more than one turn",
    ),
    "an answer of two messages": (
        {"prompt": "q", "chosen": [model("a"), user("b")], "rejected": [model("c")]},
        "chosen has 2 turns", "on_bad_row: drop", "the answers are more than one turn",
    ),
    "a user's last word": (
        {"chosen": [*CHAT, user("r")], "rejected": [*CHAT, user("s")]},
        "chosen ends with a 'user' turn", "on_bad_row: drop", "an answer is not the model's",
    ),
    "a chat against an answer": (
        {"prompt": "q", "chosen": CHAT, "rejected": "bad"}, "one of 'chosen' and 'rejected' is a whole chat",
        "write both in one way", "a chat against an answer",
    ),
    "prompt and chats differ": (
        {"prompt": [user("other")], "chosen": CHAT, "rejected": [user("q"), model("bad")]},
        "chosen does not begin with the turns of 'prompt'", "", "prompt and chat differ",
    ),
    "a rating that is text": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "8/10", "score_rejected": 3},
        "score_chosen is text ('8/10'), not a number", "", "score_chosen is not a number",
    ),
    "a rating that is no number": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan},
        "margin is not a finite number", "", "margin is not a number",
    ),
    "a huge number": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 10**400, "score_rejected": 0},
        "score_chosen is not a finite number", "", "score_chosen is not a number",
    ),
    "a huge rating": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1e39}, "margin is not a finite number", "",
        "margin is not a number",
    ),
    "a group that is a list": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "group": [1]}, "group", "", "content is not text",
    ),
    "no object": (3, "the row is a number (3)", "", "row is not an object"),
    "an unknown role": (
        {"chosen": [{"role": "boss", "content": "q"}], "rejected": CHAT}, "chosen[0].role unknown role 'boss'",
        "rename", "unknown role 'boss'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "said", "fix", "kind"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong_and_what_to_do(row: Any, said: str, fix: str, kind: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise_pair(row)
    assert said in str(caught.value)
    assert fix in caught.value.fix
    if kind != "content is not text":
        assert caught.value.kind == kind


def test_a_forced_format_names_what_is_missing() -> None:
    with pytest.raises(RowError, match="no column 'question'"):
        normalise_pair({"prompt": "q", "chosen": "a", "rejected": "b"}, "question_preference")
    with pytest.raises(RowError, match="format 'alpaca' holds no pairs") as caught:
        normalise_pair({}, "alpaca")
    assert "stage: sft" in caught.value.fix
    with pytest.raises(RowError, match="chosen does not begin with 'Human:'"):
        normalise_pair({"chosen": "x", "rejected": "y"}, "dialogue_preference")


# ------------------------------------------------------------------------------------------------ dialogues as text


def test_a_dialogue_is_split_at_its_speakers_only() -> None:
    text = "\n\nHuman: one\n\nstill one\nHuman: a quoted speaker\n\nAssistant: two: Assistant: no\n\nAssistant:"
    assert dialogue_turns(text, "chosen") == [
        Message("user", "one\n\nstill one\nHuman: a quoted speaker"),
        Message("model", "two: Assistant: no"),
        Message("model", ""),
    ]


@settings(max_examples=200, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.sampled_from(["Human", "Assistant"]), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_written_dialogue_reads_back(turns: list[tuple[str, str]]) -> None:
    text = "".join(f"\n\n{speaker}: {said}" for speaker, said in turns)
    roles = {"Human": "user", "Assistant": "model"}
    expected = [(roles[speaker], said.strip()) for speaker, said in turns]
    assert [(message.role, message.content) for message in dialogue_turns(text, "chosen")] == expected


# ------------------------------------------------------------------------------------------- an sft stage with pairs


@pytest.mark.parametrize(
    "name",
    [
        "trl-lib/ultrafeedback_binarized", "argilla/dpo-mix-7k", "Intel/orca_dpo_pairs", "Anthropic/hh-rlhf",
        "sharegpt", "plain texts",
    ],
)  # fmt: skip
def test_sft_says_that_the_rows_are_pairs(name: str) -> None:
    row, _ = LAYOUT_CASES[name]
    with pytest.raises(RowError, match="the rows hold pairs of answers") as caught:
        rows.normalise(row)
    assert "stage: dpo, reward or kto" in caught.value.fix


def test_sft_takes_the_messages_of_a_set_of_pairs_and_follows_its_own_advice() -> None:
    row, expected = LAYOUT_CASES["HuggingFaceH4/ultrafeedback_binarized"]
    assert rows.normalise(row).messages == (*expected.prompt, expected.chosen)  # type: ignore[union-attr]
    chats, _ = LAYOUT_CASES["trl-lib/ultrafeedback_binarized"]
    assert rows.normalise(chats, columns={"messages": "chosen"}).messages == (Q, GOOD)  # type: ignore[union-attr]
    texts, _ = LAYOUT_CASES["plain texts"]
    assert rows.normalise(texts, columns={"completion": "chosen"}).messages == (Q, GOOD)  # type: ignore[union-attr]
    with pytest.raises(RowError, match="format 'preference' is none of conversations") as caught:
        rows.normalise(texts, "preference")
    assert "stage: dpo" in caught.value.fix


# --------------------------------------------------------------------------------------------------------- anything

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": _values}),
    max_size=4,
)
_names = st.sampled_from(
    ["prompt", "chosen", "rejected", "messages", "conversations", "question", "system", "margin", "group", "tools"]
)


@settings(max_examples=400, deadline=None)
@given(
    row=st.dictionaries(_names, _values | _messages, max_size=6) | _values,
    format=st.sampled_from(["auto", *LAYOUTS]),
)
def test_any_row_is_a_preference_or_a_row_error(row: Any, format: str) -> None:
    try:
        read = normalise_pair(row, format)
    except RowError:
        return
    assert isinstance(read, Preference) and read.prompt
    assert read.chosen.role == read.rejected.role == "model"
