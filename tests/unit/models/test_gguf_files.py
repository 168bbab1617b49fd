"""GGUF files opened with transformers: the same model, or a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.errors import UserError
from gemma_tune.export.gguf.write import write_gguf
from gemma_tune.export.weights import CheckpointFiles
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.gguf_files import find_gguf, read_header
from gemma_tune.models.saved import load_run

ROW = torch.arange(500, 530)[None]


def as_gguf(model: Path, name: str, file: Path) -> Path:
    """Write the model with every merge that its pieces allow, as a published Gemma has them."""
    document = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = document["model"]["vocab"]
    known = sorted(vocab, key=lambda piece: (-len(piece) * (piece.strip("\n▁") == ""), vocab[piece]))
    splits = [(piece[:n], piece[n:]) for piece in known for n in range(len(piece) - 1, 0, -1)]
    document["model"]["merges"] = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    folder = file.with_suffix(".tokenizer")
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    weights = CheckpointFiles(model)
    write_gguf(weights, model, folder, file, family=FAMILIES[name], kind="f32", about={"name": "tiny"})
    return file


def damaged(file: Path, change: Callable[[bytes], bytes], name: str = "damaged.gguf") -> Path:
    other = file.with_name(name)
    other.write_bytes(change(file.read_bytes()))
    return other


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=ROW).logits
    return made


@pytest.fixture(scope="module")
def gemma3(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_gguf(tiny("gemma3_text"), "gemma3_text", tmp_path_factory.mktemp("gguf") / "model.gguf")


# What transformers does not read from a GGUF by itself (`gguf_files._config`).
LONG = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gemma3_text", {}),
    ("gemma3_text", {"rope_parameters": LONG, "final_logit_softcapping": 5.0}),
    ("gemma2", {}),
    ("gemma2", {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=["gemma3", "gemma3 long", "gemma2", "gemma2 caps"])
def test_it_answers_as_the_model_that_it_was_written_from(
    name: str, changes: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    original = tiny(name, **changes)
    file = as_gguf(original, name, tmp_path / "model.gguf")
    shutil.copyfile(original / "tokenizer.json", tmp_path / "tokenizer.json")
    expected, _, _ = load_run(original, dtype="float32")
    for target in (file, tmp_path):
        model, tokenizer, family = load_run(target, dtype="float32")
        assert family is FAMILIES[name]
        assert (logits(model) - logits(expected)).abs().max() < 1e-4
    assert model.config.layer_types == expected.config.layer_types
    assert model.generation_config.eos_token_id == list(family.stop_ids)
    assert tokenizer.chat_template
    assert tokenizer.get_vocab() == load_run(original)[1].get_vocab()
    assert not model.training
    assert next(load_run(file)[0].parameters()).dtype == torch.bfloat16


def test_the_tokenizer_of_gemma_3_can_come_from_the_file(gemma3: Path, tiny: Callable[..., Path]) -> None:
    _, rebuilt, _ = load_run(gemma3)
    _, original, _ = load_run(tiny("gemma3_text"))
    named = {piece: number for piece, number in rebuilt.get_vocab().items() if not piece.startswith("[PAD")}
    assert named == original.get_vocab()
    assert not list(gemma3.parent.glob("tokenizer*"))  # rebuilt elsewhere


def test_gemma_2_asks_for_its_tokenizer(tiny: Callable[..., Path], tmp_path: Path) -> None:
    file = as_gguf(tiny("gemma2"), "gemma2", tmp_path / "model.gguf")
    with pytest.raises(UserError, match="does not hold all of Gemma 2's tokenizer") as caught:
        load_run(file)
    assert "tokenizer.json" in caught.value.problems[0].fix


def test_which_folders_are_meant_as_a_gguf(gemma3: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert find_gguf(gemma3) == find_gguf(gemma3.parent) == gemma3
    assert find_gguf("google/gemma-3-270m") is find_gguf(tmp_path) is find_gguf(tiny("gemma3_text")) is None
    for number in (1, 2):
        (tmp_path / f"{number}.gguf").touch()
    with pytest.raises(UserError, match=r"2 GGUF files: 1\.gguf, 2\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert find_gguf(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "no GGUF file"),
        (lambda data: b"<html>not found</html>" * 50, "no GGUF file"),
        (lambda data: data[:200], "no GGUF file, or its beginning is damaged"),
        (lambda data: data[:-1], r"cut: it has [\d,]+ of [\d,]+ bytes"),
        (lambda data: data[: len(data) // 2], "cut"),
        (lambda data: data[:8] + b"\xff" * 16 + data[24:], "no GGUF file"),
        (lambda data: data[:4] + b"\x63" + data[5:], "no GGUF file"),
    ],
    ids=["empty", "web page", "header", "last byte", "half", "counts", "version"],
)
def test_a_damaged_file_says_so(change: Callable[[bytes], bytes], said: str, gemma3: Path, tmp_path: Path) -> None:
    file = damaged(gemma3, change)
    try:
        with pytest.raises(UserError, match=said) as caught:
            load_run(file)
    finally:
        file.unlink()
    assert caught.value.problems[0].where == str(file)


def minimal(file: Path, arch: str, kind: str = "model", **facts: int) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(kind)
    for key, value in facts.items():
        writer.add_uint32(key.replace("_", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("arch", "kind", "facts", "said", "fix"),
    [
        ("gemma3", "adapter", {}, "a LoRA adapter, not a model", "--lora"),
        ("llama", "model", {}, "no Gemma: its architecture is 'llama'", "llama.cpp"),
        ("gemma", "model", {}, "architecture 'gemma'", "llama.cpp"),  # transformers 5.23 has no reader for it
        ("gemma3n", "model", {}, "architecture 'gemma3n'", "llama.cpp"),
        ("gemma4", "model", {}, "architecture 'gemma4'", "llama.cpp"),
        ("gemma3", "model", {"split_count": 2}, "one part of a split file", "llama.cpp"),
    ],
)
def test_what_transformers_cannot_open_names_what_can(
    arch: str, kind: str, facts: dict[str, int], said: str, fix: str, tmp_path: Path
) -> None:
    file = minimal(tmp_path / "model.gguf", arch, kind, **facts)
    with pytest.raises(UserError, match=said) as caught:
        load_run(file)
    assert fix in caught.value.problems[0].fix


def test_the_header_is_read_as_the_official_reader_does(gemma3: Path) -> None:
    import gguf

    header, official = read_header(gemma3), gguf.GGUFReader(gemma3)
    assert header.size == gemma3.stat().st_size
    for key, value in header.facts.items():
        assert official.fields[key].contents() == value
    texts = {"tokenizer.ggml.tokens"}
    assert {key for key in official.fields if not key.startswith("GGUF.")} - header.facts.keys() == texts
