"""Prepared data as a folder: what is read is what was built, of every kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from gemma_tune.data.build import Prepared
from gemma_tune.data.judged import build_judged
from gemma_tune.data.prepared import read_prepared, write_prepared
from gemma_tune.train.checkpoint import Damaged
from gemma_tune.train.library import find, keep, place_for
from tests.unit.data.test_prepared_key import content
from tests.unit.data.toys import GEMMA3, GEMMA4, ByteEncoder, chat, prepare, prepare_pairs, prepare_prompts, write_jsonl

MADE = {"at": "today", "recipe": "recipe.yaml", "stage": "sft", "rows": 4}
CHATS = [chat(f"q{i}", "a" * (i % 7 + 1), "r", f"b{i}\u2028\x85 \u00e9") for i in range(40)]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = {
    "messages": [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}],
}
TEXTS = [{"text": f"A text of {i} words. " * (i + 1)} for i in range(30)]
PAIRS = [
    {"prompt": f"q{i}", "chosen": "good", "rejected": "b" * i, "score_chosen": i + 0.1, "score_rejected": 0.3}
    for i in range(1, 30)
]
JUDGED = [{"prompt": f"q{i}", "completion": "a" * (i + 1), "label": bool(i % 3)} for i in range(30)]


def judge(rows: list[Any], folder: Path, **settings: Any) -> Prepared[Any]:
    sources = [{"name": write_jsonl(folder / "rows.jsonl", rows)}]
    return build_judged(GEMMA3, ByteEncoder(), sources=sources, **settings)


KINDS: dict[str, Callable[[Path], Prepared[Any]]] = {
    "packed": lambda folder: prepare(CHATS, folder, holdout=5),
    "one row each": lambda folder: prepare(CHATS, folder, holdout=5, packing=False),
    "nothing held out": lambda folder: prepare([*CHATS, CHATS[0], chat("only a question")], folder, on_bad_row="drop"),
    "tools": lambda folder: prepare([TOOLS, *CHATS], folder, GEMMA4, holdout=20),
    "texts that are split": lambda folder: prepare(TEXTS, folder, holdout=3, max_length=60),
    "pairs": lambda folder: prepare_pairs(PAIRS, folder, holdout=4, batch=4, margins=True),
    "judged": lambda folder: judge(JUDGED, folder, holdout=4, batch=4),
    "prompts": lambda folder: prepare_prompts(CHATS, folder, holdout=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_was_built(kind: str, tmp_path: Path) -> None:
    built = KINDS[kind](tmp_path)
    write_prepared(built, tmp_path)
    read = read_prepared(tmp_path)
    for ours, theirs in ((built.train, read.train), (built.held_out, read.held_out)):
        assert isinstance(ours, datasets.Dataset) and isinstance(theirs, datasets.Dataset)
        assert ours.features == theirs.features and ours.to_list() == theirs.to_list()
    assert all(Path(file["filename"]).parent == tmp_path / "train" for file in read.train.cache_files)
    assert bool(read.train.cache_files), "it is mapped, not read"
    for field in dataclasses.fields(Prepared):
        if field.name not in ("train", "held_out"):
            assert getattr(read, field.name) == getattr(built, field.name), field.name


def test_datasets_still_cannot_read_what_it_wrote_of_no_rows(tmp_path: Path) -> None:
    """datasets#8385: once this fails, `num_shards` in `write_prepared` can go."""
    datasets.Dataset.from_dict({"a": [1]}).select([]).flatten_indices().save_to_disk(str(tmp_path))
    with pytest.raises(IndexError):
        datasets.load_from_disk(str(tmp_path))


def test_a_stream_is_refused(tmp_path: Path) -> None:
    built = prepare(CHATS, tmp_path, holdout=2, streaming=True)
    with pytest.raises(TypeError, match="a stream"):
        write_prepared(built, tmp_path)


# --- the library


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A library with one preparation."""
    folder = place_for(content(tmp_path), tmp_path / "library")
    folder.mkdir(parents=True)
    keep(prepare(CHATS, tmp_path, holdout=5), folder, content(tmp_path), MADE)
    return folder


def test_what_was_kept_is_found_by_its_content(shelf: Path, tmp_path: Path) -> None:
    kept = find(content(tmp_path), shelf.parent)
    assert kept is not None and kept.folder == shelf and kept.made == MADE
    assert kept.prepared.fingerprint == prepare(CHATS, tmp_path, holdout=5).fingerprint
    assert find(content(tmp_path, max_length=300), shelf.parent) is None


def cut(shelf: Path) -> None:
    file = next((shelf / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-1])


def flip(shelf: Path) -> None:
    file = next((shelf / "train").glob("*.arrow"))
    found = bytearray(file.read_bytes())
    found[len(found) // 2] ^= 1
    file.write_bytes(found)


def rename_key(shelf: Path) -> None:
    other = "0" * 64
    body = (shelf / "COMPLETE.json").read_text(encoding="utf-8")
    (shelf / "COMPLETE.json").write_text(body.replace(shelf.name, other[:32]), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "bytes instead of"),
        (flip, "sha256 differs"),
        (lambda shelf: (shelf / "held_out.jsonl").unlink(), "held_out.jsonl is missing"),
        (lambda shelf: (shelf / "COMPLETE.json").unlink(), "the save never ended"),
        (rename_key, "was altered"),
    ],
)
def test_what_is_damaged_is_not_read(harm: Callable[[Path], Any], said: str, shelf: Path, tmp_path: Path) -> None:
    harm(shelf)
    with pytest.raises(Damaged, match=said):
        find(content(tmp_path), shelf.parent)
