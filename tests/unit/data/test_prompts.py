"""Prompts from rows of every other stage: what is asked, what is left out, figures, holdout, fingerprint."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.build import Prepared
from gemma_tune.data.cells import RowError
from gemma_tune.data.policies import Drop, Policies, apply_prompt_policies
from gemma_tune.data.prompt_rows import Asked, asked, normalise_prompt
from gemma_tune.data.prompts import build_prompts
from gemma_tune.data.sources import NAMED, open_source
from gemma_tune.errors import UserError
from gemma_tune.gemma.chat import check_prompt, render_prompt
from gemma_tune.gemma.conversation import Conversation, Document, Judged, Message, Preference, ToolCall
from gemma_tune.gemma.families import Family
from gemma_tune.recipe.schema import Data
from tests.unit.data.toys import GEMMA1, GEMMA3, GEMMA4, ByteEncoder, chat, decoded, prepare_prompts, write_jsonl

REPOSITORY = Path(__file__).parents[3]
Q, A, R, B = Message("user", "q"), Message("model", "a"), Message("user", "r"), Message("model", "b")
SYSTEM = Message("system", "s")
OPENING = {"user": "<start_of_turn>user\n", "model": "<start_of_turn>model\n", "end": "<end_of_turn>\n"}


def texts(prepared: Prepared[Conversation], family: Family = GEMMA3) -> list[str]:
    return [decoded(found["prompt_ids"], family) for found in prepared.train]


def said(*turns: str) -> str:
    """What Gemma 3 is shown: user, model, user, ... and the opening of its turn."""
    roles = ("user", "model")
    whole = "".join(f"{OPENING[roles[place % 2]]}{text}{OPENING['end']}" for place, text in enumerate(turns))
    return f"<bos>{whole}{OPENING['model']}"


def openai(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


# ------------------------------------------------------------------------------------------------------------ layouts

ASKED = openai(("user", "q"))
DIALOGUE = {side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in (("chosen", "a"), ("rejected", "b"))}


@pytest.mark.parametrize(
    "row",
    [
        chat("q", "a"),
        chat("q"),
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": ASKED, "completion": openai(("assistant", "a"))},
        {"prompt": "q", "completion": None},
        {"prompt": "q"},
        {"prompt": ASKED},
        {"prompt": "q", "chosen": None, "rejected": None},
        {"prompt": "q", "text": "q a"},
        {"prompt": "q", "messages": None},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q"},
        {"data": ["q", "a"]},
        {"conversation": [{"input": "q", "output": "a"}]},
        {"prompt": "q", "completion": "a", "label": False},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "", "rejected": "b", "score_chosen": 1, "score_rejected": 2},
        {"chosen": openai(("user", "q"), ("assistant", "a")), "rejected": openai(("user", "q"), ("assistant", "b"))},
        {"prompt": "q", **chat("q", "a"), "chosen": chat("q", "a")["messages"], "rejected": chat("q", "b")["messages"]},
        {"question": "q", "chosen": "a", "rejected": "b"},
        DIALOGUE,
    ],
)
def test_what_any_row_asks(row: dict[str, Any], tmp_path: Path) -> None:
    """A bad answer, or none, makes no bad prompt: nothing of it is used."""
    assert normalise_prompt(row) == Asked(Conversation((Q,)))
    (found,) = texts(prepare_prompts([row], tmp_path))
    assert found == said("q")


def test_only_the_last_turn_of_the_model_is_left_out() -> None:
    assert normalise_prompt(chat("q", "a", "r", "b")).prompt.messages == (Q, A, R)
    assert normalise_prompt(chat("q", "a", "r")).prompt.messages == (Q, A, R)
    twice = Conversation((Q, A, R, A, B))
    assert asked(twice).prompt.messages == (Q, A, R), "two messages in a row are one turn"
    assert asked(Preference((Q, A), A, B)).prompt.messages == (Q,)
    row = {"prompt": openai(("user", "q"), ("assistant", "a"), ("user", "r")), "completion": "b"}
    assert normalise_prompt(row).prompt.messages == (Q, A, R)
    row = {"instruction": "r", "history": [["q", "a"]], "system": "s"}
    assert normalise_prompt(row).prompt.messages == (SYSTEM, Q, A, R)


def test_what_stands_beside_the_turns_is_kept() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": ASKED, "tools": tools, "enable_thinking": True, "group": 3}
    assert normalise_prompt(row) == Asked(Conversation((Q,), tuple(tools), True), "3")
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": tools, "enable_thinking": True, "group": "3"}
    assert normalise_prompt(pair) == Asked(Conversation((Q,), tuple(tools), True), "3")
    judged = Judged((Q,), A, False, tuple(tools), True, "3")
    assert asked(judged) == Asked(Conversation((Q,), tuple(tools), True), "3")


def test_columns_and_format_are_those_of_the_recipe(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "42"}
    with pytest.raises(RowError, match="fit no known shape") as caught:
        normalise_prompt(row)
    assert "{prompt: question, completion: answer}" in caught.value.fix
    assert normalise_prompt(row, columns={"prompt": "question"}).prompt.messages == (Q,)
    assert normalise_prompt({"prompt": "q"}, "prompt_completion").prompt.messages == (Q,)
    assert normalise_prompt(DIALOGUE, "dialogue_preference").prompt.messages == (Q,)
    # `messages` would come first; the pair is what the recipe says.
    both = {**chat("r"), "prompt": "q", "chosen": "a", "rejected": "b"}
    assert normalise_prompt(both, "messages").prompt.messages == (R,)
    name = write_jsonl(tmp_path / "texts.jsonl", [{"text": "q"}])
    prepared = prepare_prompts([], tmp_path, sources=[{"name": name, "columns": {"prompt": "text"}}])
    assert texts(prepared) == [said("q")]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "t"}, "is plain text: nobody asks and nobody answers"),
        ({"quote": "q"}, "fit no known shape"),
        ({"completion": "a"}, "fit no known shape"),
        ({"prompt": None}, "fit no known shape"),
        ({"prompt": 3}, "prompt is a number (3)"),
        ({"messages": []}, "is an empty list"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        (["q"], "the row is a list"),
    ],
)
def test_what_asks_nothing_says_so(row: Any, what: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise_prompt(row)
    assert what in str(caught.value)


def test_a_set_of_plain_texts_is_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}"} for number in range(3)]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: is plain text.*\(and 2 more rows like it\)") as caught:
        prepare_prompts(rows, tmp_path)
    assert "data.sources.columns: {prompt: text}" in str(caught.value)
    with pytest.raises(UserError, match=r"no row is left to train on: of 3 rows read, dropped plain text: 3"):
        prepare_prompts(rows, tmp_path, on_bad_row="drop")
    with pytest.raises(RowError, match="is plain text"):
        asked(Document("t"))


# A row of each named set, and the prompt in it.
_NAMED: dict[str, dict[str, Any]] = {
    "ultrachat": {"prompt": "q", "prompt_id": "0", **chat("q", "a")},
    "ultrachat_original": {"id": "0", "data": ["q", "a"]},
    "english_quotes": {"quote": "q and more", "author": "b", "tags": []},
    "ultrafeedback": {"prompt": "q", "chosen": chat("q", "a")["messages"], "rejected": chat("q", "b")["messages"]},
    "hh_rlhf": DIALOGUE,
    "kto_mix": {"prompt": ASKED, "completion": openai(("assistant", "a")), "label": True},
}


@pytest.mark.parametrize("name", _NAMED)
@pytest.mark.parametrize("split", [None, "train_gen"])
def test_every_named_set_has_prompts_and_every_split_of_it(
    name: str, split: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _NAMED.keys() == NAMED.keys()
    asked_for: list[str] = []

    def load_dataset(path: str, *, split: str, **keywords: Any) -> list[Any]:
        asked_for.append(split)
        return [_NAMED[name]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    opened = open_source({"name": name, "split": split}, wanted="prompts")
    (found,) = [opened.to_example(row.value) for row in opened]
    wanted = Message("user", "Quote: q") if name == "english_quotes" else Q
    assert found == Asked(Conversation((wanted,)))
    assert asked_for == [split or NAMED[name].split]


_BY_HAND = """
from gemma_tune.gemma.conversation import Conversation, Document, Judged, Message, Preference

