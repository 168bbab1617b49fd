from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data.cells import RowError
from gemma_tune.data.sources import NAMED, named, open_source
from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.conversation import Conversation, Document, Message, Preference
from tests.unit.data.toys import chat, write_jsonl


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`datasets.load_dataset` answers with `rows` (or raises `error`) and remembers how it was asked."""
    state: dict[str, Any] = {"rows": [], "asked": None, "error": None}

    def load_dataset(path: str, **keywords: Any) -> list[Any]:
        state["asked"] = {"path": path, **keywords}
        if state["error"]:
            raise state["error"]
        return state["rows"]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return state


def examples(source: dict[str, Any], **keywords: Any) -> list[Any]:
    opened = open_source(source, **keywords)
    return [opened.to_example(row.value) for row in opened]


def test_ultrachat(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"prompt": "q", "prompt_id": "0", **chat("q", "a")}]
    (found,) = examples({"name": "ultrachat"})
    assert found == Conversation((Message("user", "q"), Message("model", "a")))
    assert hub["asked"] == {
        "path": "HuggingFaceH4/ultrachat_200k",
        "name": None,
        "split": "train_sft",
        "revision": None,
        "streaming": False,
    }


def test_ultrachat_original_uses_all_turns(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"id": "0", "data": [f"t{i}" for i in range(14)]}]
    (found,) = examples({"name": "ultrachat_original"})
    assert [message.content for message in found.messages] == [f"t{i}" for i in range(14)]
    assert (hub["asked"]["path"], hub["asked"]["split"]) == ("stingning/ultrachat", "train")


def test_english_quotes_uses_every_row(hub: dict[str, Any]) -> None:
    """The notebook of 2024 trained on 3 of the 2,508 rows."""
    hub["rows"] = [{"quote": f"“Quote number {i} is here.”", "author": f"Author {i},", "tags": []} for i in range(2508)]
    found = examples({"name": "english_quotes"})
    assert len(found) == 2508
    assert found[2507].messages[1].content == "Quote: Quote number 2507 is here.\nAuthor: Author 2507"


def test_the_recipe_chooses_split_subset_revision_and_streaming(hub: dict[str, Any]) -> None:
    source = {"name": "owner/set", "split": "test", "subset": "en", "revision": "abc"}
    assert examples(source, streaming=True) == []
    assert hub["asked"] == {"path": "owner/set", "name": "en", "split": "test", "revision": "abc", "streaming": True}


def test_limit_and_places(hub: dict[str, Any]) -> None:
    hub["rows"] = [chat("q", "a")] * 5000
    rows = list(open_source({"name": "owner/set", "limit": 1204}))
    assert len(rows) == 1204
    assert (rows[-1].number, rows[-1].where) == (1204, "owner/set row 1,204")


@pytest.mark.parametrize("name", ["ultrachat", "HuggingFaceH4/ultrachat_200k"])
@pytest.mark.parametrize("split", ["train_gen", "test_gen"])
def test_splits_without_answers_are_refused(name: str, split: str) -> None:
    with pytest.raises(UserError, match="nothing to train on") as caught:
        open_source({"name": name, "split": split})
    assert f"split: {split.replace('gen', 'sft')}" in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- pairs

PAIR = Preference((Message("user", "q"),), Message("model", "good"), Message("model", "bad"))


def chats(**more: Any) -> dict[str, Any]:
    return {side: chat("q", answer)["messages"] for side, answer in (("chosen", "good"), ("rejected", "bad"))} | more


def test_ultrafeedback(hub: dict[str, Any]) -> None:
    hub["rows"] = [chats(prompt="q", messages=chat("q", "good")["messages"], score_chosen=8.0, score_rejected=7.5)]
    (found,) = examples({"name": "ultrafeedback"}, wanted="preferences")
    assert found == replace(PAIR, margin=0.5)
    assert hub["asked"]["path"] == "HuggingFaceH4/ultrafeedback_binarized"
    assert hub["asked"]["split"] == "train_prefs"


def test_hh_rlhf(hub: dict[str, Any]) -> None:
    hub["rows"] = [{side: f"\n\nHuman: q\n\nAssistant: {a}" for side, a in (("chosen", "good"), ("rejected", "bad"))}]
    assert examples({"name": "hh_rlhf"}, wanted="preferences") == [PAIR]
    assert (hub["asked"]["path"], hub["asked"]["split"]) == ("Anthropic/hh-rlhf", "train")


@pytest.mark.parametrize("split", ["train_sft", "test_gen", "train_gen"])
@pytest.mark.parametrize("name", ["ultrafeedback", "HuggingFaceH4/ultrafeedback_binarized"])
def test_splits_that_are_not_for_pairs_are_refused(name: str, split: str) -> None:
    with pytest.raises(UserError, match="nothing to train on") as caught:
        open_source({"name": name, "split": split}, wanted="preferences")
    assert f"set split: {split.partition('_')[0]}_prefs" in str(caught.value)


def test_the_conversations_of_ultrafeedback_are_for_sft(hub: dict[str, Any]) -> None:
    hub["rows"] = [chats(prompt="q", messages=chat("q", "good")["messages"])]
    name = "HuggingFaceH4/ultrafeedback_binarized"
    assert examples({"name": name, "split": "train_sft"}) == [PAIR.conversation(PAIR.chosen)]
    with pytest.raises(UserError, match="prompts without an answer") as caught:
        open_source({"name": name, "split": "train_gen"})
    assert "set split: train_sft" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wanted", "stage", "other"),
    [
        ("ultrafeedback", "examples", "stage: dpo, reward or kto", "ultrachat"),
        ("hh_rlhf", "examples", "stage: dpo, reward or kto", "ultrachat"),
        ("ultrachat", "preferences", "stage: sft", "ultrafeedback, hh_rlhf"),
        ("ultrachat", "judged", "stage: sft", "ultrafeedback, hh_rlhf, kto_mix"),
        ("kto_mix", "preferences", "stage: kto", "ultrafeedback, hh_rlhf"),
        ("kto_mix", "examples", "stage: kto", "ultrachat, ultrachat_original, english_quotes"),
        ("english_quotes", "preferences", "stage: sft", "ultrafeedback, hh_rlhf"),
    ],
)
def test_a_named_set_of_another_stage_is_refused_before_it_is_fetched(
    hub: dict[str, Any], name: str, wanted: Any, stage: str, other: str
) -> None:
    with pytest.raises(UserError, match=f"'{name}' holds") as caught:
        open_source({"name": name}, wanted=wanted)
    assert stage in str(caught.value) and other in str(caught.value)
    assert hub["asked"] is None


def test_every_way_to_name_a_source_gives_pairs(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["rows"] = [chats()]
    (tmp_path / "mine.py").write_text(f"def rows():\n    yield {chats()!r}\n")
    file = write_jsonl(tmp_path / "rows.jsonl", [chats()])
    for name in ("owner/set", file, f"{tmp_path}/mine.py:rows"):
        assert examples({"name": name}, wanted="preferences") == [PAIR]
    assert len(examples({"name": "sample:hh_rlhf", "limit": 7}, wanted="preferences")) == 7
    hub["rows"] = [{"ask": "q", "yes": "good", "no": "bad"}]
    columns = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
    assert examples({"name": "owner/set", "columns": columns}, wanted="preferences") == [PAIR]
    with pytest.raises(RowError, match="format 'text' holds no pairs"):
        examples({"name": "owner/set", "format": "text"}, wanted="preferences")


def test_one_preference_is_not_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from gemma_tune.gemma.conversation import Message, Preference\n"
        "def rows():\n    return Preference((Message('user', 'q'),), Message('model', 'a'), Message('model', 'b'))\n"
    )
    with pytest.raises(UserError, match="rows returned Preference, not rows"):
        list(open_source({"name": f"{tmp_path}/mine.py:rows"}, wanted="preferences"))


# ------------------------------------------------------------------------------------------------- names and formats


def test_a_named_set_that_changed_is_a_row_error(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"dialogue": []}]
    with pytest.raises(RowError, match="no column 'messages': the set has changed"):
        examples({"name": "ultrachat"})


def test_a_format_may_be_forced_on_a_named_set(hub: dict[str, Any]) -> None:
    hub["rows"] = [{"prompt": "only this", "messages": None}]
    assert examples({"name": "ultrachat", "format": "text", "columns": {"text": "prompt"}}) == [Document("only this")]


def test_a_new_set_is_one_function(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_tune.data.sources.NAMED", NAMED.copy())
    from gemma_tune.data import sources

    @named("riddles", hub="owner/riddles")
    def riddles(row: dict[str, Any]) -> Conversation:
        return Conversation((Message("user", row["riddle"]), Message("model", row["solution"])))

    assert "riddles" in sources.NAMED
    hub["rows"] = [{"riddle": "q", "solution": "a"}]
    assert examples({"name": "riddles"}) == [Conversation((Message("user", "q"), Message("model", "a")))]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ultrachta", "did you mean 'ultrachat'?"),
        ("english_quote", "did you mean 'english_quotes'?"),
        (
            "squad",
            "ultrachat, ultrachat_original, english_quotes, ultrafeedback, hh_rlhf, kto_mix; otherwise a hub id",
        ),
        ("https://example.org/x.zip", "download the file"),
        ("a/b/c", "no dataset"),
    ],
)
def test_an_unknown_name_gets_a_hint(name: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source({"name": name})
    assert what in str(caught.value)


def test_a_file_takes_no_hub_keys(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="'split' means nothing for a file"):
        open_source({"name": path, "split": "train"})
    assert examples({"name": path}) == [Document("x")]


@pytest.mark.parametrize(
    ("error", "kind", "what"),
    [
        (ValueError("Unknown split \"trian\". Should be one of ['train']."), UserError, "data.sources.split"),
        (ValueError("Config name is missing.\nPlease pick one among ['en']"), UserError, "data.sources.subset"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), UserError, "no code of the hub"),
        (ConnectionError("nope"), AccessError, "cannot be reached"),
    ],
)
def test_what_the_hub_says_wrong(hub: dict[str, Any], error: Exception, kind: type[Exception], what: str) -> None:
    hub["error"] = error
    with pytest.raises(kind) as caught:
        examples({"name": "owner/set"})
    assert what in str(caught.value)


# ------------------------------------------------------------------------------------------------- a function by path

MINE = """
from gemma_tune.gemma.conversation import Conversation, Message

