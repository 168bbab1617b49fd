"""The pairs under data/ have exactly the schema and the form that data/README.md promises."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest

from gemma_tune.data.pairs import build_pairs
from gemma_tune.data.preferences import normalise_pair
from gemma_tune.gemma.families import Family
from tests.unit.data.test_samples import ANSWER, DIALOGUES, DIRT, README, load, words
from tests.unit.data.toys import GEMMA1, GEMMA3, GEMMA4, ByteEncoder

FEEDBACK = load("ultrafeedback_binarized.jsonl")
HARMLESS = load("hh_rlhf.jsonl")
PROMISED = " ".join(README.split())


def answers(row: dict) -> tuple[str, str]:
    return row["chosen"][-1]["content"], row["rejected"][-1]["content"]


def test_ultrafeedback_has_exactly_the_schema_of_the_real_set() -> None:
    for row in FEEDBACK:
        assert list(row) == [
            "prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"
        ]  # fmt: skip
        assert row["messages"] == row["chosen"] and row["chosen"][:-1] == row["rejected"][:-1]
        assert row["chosen"][0]["content"] == row["prompt"]
        assert type(row["score_chosen"]) is type(row["score_rejected"]) is float
        for side in ("chosen", "rejected"):
            assert all(list(message) == ["content", "role"] for message in row[side])
            roles = [message["role"] for message in row[side]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
    ids = [row["prompt_id"] for row in FEEDBACK]
    assert ids == sorted(hashlib.sha256(row["prompt"].encode()).hexdigest() for row in FEEDBACK)


def test_the_better_answers_have_the_house_form_and_the_worse_ones_its_length() -> None:
    for row in FEEDBACK:
        chosen, rejected = answers(row)
        for good in (chosen, *(message["content"] for message in row["chosen"][1:-1:2])):
            assert ANSWER.fullmatch(good), good
        assert 15 <= words(chosen) <= 40 and 15 <= words(rejected) <= 40, row["prompt"]
        assert 2 / 3 < words(chosen) / words(rejected) < 3 / 2, row["prompt"]


def test_neither_length_nor_form_gives_the_better_answer_away() -> None:
    longer = Counter((words(a) > words(b)) - (words(a) < words(b)) for a, b in map(answers, FEEDBACK))
    assert f"longer in {longer[1]} rows, shorter in {longer[-1]}" in PROMISED
    assert abs(longer[1] - longer[-1]) < 10
    formed = sum(bool(ANSWER.fullmatch(rejected)) for _, rejected in map(answers, FEEDBACK))
    assert f"in {formed} rows it has the same form" in PROMISED
    for rows in (FEEDBACK, HARMLESS):
        pairs = [normalise_pair(row) for row in rows]
        difference = sum(words(pair.chosen.content) - words(pair.rejected.content) for pair in pairs) / len(pairs)
        assert abs(difference) < 1


def test_texts_are_clean_and_new() -> None:
    known = {re.sub(r"\W+", " ", text).strip().lower() for dialogue in DIALOGUES for text in dialogue}
    seen = Counter()
    for row in (*FEEDBACK, *HARMLESS):
        pair = normalise_pair(row)
        texts = [*(message.content for message in pair.prompt), pair.chosen.content, pair.rejected.content]
        assert [text for text in texts if DIRT.search(text) or not text.isascii()] == []
        seen.update({re.sub(r"\W+", " ", text).strip().lower() for text in texts})
    assert [text for text, count in seen.items() if count > 1] == []
    assert known.isdisjoint(seen)


def test_hh_rlhf_has_exactly_the_layout_of_the_real_set() -> None:
    for row in HARMLESS:
        assert list(row) == ["chosen", "rejected"]
        for text in row.values():
            assert re.fullmatch(r"(\n\nHuman: [^\n]+\n\nAssistant: [^\n]+)+", text)
        prompts = [text.rpartition("\n\nAssistant:")[0] for text in row.values()]
        assert prompts[0] == prompts[1]


def test_counts_are_those_of_the_readme() -> None:
    table = {m[1]: (int(m[2]), int(m[3])) for m in re.finditer(r"\| `(\w+\.jsonl)` \| (\d+) \| (\d+) \|", README)}
    lengths = Counter(len(row["chosen"]) // 2 for row in FEEDBACK)
    assert table["ultrafeedback_binarized.jsonl"] == (len(FEEDBACK), sum(n * count for n, count in lengths.items()))
    assert f"{lengths[1]} rows have one exchange, {lengths[2]} have two" in PROMISED.split("## ultrafeedback")[1]
    assert table["hh_rlhf.jsonl"] == (len(HARMLESS), sum(row["chosen"].count("Assistant:") for row in HARMLESS))


@pytest.mark.parametrize("family", [GEMMA1, GEMMA3, GEMMA4])
def test_the_samples_load_without_any_setting(family: Family) -> None:
    feedback, harmless = (
        build_pairs(family, ByteEncoder(), sources=[{"name": f"sample:{name}"}], margins=margins, holdout=5)
        for name, margins in (("ultrafeedback_binarized", True), ("hh_rlhf", False))
    )
    assert feedback.report.dropped == {"equal ratings": 1, "chosen and rejected are the same": 1}
    assert f"So {feedback.report.rows + 5} pairs are trained" in PROMISED
    assert min(feedback.train["margin"]) > 0
    assert not harmless.report.dropped and not harmless.report.repaired
    assert harmless.report.rows == len(HARMLESS) - 5
