"""The key of prepared data changes with everything that decides about the rows, and with nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.data import content as module
from gemma_tune.data.content import Content, commit_of, content_of
from gemma_tune.gemma.families import FAMILIES
from tests.unit.data.toys import GEMMA3, write_jsonl


def content(folder: Path, **changes: Any) -> Content:
    """The content of a file of one row, and what `changes` change."""
    source = {"name": write_jsonl(folder / "key.jsonl", [{"text": "t"}])}
    keywords = {"sources": [source], "max_length": 512, "workers": 1, "seed": 0} | changes
    found = content_of("build", GEMMA3, "tokenizer", keywords)
    assert found is not None
    return found


def test_the_key_is_of_what_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = str(tmp_path / "key.jsonl")
    base = content(tmp_path).key
    assert re.fullmatch("[0-9a-f]{64}", base) and base == content(tmp_path, workers=8).key
    keywords = {"sources": [{"name": name}], "max_length": 512, "seed": 0}
    others = [
        content_of("build_pairs", GEMMA3, "tokenizer", keywords),
        content_of("build", FAMILIES["gemma1"], "tokenizer", keywords),
        content_of("build", GEMMA3, "another", keywords),
        content(tmp_path, seed=1),
        content(tmp_path, sources=[{"name": name, "limit": 1}]),
        content(tmp_path, sources=[{"name": name}, {"name": "sample:english_quotes"}]),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module, "code", lambda: "corrected")
        others.append(content(tmp_path))
    Path(name).write_text('{"text": "u"}\n', encoding="utf-8")
    others.append(content_of("build", GEMMA3, "tokenizer", keywords))
    found = [one.key for one in others if one is not None]
    assert len({base, *found}) == len(others) + 1
    assert content(tmp_path).key == base


def test_the_code_that_counts_is_all_between_a_row_and_its_tokens() -> None:
    names = {path.name for path in module._modules()}
    assert {"rows.py", "pack.py", "build.py", "chat.py", "gemma4.py", "families.py", "tokenizer.py"} <= names


def test_a_function_counts_by_its_file_and_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def rows(): yield {'text': 'a'}\n", encoding="utf-8")
    sources = [{"name": f"{file}:rows"}]
    first = content(tmp_path, sources=sources)
    assert first.functions == (f"{file}:rows",) and content(tmp_path).functions == ()
    file.write_text("def rows(): yield {'text': 'b'}\n", encoding="utf-8")
    assert content(tmp_path, sources=sources).key != first.key


@pytest.mark.parametrize("change", [{"streaming": True}, {"sources": [{"name": "gone.jsonl"}]}])
def test_what_cannot_be_told_has_no_key(change: dict[str, Any]) -> None:
    keywords = {"sources": [{"name": "sample:english_quotes"}]} | change
    assert content_of("build", GEMMA3, "tokenizer", keywords) is None


def test_without_network_a_commit_is_what_was_last_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert commit_of("acme/rows", None) is None
    assert commit_of("acme/rows", "ab" * 20) == "ab" * 20
    refs = tmp_path / "datasets--acme--rows" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("cd" * 20, encoding="utf-8")
    assert commit_of("acme/rows", None) == "cd" * 20
    assert commit_of("acme/rows", "v1") is None
    one = {"sources": [{"name": "acme/rows"}]}
    first = content_of("build", GEMMA3, "tokenizer", one)
    assert first is not None and first.commits == {"acme/rows": "cd" * 20}
    (refs / "main").write_text("ef" * 20, encoding="utf-8")
    second = content_of("build", GEMMA3, "tokenizer", one)
    assert second is not None and second.key != first.key