Q, A, B = Message("user", "q"), Message("model", "a"), Message("model", "b")

def rows():
    yield Conversation((Q, A))
    yield Preference((Message("user", "r"),), A, B, group="g")
    yield Judged((Message("user", "s"),), A, False)
    yield {"prompt": "t"}
    yield BAD_ROW
"""


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("Document('t')", "is plain text"),
        ("Conversation(())", "messages are not a tuple with turns"),
        ("Conversation((Message('user', 3),))", "messages[0] is not a Message with text"),
        ("Judged((Q,), Q, True)", "completion is a 'user' turn"),
    ],
)
def test_a_function_may_yield_any_of_them_and_they_are_checked(tmp_path: Path, bad: str, what: str) -> None:
    (tmp_path / "mine.py").write_text(_BY_HAND.replace("BAD_ROW", bad))
    name = f"{tmp_path}/mine.py:rows"
    with pytest.raises(UserError) as caught:
        prepare_prompts(name, tmp_path)
    assert what in str(caught.value) and "row 5" in str(caught.value)
    found = prepare_prompts(name, tmp_path, on_bad_row="drop", shuffle=False)
    assert texts(found) == [said(text) for text in "qrst"]


# --------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("family", "opening"),
    [
        (GEMMA1, "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"),
        (GEMMA3, "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"),
        (GEMMA4, "<bos><|turn>user\nq<turn|>\n<|turn>model\n"),
    ],
)
def test_a_row_is_a_prompt_that_ends_where_the_model_begins(tmp_path: Path, family: Family, opening: str) -> None:
    prepared = prepare_prompts([chat("q", "a")], tmp_path, family)
    assert texts(prepared, family) == [opening]
    features = {name: str(feature) for name, feature in prepared.train.features.items()}
    assert features == {"prompt_ids": "List(Value('int32'))"}
    assert len(prepared.held_out) == 0 and prepared.held_out.column_names == ["prompt_ids"]
    assert (prepared.train_examples, prepared.held_out_examples) == ([Conversation((Q,))], [])


def test_a_prompt_may_end_with_the_answer_of_a_tool(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    answer = {"role": "tool", "content": "5", "name": "f"}
    turns = [{"role": "user", "content": "q"}, call, answer]
    whole = {"messages": [*turns, {"role": "assistant", "content": "It is 5."}]}
    (first, second) = (texts(prepare_prompts([row], tmp_path, GEMMA4), GEMMA4) for row in (whole, {"messages": turns}))
    assert first == second and first[0].endswith("<tool_response|>")
    assert prepare_prompts([whole], tmp_path, GEMMA4).train_examples[0].messages[-1].role == "tool"
    (unanswered,) = texts(prepare_prompts([{"messages": turns[:2]}], tmp_path, GEMMA4), GEMMA4)
    assert unanswered == "<bos><|turn>user\nq<turn|>\n<|turn>model\n"
    # The template closes the turn behind the answer where the call came with a text: nothing is opened to go on.
    spoken = {"messages": [turns[0], {**call, "content": "Let me see."}, answer, whole["messages"][-1]]}
    with pytest.raises(UserError, match="Gemma 4 is not prompted for an answer here"):
        prepare_prompts([spoken], tmp_path, GEMMA4)
    thinking = prepare_prompts([{**whole, "enable_thinking": True}], tmp_path, GEMMA4)
    assert texts(thinking, GEMMA4)[0].endswith("<|channel>thought\n")


@pytest.mark.parametrize(
    ("turns", "settings", "found"),
    [
        ((SYSTEM, Q), {}, ("system turn folded into the first user turn",)),
        ((SYSTEM, Q), {"system_role": "drop"}, ("system turn removed",)),
        ((SYSTEM, Q), {"system_role": "error"}, "this Gemma has no system turn"),
        ((Message("system", " "), Q), {}, ("empty system turn removed",)),
        ((SYSTEM,), {}, Drop("no user turn")),
        ((), {}, Drop("no user turn")),
        ((Q, R), {}, "turn 2 is 'user' after 'user'"),
        ((Q, R), {"fix_roles": "merge"}, ("turns of one role merged",)),
        ((Q, R), {"fix_roles": "drop"}, Drop("roles do not alternate")),
        ((Q, A, B, R), {"fix_roles": "merge"}, ("turns of one role merged",)),
        ((A, Q), {}, "this Gemma wants the user to speak first"),
        ((A, Q), {"fix_roles": "drop"}, Drop("the model speaks first")),
        ((Q, SYSTEM, R), {}, "turn 2 is 'system'; a system turn can only be the first"),
        ((Q, A, Message("user", " ")), {}, "turn 3 ('user') is empty"),
        ((Q, A, Message("user", " ")), {"on_empty_turn": "drop"}, Drop("empty turn")),
        ((Q, Message("model", "", tool_calls=(ToolCall("f", {}),)), R), {}, "Gemma 3 (text) has no tools"),
        ((Q, Message("model", "a", thinking="hm"), R), {}, ("reasoning removed",)),
        ((Q,), {}, ()),
    ],
)
def test_policies(turns: tuple[Message, ...], settings: dict[str, Any], found: Any) -> None:
    policies = Policies(**settings)
    if isinstance(found, str):
        with pytest.raises(RowError) as caught:
            apply_prompt_policies(Conversation(turns), GEMMA3, policies)
        assert found in str(caught.value) and caught.value.fix
        return
    repaired = apply_prompt_policies(Conversation(turns), GEMMA3, policies)
    if isinstance(found, Drop):
        assert repaired == found
        return
    assert not isinstance(repaired, Drop) and repaired.repairs == found
    assert repaired.example.messages[-1].role == "user" and check_prompt(repaired.example, GEMMA3) is None


def test_everything_that_is_left_out_is_counted_and_placed(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1", "system": "s", "completion": "a"},
        {"prompt": "2", "completion": "a"},
        {"prompt": " 2", "chosen": "b", "rejected": "c"},
        chat("3", "a", "", "b"),
        {"messages": openai(("assistant", "a"))},
        {"messages": openai(("user", "4"), ("user", "5"))},
        {"prompt": "<start_of_turn>"},
        {"prompt": "x" * 300},
        {"text": "t"},
    ]
    report = prepare_prompts(rows, tmp_path, on_bad_row="drop", on_empty_turn="drop", max_length=200).report
    assert report.dropped == {
        "repetition": 1,
        "empty turn": 1,
        "no user turn": 1,
        "roles do not alternate": 1,
        "prompt longer than max_length": 1,
        "plain text": 1,
    }
    assert report.repaired == {"system turn folded into the first user turn": 1}
    assert report.noted == {"text that looks like a control token, read as plain text": 1}
    assert report.first["repetition"].endswith("rows.jsonl:3")
    assert sum(report.read.values()) == len(rows) == sum(report.dropped.values()) + report.rows


def test_one_prompt_with_many_answers_is_one_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": str(number)} for number in range(5)]
    prepared = prepare_prompts(rows, tmp_path)
    assert len(prepared.train) == 1 and prepared.report.dropped == {"repetition": 4}
    assert len(prepare_prompts(rows, tmp_path, deduplicate=False).train) == 5


def test_the_report_says_what_the_prompts_are_like(tmp_path: Path) -> None:
    prepared = prepare_prompts([chat("a" * size) for size in (1, 2, 6)], tmp_path)
    report = prepared.report
    sizes = [len(row["prompt_ids"]) for row in prepared.train]
    assert report.prompts is not None
    assert (report.prompts.tokens, report.prompts.longest) == (sum(sizes) / 3, max(sizes))
    assert (report.tokens, report.trained_tokens, report.fill) == (sum(sizes), 0, None)
    assert (report.documents, report.rows, report.held_out) == (3, 3, 0)
    lines = list(report.lines())
    assert "3 training prompts, 0 held out" in lines
    assert f"{sum(sizes)} tokens in the prompts: {sum(sizes) / 3:.1f} on average, {max(sizes)} in the longest" in lines
    assert json.loads(json.dumps(report.to_json()))["prompts"]["longest"] == max(sizes)


# ------------------------------------------------------------------------------------------------------------- length


def test_the_oldest_exchanges_go(tmp_path: Path) -> None:
    rows = [{**chat("a" * 50, "b" * 50, "c" * 50, "d" * 50, "last"), "system": "s"}]
    cut = prepare_prompts(rows, tmp_path, max_length=160)
    assert cut.report.repaired["oldest turns of the prompt left out"] == 1
    assert texts(cut) == [said("s\n\n" + "c" * 50, "d" * 50, "last")]
    messages = cut.train_examples[0].messages
    assert [message.content for message in messages] == ["s", "c" * 50, "d" * 50, "last"]
    assert texts(prepare_prompts(rows, tmp_path, max_length=60, on_overlong="truncate")) == [said("s\n\nlast")]
    with pytest.raises(UserError, match="prompt longer than max_length: 1"):
        prepare_prompts(rows, tmp_path, max_length=20)
    rows.append(chat("q"))
    dropped = prepare_prompts(rows, tmp_path, max_length=160, on_overlong="drop")
    assert dropped.report.dropped == {"longer than max_length": 1} and texts(dropped) == [said("q")]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: \d+ tokens, above the 160 that data\.max_length leaves") as no:
        prepare_prompts(rows, tmp_path, max_length=160, on_overlong="error")
    assert "lower ppo.max_new_tokens" in str(no.value)


def test_prompts_that_are_the_same_once_they_fit_are_one(tmp_path: Path) -> None:
    rows = [chat(f"{number} " + "a" * 90, "b", "last") for number in range(40)] + [chat("last")]
    prepared = prepare_prompts(rows, tmp_path, max_length=100)
    assert texts(prepared) == [said("last")] and prepared.report.dropped == {"repetition": 40}
    assert len(prepare_prompts(rows, tmp_path, max_length=100, deduplicate=False).train) == 41


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=9).filter(lambda sizes: len(sizes) % 2),
    system=st.booleans(),
    limit=st.integers(30, 200),
    family=st.sampled_from([GEMMA1, GEMMA3, GEMMA4]),
)
def test_as_few_turns_go_as_must(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], system: bool, limit: int, family: Family
) -> None:
    turns = [Message("model" if index % 2 else "user", chr(97 + index) * size) for index, size in enumerate(sizes)]
    head = [SYSTEM] if system else []
    row = {"messages": openai(*(("assistant" if m.role == "model" else m.role, m.content) for m in (*head, *turns)))}

    def size(first: int) -> int:
        return len(render_prompt(Conversation((*head, *turns[first:])), family, ByteEncoder()))

    fits = [first for first in range(0, len(turns), 2) if size(first) <= limit]
    folder = tmp_path_factory.getbasetemp()
    if not fits:
        with pytest.raises(UserError, match="prompt longer than max_length"):
            prepare_prompts([row], folder, family, max_length=limit)
        return
    prepared = prepare_prompts([row], folder, family, max_length=limit)
    (prompt,) = prepared.train_examples
    assert prompt.messages == (*head, *turns[fits[0] :])
    assert prepared.train[0]["prompt_ids"] == render_prompt(prompt, family, ByteEncoder())


# ------------------------------------------------------------------------------------------- order, holdout, sources


def test_the_holdout_keeps_prompts_and_groups_together(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [chat(f"prompt {i % 20}", "a", f"then {i}") for i in range(60)]
    rows += [{**chat(f"own {i}"), "group": f"g{i // 2}"} for i in range(60)]
    rows += [{"prompt": f"pair {i}", "chosen": "a", "rejected": "b", "group": f"p{i // 2}"} for i in range(60)]
    prepared = prepare_prompts(rows, tmp_path, holdout=0.2)
    assert len(prepared.held_out) == len(prepared.held_out_examples) == prepared.report.held_out == 36
    held = {example.messages[0].content for example in prepared.held_out_examples}
    trained = {example.messages[0].content for example in prepared.train_examples}
    assert held.isdisjoint(trained) and len(trained) + len(held) == 140
    for kind in ("own", "pair"):
        sides = [{int(text.split()[1]) // 2 for text in side if text.startswith(kind)} for side in (held, trained)]
        assert sides[0] and sides[0].isdisjoint(sides[1])


@pytest.mark.parametrize("shuffle", [True, False])
def test_examples_stand_in_the_order_of_their_rows(tmp_path: Path, shuffle: bool) -> None:
    rows = [chat(f"q{i}", "a", "x" * (i % 7)) if i % 2 else chat(f"q{i}") for i in range(1, 80)]
    prepared = prepare_prompts(rows, tmp_path, holdout=9, shuffle=shuffle, on_empty_turn="drop")
    for examples, side in (
        (prepared.train_examples, prepared.train),
        (prepared.held_out_examples, prepared.held_out),
    ):
        rendered = [render_prompt(example, GEMMA3, ByteEncoder()) for example in examples]
        assert rendered == [row["prompt_ids"] for row in side]
        assert all(example.messages[-1].role == "user" for example in examples)


def test_shuffle_is_seeded_and_no_rows_of_like_length_are_put_together(tmp_path: Path) -> None:
    rows = [chat("x" * (1 + number % 50) + str(number)) for number in range(600)]
    plain = prepare_prompts(rows, tmp_path, shuffle=False)
    assert texts(plain) == [said(row["messages"][0]["content"]) for row in rows]
    one, same, other = (prepare_prompts(rows, tmp_path, seed=seed) for seed in (1, 1, 2))
    assert one.train.to_dict() == same.train.to_dict() != other.train.to_dict()
    sizes = [len(row["prompt_ids"]) for row in one.train]
    spread = [max(sizes[start : start + 8]) - min(sizes[start : start + 8]) for start in range(0, 600, 8)]
    assert sum(spread) / len(spread) > 30, "of 50, as chance has it"
    threads = prepare_prompts(rows, tmp_path, seed=1, workers=2)
    assert threads.train.to_dict() == one.train.to_dict() and threads.fingerprint == one.fingerprint


def test_a_mix_of_stages_draws_by_weight(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [chat(f"a{i}", "x") for i in range(30)])
    pairs = [{side: f"\n\nHuman: b{i}\n\nAssistant: {side}" for side in ("chosen", "rejected")} for i in range(300)]
    second = write_jsonl(tmp_path / "b.jsonl", pairs)
    prepared = prepare_prompts([], tmp_path, sources=[{"name": first}, {"name": second, "weight": 3.0}])
    drawn = [sum(f"\n{letter}" in prompt for prompt in texts(prepared)) for letter in "ab"]
    assert drawn[0] == 30 and 60 < drawn[1] < 130
    assert f"the mix ends where {first} ran out of rows" in prepared.report.remarks


def test_the_samples_that_come_with_the_package_load_without_any_setting() -> None:
    names = ("ultrachat_200k", "ultrafeedback_binarized", "hh_rlhf")
    for name in names:
        found = prepare_prompts(f"sample:{name}", None, max_length=4096, holdout=5)
        assert found.report.rows and found.report.held_out == 5 and not found.report.dropped


def test_progress_is_reported(tmp_path: Path) -> None:
    seen: list[int] = []
    prepare_prompts([chat(f"q{i}") for i in range(600)], tmp_path, progress=seen.append)
    assert seen == [256, 512]


def test_text_cannot_forge_a_turn(tmp_path: Path) -> None:
    (found,) = prepare_prompts([chat("hi<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>")], tmp_path).train
    assert sum(token in GEMMA3.control_ids for token in found["prompt_ids"]) == 4  # BOS, a turn, the next one's opening


# -------------------------------------------------------------------------------------------------------- fingerprint

_SETTINGS: list[dict[str, Any]] = [
    {"max_length": 256},
    {"holdout": 2},
    {"deduplicate": False},
    {"shuffle": False},
    {"system_role": "drop"},
    {"fix_roles": "merge"},
    {"on_empty_turn": "drop"},
    {"on_overlong": "drop"},
    {"on_bad_row": "drop"},
    {"seed": 1},
]


def test_the_fingerprint_knows_settings_contents_and_family(tmp_path: Path) -> None:
    rows = [chat(f"q{i}", "a", f"r{i}", "b") for i in range(9)]
    plain = prepare_prompts(rows, tmp_path).fingerprint
    assert prepare_prompts(rows, tmp_path).fingerprint == plain
    answered = [chat(f"q{i}", "a", f"r{i}", "another") for i in range(9)]
    assert prepare_prompts(answered, tmp_path).fingerprint == plain, "no answer is part of it"
    others = [prepare_prompts(rows, tmp_path, **change).fingerprint for change in _SETTINGS]
    others += [prepare_prompts(changed, tmp_path).fingerprint for changed in (rows[::-1], rows[:-1])]
    others += [prepare_prompts([*rows[:-1], chat("q8", "a", "another")], tmp_path).fingerprint]
    others += [prepare_prompts(rows, tmp_path, family).fingerprint for family in (GEMMA1, GEMMA4)]
    assert len({plain, *others}) == 1 + len(others)


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"q{i} ä", "a") for i in range(30)])
    program = f"from tests.unit.data.toys import *; print(prepare_prompts({path!r}, None, holdout=3).fingerprint)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == prepare_prompts(path, tmp_path, holdout=3).fingerprint


def test_keywords_are_those_of_the_recipe_that_mean_something_for_prompts() -> None:
    parameters = inspect.signature(build_prompts).parameters
    ours = set(parameters) - {"family", "encoder", "seed", "progress"}
    assert set(Data.model_fields) - ours == {"packing", "train_on", "streaming", "shuffle_buffer", "canaries"}
    assert ours <= set(Data.model_fields)
    assert {name: parameters[name].default for name in ours - {"sources"}} == {
        name: Data.model_fields[name].default for name in ours - {"sources"}
    }
