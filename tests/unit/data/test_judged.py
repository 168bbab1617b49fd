"""Judged answers from row to ids: layouts, labels, pairs that become two of them, order, figures, collator."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.data.build import Prepared
from gemma_tune.data.cells import RowError
from gemma_tune.data.collate import JudgedCollator, answers_to_others
from gemma_tune.data.judged import apart, build_judged
from gemma_tune.data.judgements import normalise_judged
from gemma_tune.data.keys import group_of, key_of
from gemma_tune.data.spool import from_json, to_json
from gemma_tune.errors import UserError
from gemma_tune.gemma.conversation import Judged, Message, Preference
from gemma_tune.gemma.families import Family
from tests.unit.data.toys import GEMMA1, GEMMA3, GEMMA4, ByteEncoder, decoded, prepare_pairs, write_jsonl

ASKED, SAID = Message("user", "q"), Message("model", "a")


def row(prompt: Any = "q", completion: Any = "a", label: Any = True, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label} | more


def judge(rows: list[Any], folder: Path, family: Family = GEMMA3, **settings: Any) -> Prepared[Judged]:
    sources = [{"name": write_jsonl(folder / "rows.jsonl", rows)}]
    return build_judged(family, ByteEncoder(), sources=sources, **{"holdout": 0, **settings})


def texts(prepared: Prepared[Judged], family: Family = GEMMA3) -> list[tuple[str, bool]]:
    return [(decoded(found["completion_ids"], family), bool(found["label"])) for found in prepared.train]


# --- layouts


@pytest.mark.parametrize(
    "given",
    [
        row(),
        row([{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}]),
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "label": 1},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "label": 1.0},
        {"instruction": "q", "input": "", "output": "a", "label": True},
        row(chosen=None, rejected=None),
    ],
)
def test_a_conversation_with_a_label_is_a_judged_answer(given: dict[str, Any]) -> None:
    assert normalise_judged(given) == Judged((ASKED,), SAID, True)


def test_what_stands_beside_the_answer_is_kept() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}]
    found = normalise_judged(row(turns, "a", False, system="s", group=3, enable_thinking=True))
    prompt = (Message("system", "s"), ASKED, Message("model", "x"), Message("user", "r"))
    assert found == Judged(prompt, SAID, False, thinking=True, group="3")
    assert normalise_judged(
        {"p": "q", "c": "a", "ok": 0}, columns={"prompt": "p", "completion": "c", "label": "ok"}
    ) == (Judged((ASKED,), SAID, False))


def test_the_labels_of_a_csv_file_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,label\nq,a,True\nq,b,false\nq,c,1\nq,d,0\n", encoding="utf-8")
    prepared = build_judged(GEMMA3, ByteEncoder(), sources=[{"name": str(path)}], holdout=0, shuffle=False)
    assert texts(prepared) == [(f"{text}<end_of_turn>", good) for text, good in zip("abcd", (1, 0, 1, 0), strict=True)]


def test_a_row_with_two_answers_is_a_pair() -> None:
    given = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pair = Preference((ASKED,), SAID, Message("model", "b"))
    assert normalise_judged(given) == normalise_judged(given, "preference") == pair
    assert normalise_judged(given | {"label": None}) == pair


@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        ({"prompt": "q", "completion": "a"}, "no column 'label', or it is null", "label: ..."),
        ({"prompt": "q", "completion": "a", "thumbs_up": True}, "no column 'label'", "{label: thumbs_up}"),
        (row(label=None), "no column 'label', or it is null", "label"),
        (row(label=""), "no column 'label', or it is null", "label"),
        (row(label="yes"), "label is text ('yes'), not true or false", "1 and 0"),
        (row(label=0.7), "label is a number (0.7), not true or false", "1 and 0"),
        (row(label=-1), "label is a number (-1), not true or false", "1 and 0"),
        ({"text": "t", "label": True}, "is plain text", ""),
        ({"messages": [{"role": "user", "content": "q"}], "label": True}, "ends with a 'user' turn", "on_bad_row"),
        ({"messages": [{"role": "assistant", "content": "a"}], "label": True}, "an answer and no prompt", ""),
        ({"label": True}, "fit no known shape", "data.sources"),
        (["q"], "the row is a list", ""),
    ],
)
def test_what_is_no_judged_answer_says_so(given: Any, what: str, fix: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise_judged(given)
    assert what in str(caught.value) and fix in caught.value.fix


# --- rows


@pytest.mark.parametrize(
    ("family", "user", "opening", "end"),
    [
        (GEMMA1, "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>"),
        (GEMMA3, "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>"),
        (GEMMA4, "<|turn>user\n", "<|turn>model\n", "<turn|>"),
    ],
)
def test_a_row_is_a_prompt_and_an_answer_that_ends_at_its_turn_end(
    tmp_path: Path, family: Family, user: str, opening: str, end: str
) -> None:
    prepared = judge([row(), row("r", label=False)], tmp_path, family, shuffle=False)
    first = prepared.train[0]
    assert decoded(first["prompt_ids"], family) == f"<bos>{user}q{end}\n{opening}"
    assert texts(prepared, family) == [(f"a{end}", True), (f"a{end}", False)]
    features = {name: str(feature) for name, feature in prepared.train.features.items()}
    lists = dict.fromkeys(("prompt_ids", "completion_ids"), "List(Value('int32'))")
    assert features == lists | {"label": "Value('int8')"}


def test_a_pair_gives_two_answers_and_repetitions_are_looked_for_among_the_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "c"},
        row("q", "b", True),
        {"prompt": "q", "chosen": "d", "rejected": "d"},
    ]
    prepared = judge(rows, tmp_path, shuffle=False)
    found = [(text.removesuffix("<end_of_turn>"), good) for text, good in texts(prepared)]
    assert found == [("a", True), ("b", False), ("c", False), ("b", True)]
    assert prepared.report.dropped == {"repetition": 1, "chosen and rejected are the same": 1}
    assert prepared.report.noted == {"answer that is judged both good and bad": 1}
    assert len(judge(rows, tmp_path, deduplicate=False).train) == 5


def test_the_report_counts_good_and_bad(tmp_path: Path) -> None:
    report = judge([row("q", "aaa"), row("r", "a", False), row("s", "aa", False)], tmp_path).report
    assert report.judged is not None
    assert (report.judged.good, report.judged.bad) == (1, 2)
    assert (report.judged.good_tokens, report.judged.bad_tokens) == (4, 2.5)
    assert "3 training answers: 1 good, 2 bad; 0 held out" in list(report.lines())
    assert "answers on average: good 4.0 tokens, bad 2.5 tokens" in list(report.lines())
    only_good = judge([row()], tmp_path).report
    assert only_good.judged is not None and only_good.judged.bad_tokens is None
    assert "answers on average: good 2.0 tokens" in list(only_good.lines())


def test_an_answer_is_never_cut(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[place % 2], "content": f"turn {place} " * 5} for place in range(5)]
    whole = judge([row(turns, "the answer")], tmp_path)
    longest = len(whole.train[0]["prompt_ids"]) + len(whole.train[0]["completion_ids"])
    shorter = judge([row(turns, "the answer")], tmp_path, max_length=longest - 1)
    assert shorter.report.repaired == {"oldest turns of the prompt left out": 1}
    assert texts(shorter) == texts(whole)
    with pytest.raises(UserError, match="prompt and answer longer than max_length: 1"):
        judge([row(turns, "the answer " * 99)], tmp_path, max_length=64)
    with pytest.raises(UserError, match=r"above data\.max_length"):
        judge([row(turns, "the answer")], tmp_path, max_length=longest - 1, on_overlong="error")


def test_both_answers_of_a_prompt_are_on_one_side_of_the_holdout(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"} for number in range(20)]
    prepared = judge(rows, tmp_path, holdout=6)
    prompts = [{tuple(found["prompt_ids"]) for found in part} for part in (prepared.train, prepared.held_out)]
    assert not prompts[0] & prompts[1] and len(prepared.held_out) == 6
    assert prepared.held_out_examples[0].prompt[0].content.startswith("q")


def test_the_fingerprint_sees_a_label(tmp_path: Path) -> None:
    same = judge([row()], tmp_path).fingerprint
    assert judge([row()], tmp_path).fingerprint == same
    assert judge([row(label=False)], tmp_path).fingerprint != same


def test_a_bad_row_stops_or_is_counted(tmp_path: Path) -> None:
    rows = [row(), row("r", label="perhaps")]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: label is text"):
        judge(rows, tmp_path)
    assert judge(rows, tmp_path, on_bad_row="drop").report.dropped == {"label is not true or false": 1}


def test_a_prompt_that_ends_with_the_model_is_merged_where_asked(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(UserError, match="nothing to answer"):
        judge([row(turns, "a")], tmp_path, GEMMA4)
    prepared = judge([row(turns, "a")], tmp_path, GEMMA4, fix_roles="merge")
    (text, _), *_ = texts(prepared, GEMMA4)
    assert "x" in text and "a" in text


def test_keys_and_the_spool_tell_judged_answers_apart() -> None:
    good = Judged((ASKED,), SAID, True, group="g")
    assert from_json(to_json(good)) == good
    assert key_of(good) == key_of(Judged((ASKED,), Message("model", " a "), True))
    assert key_of(good) != key_of(Judged((ASKED,), SAID, False))
    assert group_of(good) != group_of(Judged((ASKED,), SAID, True))


def test_what_a_function_builds_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    built = "from gemma_tune.gemma.conversation import *\nq, a = Message('user', 'q'), Message('model', 'a')\n"
    path.write_text(built + "def rows():\n    yield Judged((q,), a, False)\n    yield Preference((q,), a, a)\n")
    prepared = build_judged(GEMMA3, ByteEncoder(), sources=[{"name": f"{path}:rows"}], holdout=0)
    assert texts(prepared) == [("a<end_of_turn>", False)]
    for made, what in (
        ("Judged((q,), a, 1)", "good is a number (1), not true or false"),
        ("Judged((q,), q, True)", "completion is a 'user' turn, not an answer of the model"),
        ("Judged((), a, True)", "a Judged's prompt is not a tuple with turns"),
        ("Conversation((q, a))", "is a Conversation; this stage trains on judged answers"),
    ):
        path.write_text(built + f"def rows():\n    yield {made}\n")
        with pytest.raises(UserError) as caught:
            build_judged(GEMMA3, ByteEncoder(), sources=[{"name": f"{path}:rows"}], holdout=0)
        assert what in str(caught.value)


def test_the_other_stages_say_where_judged_answers_belong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="single answers with a 'label'") as caught:
        prepare_pairs([row()], tmp_path)
    assert "set stage: kto" in str(caught.value)


# --- order and KL rows


def test_rows_of_one_group_stand_apart_in_their_step() -> None:
    groups = [b"x", b"x", b"y", b"y", b"x", b"z", b"z", b"w"]
    assert apart(range(8), groups, 4) == [0, 2, 1, 3, 4, 5, 7, 6]
    draw = random.Random(0)
    for size in (1, 2, 3, 8):
        groups = [bytes([draw.randrange(4)]) for _ in range(21)]
        order = draw.sample(range(21), 21)
        found = apart(order, groups, size)
        for start in range(0, 21, size):
            assert sorted(found[start : start + size]) == sorted(order[start : start + size])


def test_each_prompt_is_given_an_answer_to_another() -> None:
    rows = [{"prompt_ids": [prompt], "completion_ids": [answer]} for prompt, answer in ((1, 5), (1, 6), (2, 7))]
    assert answers_to_others(rows) == [[7], [7], [6]]
    assert answers_to_others(rows[:2]) is answers_to_others(rows[:1]) is None


def judged_rows(count: int, length: int) -> list[dict[str, Any]]:
    draw = random.Random(3)

    def ids() -> list[int]:
        return [draw.randrange(9) for _ in range(draw.randrange(1, length))]

    return [{"prompt_ids": [10 + n, *ids()], "completion_ids": ids(), "label": n % 3 % 2} for n in range(count)]


def test_a_batch_is_that_of_trl() -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    rows = judged_rows(7, 9)
    rotated = [row | {"KL_completion_ids": rows[place - 1]["completion_ids"]} for place, row in enumerate(rows)]
    theirs = DataCollatorForUnpairedPreference(pad_token_id=5)([row | {"label": bool(row["label"])} for row in rotated])
    for given in (rows, rotated):
        ours = JudgedCollator(5, 99)(given)
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name


def test_a_long_kl_row_loses_the_end_of_its_answer() -> None:
    rows = [
        {"prompt_ids": [1] * 7, "completion_ids": [2], "label": 1},
        {"prompt_ids": [3], "completion_ids": [4, 5, 6, 7, 8], "label": 0},
    ]
    batch = JudgedCollator(0, 8)(rows)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["KL_input_ids"].tolist() == [[1] * 7 + [4], [3, 2] + [0] * 6]
    assert batch["KL_completion_mask"].sum(1).tolist() == [1, 1]


def test_the_first_answers_of_a_batch_keep_their_kl_rows() -> None:
    batch = JudgedCollator(0, 99)(judged_rows(4, 5))
    fewer = JudgedCollator(0, 99).first(batch, 3)
    assert fewer.keys() == batch.keys()
    assert all(torch.equal(fewer[name], batch[name][:3]) for name in batch)


def test_a_batch_of_one_prompt_has_no_kl_rows() -> None:
    assert not any(name.startswith("KL_") for name in JudgedCollator(0, 8)(judged_rows(1, 4)))