def rows():
    yield {"prompt": "q", "completion": "a"}
    yield Conversation((Message("user", "r"), Message("model", "b")))

def listed():
    return [{"text": "x"}]

def broken():
    yield {"text": "x"}
    raise KeyError("gone")

def nothing():
    return 3

number = 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_rows_of_a_function(mine: str) -> None:
    first, second = list(open_source({"name": f"{mine}:rows"}))
    assert (first.value, first.where) == ({"prompt": "q", "completion": "a"}, f"{mine}:rows row 1")
    assert isinstance(second.value, Conversation)
    assert examples({"name": f"{mine}:listed"}) == [Document("x")]


def test_a_relative_path(mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(mine).parent)
    assert examples({"name": "./mine.py:listed"}) == [Document("x")]


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("row", "has no function 'row'\n  fix: did you mean rows?"),
        ("number", "has no function 'number'"),
        ("", "which function of the file?"),
        ("nothing", "nothing returned int, not rows"),
        ("broken", "mine.py:13: KeyError: 'gone'"),
    ],
)
def test_a_wrong_function(mine: str, function: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        list(open_source({"name": f"{mine}:{function}" if function else mine}))
    assert what in str(caught.value)


def test_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    for content, what in (
        ("def rows(:\n", "bad.py:1: SyntaxError"),
        ("import no_such_module\n", "bad.py:1: it imports no_such_module, which is not installed"),
        ("raise KeyError('gone')\n", "bad.py:1: KeyError"),
    ):
        (tmp_path / "bad.py").write_text(content)
        with pytest.raises(UserError) as caught:
            open_source({"name": f"{tmp_path / 'bad.py'}:rows"})
        assert what in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        open_source({"name": f"{tmp_path / 'none.py'}:rows"})


def test_a_relative_path_keeps_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def rows():\n    yield {}['gone']\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^mine\.py:2: KeyError"):
        list(open_source({"name": "mine.py:rows"}))


def test_an_address_is_no_file() -> None:
    with pytest.raises(UserError, match="is an address"):
        open_source({"name": "https://example.org/rows.jsonl"})


def test_sample_rows_come_with_the_package() -> None:
    found = examples({"name": "sample:ultrachat_200k", "limit": 3})
    assert len(found) == 3
    assert all(example.messages[-1].role == "model" for example in found)
