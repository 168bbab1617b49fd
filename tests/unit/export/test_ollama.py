"""The Modelfile: a TEMPLATE that renders what was trained, shown by the engine that Ollama uses."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import UserError
from gemma_tune.export.ollama import modelfile, stop_texts, template, write_modelfile
from gemma_tune.gemma.conversation import Conversation, Message, as_messages
from gemma_tune.gemma.families import FAMILIES, Family
from tests.conversations import random_text
from tests.ollama_engine import GOLDEN, NAMES, conversations, digest, prompt_text, rendered_by_go

G1, G3, G4 = FAMILIES["gemma1"], FAMILIES["gemma3_text"], FAMILIES["gemma4"]
AGAIN = "render the golden files again where Go is installed: python -m tests.ollama_engine"


def golden(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return document


# --- the TEMPLATE


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_template_is_golden(family: Family) -> None:
    """What Go rendered is what we write today, for every generation."""
    assert digest(template(family)) in {golden(name)["template_sha256"] for name in NAMES}, AGAIN


@pytest.mark.parametrize("name", NAMES)
def test_what_go_rendered_is_what_the_model_was_trained_on(name: str) -> None:
    document, asked = golden(name), conversations()
    assert document["template_sha256"] == digest(template(FAMILIES[name])), AGAIN
    assert [case["messages"] for case in document["cases"]] == [as_messages(one) for one in asked], AGAIN
    assert len(asked) > 60
    for conversation, case in zip(asked, document["cases"], strict=True):
        assert case["rendered"] == prompt_text(conversation, FAMILIES[name])


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3"])
def test_other_generations_with_that_template_were_trained_on_the_same_text(name: str) -> None:
    for conversation in conversations():
        assert prompt_text(conversation, FAMILIES[name]) == prompt_text(conversation, G3)


@pytest.mark.parametrize("name", ["gemma1", "gemma3", "gemma4"])
def test_the_engine_itself_on_random_conversations(name: str) -> None:
    rng, family = random.Random(20260821), FAMILIES[name]
    asked: list[Conversation] = []
    for _ in range(200):
        opening = (Message("system", random_text(rng)),) if rng.random() < 0.4 else ()
        turns = [Message("model" if n % 2 else "user", random_text(rng)) for n in range(rng.randint(1, 7))]
        asked.append(Conversation((*opening, *turns)))
    for conversation, rendered in zip(asked, rendered_by_go(template(family), asked), strict=True):
        assert rendered == prompt_text(conversation, family)


def test_what_ollama_may_ask_beyond_our_renderer() -> None:
    """Turns that our renderer refuses: late system texts are said once, a tool's answer is left out."""
    asked = [
        Conversation((Message("system", "A"), Message("user", "x"), Message("system", "B"), Message("user", "y"))),
        Conversation((Message("user", "x"), Message("tool", "42"), Message("user", "y"))),
    ]
    late, tool = rendered_by_go(template(G3), asked)
    turn, opening = "<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n"
    assert late == turn.format("A\n\nB\n\nx") + turn.format("y") + opening
    assert tool == turn.format("x") + turn.format("y") + opening


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_no_template_holds_a_bos(family: Family) -> None:
    """Ollama's server adds it; with another one in the text the model would read two."""
    assert "<bos>" not in template(family)


# --- the Modelfile


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(instruction, value) as Ollama's parser reads them: a value ends with its line, or with its third quote.

    It drops what Go does not call printable, apart from blanks and line ends inside quotes.
    """
    assert all(character.isprintable() or character in "\n\t\r" for character in text)
    found, rest = [], re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    while rest:
        word, _, rest = rest.partition(" ")
        if rest.startswith('"""'):
            value, _, rest = rest[3:].partition('"""\n')
        else:
            value, _, rest = rest.partition("\n")
        found.append((word, value))
    return found


def test_a_modelfile_for_gemma_3() -> None:
    text = modelfile("model-q8_0.gguf", G3, licence="Terms are at example.org.\nRead them.", system='Be "brief".\n')
    assert read_modelfile(text) == [
        ("FROM", "./model-q8_0.gguf"),
        ("TEMPLATE", template(G3)),
        ("PARAMETER", 'stop "<end_of_turn>"'),
        ("PARAMETER", 'stop "<start_of_turn>"'),
        ("PARAMETER", "temperature 1"),
        ("PARAMETER", "top_k 64"),
        ("PARAMETER", "top_p 0.95"),
        ("SYSTEM", 'Be "brief".\n'),
        ("LICENSE", "Terms are at example.org.\nRead them."),
    ]


def test_a_modelfile_with_an_adapter_and_sampling_of_its_own() -> None:
    text = modelfile("base.gguf", G1, lora_name="adapter.gguf", licence="x", sampling={"temperature": 0.25})
    values = read_modelfile(text)
    assert values[:2] == [("FROM", "./base.gguf"), ("ADAPTER", "./adapter.gguf")]
    assert ("PARAMETER", "temperature 0.25") in values
    # Nothing is published for Gemma 1 and 2, so nothing is written.
    named = {value.split()[0] for word, value in read_modelfile(modelfile("a.gguf", G1, licence="x"))[1:]}
    assert not named & {"temperature", "top_k", "top_p", "num_ctx", "repeat_penalty"}


@pytest.mark.parametrize(("thinking", "parser"), [(False, "gemma4-no-thinking"), (True, "gemma4")])
def test_gemma_4_names_the_renderer_that_opens_answers_as_trained(thinking: bool, parser: str) -> None:
    values = dict(read_modelfile(modelfile("a.gguf", G4, licence="x", thinking=thinking)))
    assert values["RENDERER"] == "gemma4-small"
    assert values["PARSER"] == parser
    assert values["TEMPLATE"] == template(G4)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_id_that_ends_an_answer_has_its_spelling(family: Family) -> None:
    ids = {family.tokens.get(text) for text in stop_texts(family)}
    assert ids == set(family.stop_ids) - {family.eos_id} | {family.turn_start_id}


@pytest.mark.parametrize(
    "text",
    ['end it """ here', "a no-break\xa0space", "👩\u200d👩\u200d👧", "\x1b[31m"],
    ids=["quotes", "no-break space", "joiner", "escape"],
)
@pytest.mark.parametrize("where", ["SYSTEM", "LICENSE"])
def test_text_that_ollama_would_read_as_another_is_refused(text: str, where: str) -> None:
    given: dict[str, Any] = {"system": text, "licence": "x"} if where == "SYSTEM" else {"licence": text}
    with pytest.raises(UserError) as caught:
        modelfile("a.gguf", G3, **given)
    assert caught.value.problems[0].where == where


@pytest.mark.parametrize("name", ["a\nRENDERER x", "../a.gguf", "", "a\u200b.gguf", ' a"'])
def test_file_names_that_a_modelfile_cannot_carry(name: str) -> None:
    with pytest.raises(UserError, match="cannot name"):
        modelfile(name, G3, licence="x")


def test_a_modelfile_names_files_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model\.gguf"):
        write_modelfile(tmp_path, "model.gguf", G3, licence="x")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match=r"no lora\.gguf"):
        write_modelfile(tmp_path, "model.gguf", G3, licence="x", lora_name="lora.gguf")
    written = write_modelfile(tmp_path, "model.gguf", G3, licence="x")
    assert written.name == "Modelfile"
    assert written.read_bytes().decode() == modelfile("model.gguf", G3, licence="x")
