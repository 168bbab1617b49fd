"""The tokenizer is the family's, its template is the official one, and no text reaches a control token."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer, official_template
from tests.tiny import write_tokenizer

GENERATIONS = ["gemma1", "gemma2", "gemma3_text", "gemma3", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        path = write_tokenizer(name, tmp_path / name)
        (path / "config.json").write_text(json.dumps({"model_type": FAMILIES[name].model_types[0]}))
        return path

    return write


@pytest.mark.parametrize("name", GENERATIONS)
def test_ids_and_template_are_the_familys(name: str, folder: Callable[[str], Path]) -> None:
    family = FAMILIES[name]
    tokenizer = load_tokenizer(str(folder(name)), None, family)
    assert tokenizer.pad_token_id == family.pad_id != tokenizer.eos_token_id
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids.count(family.bos_id) == 1
    assert ids.count(family.turn_start_id) == ids.count(family.turn_end_id) == 2


@pytest.mark.parametrize("name", ["gemma1", "gemma3_text", "gemma4"])
def test_no_text_becomes_a_control_token(name: str, folder: Callable[[str], Path]) -> None:
    family = FAMILIES[name]
    tokenizer = load_tokenizer(str(folder(name)), None, family)
    encoder = GemmaEncoder(tokenizer, family)
    spellings = [token for token, number in tokenizer.get_vocab().items() if number in family.control_ids]
    assert len(spellings) > 100
    rng = random.Random(0)
    parts = [*spellings, " ", "\n", "   ", "é", "🙂", "<", "|>", "Hello", "\x00", "\ud800"]
    texts = [*spellings, *("".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(2000))]
    reached = {number for ids in encoder.encode(texts) for number in ids} & family.control_ids
    assert not reached
    # The same tokenizer without this encoder does reach them: the test can fail.
    assert set(tokenizer("".join(spellings))["input_ids"]) & family.control_ids


def test_encoder_keeps_plain_text_as_the_tokenizer_reads_it(folder: Callable[[str], Path]) -> None:
    family = FAMILIES["gemma3_text"]
    tokenizer = load_tokenizer(str(folder("gemma3_text")), None, family)
    texts = ["", "Hello, how are you?", "a\n\n\nb", "   x", "\t日本 🙂"]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert GemmaEncoder(tokenizer, family).encode(texts) == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


def test_encoder_replaces_what_utf8_cannot_hold(folder: Callable[[str], Path]) -> None:
    family = FAMILIES["gemma3_text"]
    tokenizer = load_tokenizer(str(folder("gemma3_text")), None, family)
    lone, emoji = GemmaEncoder(tokenizer, family).encode(["a\ud800b", "🙂"])
    assert tokenizer.decode(lone) == "a\ufffdb"
    assert tokenizer.decode(emoji) == "🙂"


def test_pad_equal_to_eos_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("gemma3_text")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<eos>"}))
    with pytest.raises(UserError, match="pads with its end token") as error:
        load_tokenizer(str(path), None, FAMILIES["gemma3_text"])
    assert "<pad>" in str(error.value)


def test_a_tokenizer_of_another_generation_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="not Gemma 1's: <start_of_turn> is 105, not 106"):
        load_tokenizer(str(folder("gemma3_text")), None, FAMILIES["gemma1"])


def test_a_folder_without_tokenizer_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("gemma2")
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(path), None, FAMILIES["gemma2"])


def test_another_template_in_trl_is_refused() -> None:
    family = dataclasses.replace(FAMILIES["gemma3"], template_sha256="0" * 64)
    with pytest.raises(AccessError, match="another chat template"):
        official_template(family)
    with pytest.raises(AccessError, match="missing"):
        official_template(dataclasses.replace(family, template_file="gemma9.jinja"))


def test_the_template_is_read_without_importing_trl(tmp_path: Path) -> None:
    code = (
        "import sys; from gemma_tune.gemma.families import FAMILIES;"
        "from gemma_tune.models.tokenizer import official_template;"
        "assert 'raise_exception' in official_template(FAMILIES['gemma3']);"
        "print(sorted({'trl', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "[]"


def test_a_repositorys_own_template_is_replaced(folder: Callable[[str], Path]) -> None:
    path = folder("gemma3_text")
    (path / "chat_template.jinja").write_text("{{ 'something else' }}")
    tokenizer = load_tokenizer(str(path), None, FAMILIES["gemma3_text"])
    assert tokenizer.chat_template == official_template(FAMILIES["gemma3_text"])
