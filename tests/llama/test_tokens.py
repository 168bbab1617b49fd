"""Tokens that llama.cpp itself finds through our files, on the real tokenizers of Google."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma_tune.export.gguf.facts import add_facts, read_decoder
from gemma_tune.export.gguf.vocabulary import make_vocabulary
from gemma_tune.export.gguf.write import add_vocabulary, writing
from gemma_tune.export.llama import LlamaModel, open_gguf
from gemma_tune.gemma.families import FAMILIES
from tests.hard_texts import hard_texts
from tests.llama.needs import needs_llama
from tests.tiny import make_tiny
from tests.tokenizers import official_backend, protected_encoder, tokenizer_json

pytestmark = [pytest.mark.llama, needs_llama]
ROWS = {"gemma1": 256_000, "gemma2": 256_000, "gemma3_text": 262_144, "gemma3": 262_208}


@pytest.fixture(scope="module", params=sorted(ROWS))
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, LlamaModel]:
    """The generation, and a file of its whole vocabulary without tensors, open in llama.cpp."""
    name = request.param
    folder = tmp_path_factory.mktemp("vocabulary")
    decoder = read_decoder(make_tiny(name, folder / "tiny"), FAMILIES[name])
    with writing(folder / "x.gguf", decoder) as writer:
        add_facts(writer, decoder)
        add_vocabulary(writer, make_vocabulary(tokenizer_json(name), ROWS[name], FAMILIES[name]), FAMILIES[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    with open_gguf(folder / "x.gguf", vocabulary_only=True) as model:
        yield name, model


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_are_the_official_tokenizers(opened: tuple[str, LlamaModel], seed: int) -> None:
    name, model = opened
    texts = hard_texts(seed)
    theirs = official_backend(name)
    official = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    wrong = [text for text, ids in zip(texts, official, strict=True) if model.tokenize(text, control=True) != ids]
    print(f"\n{name}: {len(wrong)} of {len(texts)} hard texts differ from the official tokenizer")
    assert not wrong, ascii(wrong[0])


def test_text_of_users_is_what_training_saw(opened: tuple[str, LlamaModel]) -> None:
    """Without control tokens llama.cpp reads a text as our renderer does: none of them can be written by a user.

    But for `</s>`, an HTML tag in Gemma's vocabulary: llama.cpp takes that spelling for the end of a generation in
    every model (src/llama-vocab.cpp, special_eog_ids), and so for a control token.
    """
    name, model = opened
    texts = [text for text in hard_texts(2) if "</s>" not in text]
    trained = protected_encoder(name).encode(texts)
    wrong = [text for text, ids in zip(texts, trained, strict=True) if model.tokenize(text, control=False) != ids]
    print(f"\n{name}: {len(wrong)} of {len(texts)} hard texts differ from what training saw")
    assert not wrong, ascii(wrong[0])


def test_what_is_printed_is_the_text(opened: tuple[str, LlamaModel]) -> None:
    name, model = opened
    wrong = [
        text
        for text in hard_texts(3)
        if text.isprintable() and model.detokenize(model.tokenize(text, control=False)) != text
    ]
    assert not wrong, f"{name}: {len(wrong)}, e.g. {wrong[0]!a}"


def test_stops(opened: tuple[str, LlamaModel]) -> None:
    name, model = opened
    family = FAMILIES[name]
    assert all(model.stops_at(token) for token in family.stop_ids)
    assert not any(model.stops_at(token) for token in (family.bos_id, family.turn_start_id, 500, 1000))
    assert model.stops_at(model.tokenize("</s>", control=True)[0]), "mended in llama.cpp: see the test above"
    assert model.rows == ROWS[name]


def test_the_tokenizer_of_a_run(real_270m: Path, tmp_path: Path) -> None:
    """What the quick start saves, against Google's own file, in llama.cpp."""
    family = FAMILIES["gemma3_text"]
    document = json.loads((real_270m / "tokenizer.json").read_text(encoding="utf-8"))
    decoder = read_decoder(real_270m, family)
    with writing(tmp_path / "x.gguf", decoder) as writer:
        add_facts(writer, decoder)
        add_vocabulary(writer, make_vocabulary(document, decoder.rows, family), family)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    theirs = official_backend("gemma3_text")
    texts = hard_texts(4)
    with open_gguf(tmp_path / "x.gguf", vocabulary_only=True) as model:
        found = [model.tokenize(text, control=True) for text in texts]
    assert found == [theirs.encode(text, add_special_tokens=False).ids for text in texts]
