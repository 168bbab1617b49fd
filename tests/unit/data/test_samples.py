"""The rows under data/ have exactly the schema and the form that data/README.md promises."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data import rows
from gemma_tune.gemma.conversation import Conversation

DATA = Path(__file__).parents[3] / "data"
README = (DATA / "README.md").read_text(encoding="utf-8")
FILES = ("ultrachat_200k.jsonl", "ultrachat_original.jsonl", "english_quotes.jsonl")

# Two sentences and nothing else: no other full stop, colon or question mark may hide inside.
ANSWER = re.compile(r"[A-Z][^.?!:]+\. (A good tip|The reason): [^.?!:]+\.")
DIRT = re.compile(r"\s{2}|^\s|\s$|[\x00-\x1f\x7f\ufffd]")


def load(name: str) -> list[dict[str, Any]]:
    """Rows of one file; an odd line is an error, and so is a key that comes twice in a row."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    text = (DATA / name).read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text
    return [json.loads(line, object_pairs_hook=unique) for line in text[:-1].split("\n")]


CHAT = load("ultrachat_200k.jsonl")
ORIGINAL = load("ultrachat_original.jsonl")
QUOTES = load("english_quotes.jsonl")
DIALOGUES = [[message["content"] for message in row["messages"]] for row in CHAT] + [row["data"] for row in ORIGINAL]


def words(text: str) -> int:
    return len(text.split())


def test_ultrachat_200k_has_exactly_the_schema_of_the_real_set() -> None:
    for row in CHAT:
        assert list(row) == ["prompt", "prompt_id", "messages"]
        assert all(list(message) == ["content", "role"] for message in row["messages"])
        assert all(type(value) is str for message in row["messages"] for value in message.values())
        assert row["messages"][0]["content"] == row["prompt"]
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles


def test_prompt_id_is_the_sha256_of_the_prompt_and_orders_the_file() -> None:
    ids = [row["prompt_id"] for row in CHAT]
    assert ids == [hashlib.sha256(row["prompt"].encode()).hexdigest() for row in CHAT]
    assert ids == sorted(ids)


def test_ultrachat_original_has_exactly_the_schema_of_the_real_set() -> None:
    assert [row["id"] for row in ORIGINAL] == [str(i) for i in range(len(ORIGINAL))]
    for row in ORIGINAL:
        assert list(row) == ["id", "data"]
        assert len(row["data"]) in (4, 6)
        assert all(type(text) is str for text in row["data"])


def test_english_quotes_has_exactly_the_schema_of_the_real_set() -> None:
    for row in QUOTES:
        assert list(row) == ["quote", "author", "tags"]
        assert re.fullmatch('“[^“”"]+[.?!]”', row["quote"])
        assert row["author"] == row["author"].strip() and words(row["author"]) >= 2
        assert all(type(tag) is str and re.fullmatch("[a-z][a-z-]*", tag) for tag in row["tags"])
        assert len(set(row["tags"])) == len(row["tags"])


def test_no_text_comes_twice() -> None:
    """Neither a question nor an answer, in either file, however it is cased or spaced."""
    texts = [re.sub(r"\W+", " ", text).strip().lower() for text in chain.from_iterable(DIALOGUES)]
    texts += [re.sub(r"\W+", " ", row["quote"]).strip().lower() for row in QUOTES]
    assert [text for text, count in Counter(texts).items() if count > 1] == []


def test_no_two_opening_questions_ask_the_same() -> None:
    """Questions of nearly the same words are paraphrases; the words that every question has do not count."""
    common = re.findall(
        r"\w+",
        "a after and are at be can do does for from have how i in is it me my of on one should so that the to "
        "was what when which why with you between difference",
    )
    asked = [(text, set(re.findall(r"[a-z]+", text.lower())).difference(common)) for text in (d[0] for d in DIALOGUES)]
    near = [
        (first, second)
        for i, (first, a) in enumerate(asked)
        for second, b in asked[:i]
        if len(a & b) / max(1, len(a | b)) >= 0.5
    ]
    assert near == []


def test_questions_and_answers_are_short_and_of_one_form() -> None:
    for dialogue in DIALOGUES:
        assert 6 <= words(dialogue[0]) <= 20, dialogue[0]
        for question in dialogue[::2]:
            assert 4 <= words(question) <= 20 and question.endswith("?"), question
        for answer in dialogue[1::2]:
            assert 15 <= words(answer) <= 40, answer
            assert ANSWER.fullmatch(answer), answer


def test_both_endings_are_common() -> None:
    """A model that always gives the same ending has not learned to choose."""
    endings = Counter(ANSWER.fullmatch(a)[1] for d in DIALOGUES for a in d[1::2])  # type: ignore[index]
    assert min(endings.values()) / endings.total() > 0.35


def test_texts_are_clean() -> None:
    """Plain ASCII in the dialogues, no stray blanks or control characters anywhere."""
    assert [text for dialogue in DIALOGUES for text in dialogue if not text.isascii()] == []
    texts = [*chain.from_iterable(DIALOGUES), *(row["quote"] for row in QUOTES)]
    assert [text for text in texts if DIRT.search(text)] == []
    assert [row["quote"] for row in QUOTES if not 5 <= words(row["quote"]) <= 25] == []


def test_counts_are_those_of_the_readme() -> None:
    table = {m[1]: (int(m[2]), m[3]) for m in re.finditer(r"\| `(\w+\.jsonl)` \| (\d+) \| (\d+|–) \|", README)}
    assert set(table) == {file.name for file in DATA.glob("*.jsonl")}
    table = {name: table[name] for name in FILES}  # the others: test_pair_samples.py
    exchanges = sum(len(row["messages"]) // 2 for row in CHAT)
    turns = sum(len(row["data"]) // 2 for row in ORIGINAL)
    assert table == {
        FILES[0]: (len(CHAT), str(exchanges)),
        FILES[1]: (len(ORIGINAL), str(turns)),
        FILES[2]: (len(QUOTES), "–"),
    }
    lengths = Counter(len(dialogue) // 2 for dialogue in DIALOGUES[: len(CHAT)])
    assert f"{lengths[1]} rows have one exchange, {lengths[2]} have two" in " ".join(README.split())
    lengths = Counter(len(dialogue) // 2 for dialogue in DIALOGUES[len(CHAT) :])
    assert f"({lengths[2]} and {lengths[3]} rows)" in README


def test_the_dirt_of_the_quotes_is_that_of_the_readme() -> None:
    promised = " ".join(README.split())
    authors = {row["author"].split(",")[0] for row in QUOTES}
    assert f"by {len(authors)} invented authors" in promised
    comma = sum(row["author"].endswith(",") for row in QUOTES)
    book = sum(", " in row["author"] for row in QUOTES)
    untagged = sum(not row["tags"] for row in QUOTES)
    odd = sum(any(tag.startswith(("attributed-", "misattributed-")) for tag in row["tags"]) for row in QUOTES)
    assert f"a comma after the author ({comma} rows)" in promised
    assert f"`Author, Book` ({book} rows)" in promised
    assert f"no tags ({untagged} rows)" in promised
    assert f"({odd} rows)" in promised.split("misattributed-to-")[1]


@pytest.mark.parametrize("name", FILES)
def test_the_reader_finds_the_shape_and_reads_every_row(name: str) -> None:
    for row in load(name):
        read = rows.normalise(row, "auto", {})
        assert isinstance(read, Conversation)
        assert [m.role for m in read.messages] == ["user", "model"] * (len(read.messages) // 2)


def test_the_reader_takes_the_dirt_off_an_author() -> None:
    for row in QUOTES:
        read = rows.normalise(row, "auto", {})
        assert isinstance(read, Conversation)
        author = read.messages[-1].content.rsplit("Author: ", 1)[1]
        assert author == row["author"].split(",")[0]
        assert not re.search("[“”]", read.messages[-1].content)
