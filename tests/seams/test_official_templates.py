"""The renderer against the official templates and the real tokenizers, token for token."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gemma_tune.gemma.chat import render, render_document, render_many, render_prompt
from gemma_tune.gemma.conversation import Conversation, Document, Message, ToolCall
from gemma_tune.gemma.families import FAMILIES, Family
from tests.conversations import official_form, random_conversation, random_text
from tests.tokenizers import (
    ProtectedEncoder,
    official_backend,
    protected_encoder,
    tokenizer_json,
    without_ordinary_added_tokens,
)

# One for each template; Gemma 2 has Gemma 1's, Gemma 3n has Gemma 3's, and all of Gemma 4 share one.
GENERATIONS = ("gemma1", "gemma3_text", "gemma4_text")
CONVERSATIONS = 2_000
HOSTILE_TEXTS = 20_000


def template_source(family: Family) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / family.template_file).read_text(encoding="utf-8")


@functools.cache
def template(family_name: str) -> Any:
    """The official template, compiled as transformers compiles it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template_source(FAMILIES[family_name]))


def official_text(conversation: Conversation, family_name: str, prompt: bool = False) -> str:
    messages, keywords = official_form(conversation)
    return template(family_name).render(
        messages=messages, bos_token="<bos>", add_generation_prompt=prompt, **{"tools": None, **keywords}
    )


def official_ids(texts: list[str], family_name: str) -> list[list[int]]:
    return [encoding.ids for encoding in official_backend(family_name).encode_batch(texts, add_special_tokens=False)]


@functools.cache
def sample(family_name: str) -> list[Conversation]:
    rng = random.Random(f"official {family_name}")
    return [random_conversation(rng, FAMILIES[family_name]) for _ in range(CONVERSATIONS)]


def test_templates_are_the_ones_that_the_families_are_pinned_to() -> None:
    for family in FAMILIES.values():
        found = hashlib.sha256(template_source(family).encode()).hexdigest()
        assert found == family.template_sha256, f"{family.name}: {family.template_file} has changed to {found}"


@pytest.mark.parametrize("name", GENERATIONS)
def test_compiled_template_is_what_a_tokenizer_of_transformers_does(name: str) -> None:
    """The bulk comparison goes round the tokenizer class for speed; here both are the same."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=official_backend(name), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = template_source(FAMILIES[name])
    for conversation in sample(name)[:25]:
        messages, keywords = official_form(conversation)
        for prompt in (False, True):
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=True, return_dict=False, **keywords
            )
            assert ids == official_ids([official_text(conversation, name, prompt)], name)[0]


@pytest.mark.parametrize("name", GENERATIONS)
def test_conversations_equal_the_official_template(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)
    expected = official_ids([official_text(conversation, name) for conversation in sample(name)], name)
    for conversation, rendered, ids in zip(
        sample(name), render_many(sample(name), family, encoder), expected, strict=True
    ):
        assert rendered.ids == ids, conversation
        assert rendered.ids.count(family.bos_id) == 1


@pytest.mark.parametrize("name", GENERATIONS)
def test_prompts_equal_the_official_template(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)
    conversations = sample(name)[:500]
    expected = official_ids([official_text(conversation, name, prompt=True) for conversation in conversations], name)
    for conversation, ids in zip(conversations, expected, strict=True):
        assert render_prompt(conversation, family, encoder) == ids, conversation


def test_pieces_split_where_the_tokens_do_even_without_newline_tokens() -> None:
    """The newline after a header is an added token in the tokenizers that we have. Nothing rests on that."""
    name = "gemma4_text"
    family = FAMILIES[name]
    document = without_ordinary_added_tokens(tokenizer_json(name), family)
    official = Tokenizer.from_str(json.dumps(document))
    encoder = ProtectedEncoder(document, family.control_ids)
    conversations = sample(name)[:1000]
    texts = [official_text(conversation, name) for conversation in conversations]
    expected = [encoding.ids for encoding in official.encode_batch(texts, add_special_tokens=False)]
    assert [rendered.ids for rendered in render_many(conversations, family, encoder)] == expected


@pytest.mark.parametrize("name", GENERATIONS)
def test_trained_tokens_are_the_model_turns_with_their_stop(name: str) -> None:
    """Decoded, the trained stretches are what stands in the official text between a model header and its end."""
    family, encoder, backend = FAMILIES[name], protected_encoder(name), official_backend(name)
    conversations = sample(name)
    for conversation, rendered in zip(conversations, render_many(conversations, family, encoder), strict=True):
        stretches = _stretches(rendered.ids, rendered.trained)
        found = [backend.decode(stretch, skip_special_tokens=False) for stretch in stretches]
        assert found == _model_spans(official_text(conversation, name), family), conversation
        assert [end for end in rendered.turns if not rendered.trained[end - 1]] == []
        assert all(rendered.ids[end - 1] in family.stop_ids for end in rendered.turns)
        assert len(rendered.turns) == sum(
            token in family.stop_ids and flag for token, flag in zip(rendered.ids, rendered.trained, strict=True)
        )


def _stretches(ids: list[int], trained: list[int]) -> list[list[int]]:
    stretches: list[list[int]] = []
    for index, (token, flag) in enumerate(zip(ids, trained, strict=True)):
        if flag and index and trained[index - 1]:
            stretches[-1].append(token)
        elif flag:
            stretches.append([token])
    return stretches


def _model_spans(text: str, family: Family) -> list[str]:
    """An own reading of the official text: what the model has emitted in it, by looking at the markers alone."""
    spans = []
    for turn in text.split(f"{family.turn_start}model\n")[1:]:
        turn = turn.split(family.turn_start)[0]  # a turn that ends with an unanswered call has no turn end
        turn = turn[: turn.index(family.turn_end) + len(family.turn_end)] if family.turn_end in turn else turn
        # Tool responses are not the model's, but the token that opens the first one is.
        *before, rest = _RESPONSES.split(turn)
        spans += [*(part + "<|tool_response>" for part in before), rest]
    return [span for span in spans if span]


_RESPONSES = re.compile(r"(?:<\|tool_response>response:.*?<tool_response\|>)+", re.DOTALL)


@pytest.mark.parametrize("name", GENERATIONS)
def test_a_prompt_is_a_prefix_of_prompt_and_response(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)
    tried = 0
    for conversation in sample(name):
        if [message.role for message in conversation.messages[-2:]] != ["user", "model"]:
            continue
        asked = Conversation(conversation.messages[:-1], conversation.tools, conversation.thinking)
        prompt, whole = render_prompt(asked, family, encoder), render(conversation, family, encoder)
        assert whole.ids[: len(prompt)] == prompt
        last = render(conversation, family, encoder, "last_model_turn")
        assert last.trained[: len(prompt)] == [0] * len(prompt)
        assert last.trained[len(prompt)] == 1
        tried += 1
    assert tried > 200


# fmt: off
HOSTILE = [
    "<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>model\n",
    "<end_of_turn>\n", "[multimodal]", "<unused0>", "<unused1>", "<unused41>", "<unused98>", "<unused99>",
    "<unused2976>", "<unused6241>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<2mass>",
    "[@BOS@]", "<|turn>", "<turn|>", "<|turn>model\n", "<|think|>", "<|channel>", "<channel|>", "<|tool>",
    "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|image>",
    "<|image|>", "<|audio|>", "<audio|>", "<|video|>", "<start_of_", "<unused", "<", ">", "|", "<|", "|>",
    "_of_turn>", "<|tu", "rn>", "▁<bos>", "▁", "[multi", "modal]",
]
# fmt: on


def hostile_text(rng: random.Random) -> str:
    """Control spellings, whole and broken, glued to each other and to ordinary text."""
    parts = [rng.choice(HOSTILE) if rng.random() < 0.7 else random_text(rng, 2) for _ in range(rng.randint(1, 6))]
    return rng.choice(("", "", " ", "\n")).join(parts)


@pytest.mark.parametrize("name", GENERATIONS)
def test_no_text_becomes_a_control_token(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)
    rng = random.Random(f"hostile {name}")
    texts = [hostile_text(rng) for _ in range(HOSTILE_TEXTS)]
    harmful = sum(not family.control_ids.isdisjoint(ids) for ids in official_ids(texts[:1000], name))
    assert harmful > 500, "the texts are harmless even without protection, so this test shows nothing"
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        assert family.control_ids.isdisjoint(ids), repr(text)
        # Nothing is lost either, but that Gemma writes a blank as "▁" and so cannot tell the two apart.
        assert official_backend(name).decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


@pytest.mark.parametrize("name", ["gemma1", "gemma4_text"])
def test_the_encoder_of_the_product_is_as_safe_and_the_same(name: str, tmp_path: Path) -> None:
    """Loaded from a folder as a checkpoint has it. The class that Gemma's repositories name rebuilds the backend."""
    from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer

    family = FAMILIES[name]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(name)), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.model_types[0]}), encoding="utf-8")
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}), encoding="utf-8")
    encoder = GemmaEncoder(load_tokenizer(str(tmp_path), None, family), family)
    rng = random.Random(f"product {name}")
    texts = [hostile_text(rng) for _ in range(HOSTILE_TEXTS)] + [random_text(rng) for _ in range(2000)]
    for text, ids, expected in zip(texts, encoder.encode(texts), protected_encoder(name).encode(texts), strict=True):
        assert family.control_ids.isdisjoint(ids), repr(text)
        assert ids == expected, repr(text)


@pytest.mark.parametrize("name", GENERATIONS)
def test_smuggled_control_tokens_do_not_change_the_structure(name: str) -> None:
    """A conversation of hostile texts has exactly the control tokens of the same conversation of harmless ones."""
    family, encoder = FAMILIES[name], protected_encoder(name)
    rng = random.Random(f"smuggled {name}")
    for _ in range(200):
        roles = ["user", "model", "user", "model"]
        hostile = Conversation(tuple(Message(role, "x" + hostile_text(rng)) for role in roles))  # type: ignore[arg-type]
        harmless = Conversation(tuple(Message(role, "x") for role in roles))  # type: ignore[arg-type]
        control = [
            [token for token in render(conversation, family, encoder).ids if token in family.control_ids]
            for conversation in (hostile, harmless)
        ]
        assert control[0] == control[1]


def test_every_control_token_of_the_real_tokenizers_is_known() -> None:
    """Added tokens that are neither blanks nor HTML are control tokens, and the families list them all."""
    html = {f"{slash}{tag}" for slash in ("", "/") for tag in _HTML}
    for name in GENERATIONS:
        for token in tokenizer_json(name)["added_tokens"]:
            text = token["content"]
            ordinary = not text.strip("\n\t▁") or text.strip("<>") in html
            assert ordinary != (token["id"] in FAMILIES[name].control_ids), (name, token)
        for text, token_id in FAMILIES[name].tokens.items():
            assert tokenizer_json(name)["model"]["vocab"][text] == token_id


# fmt: off
_HTML = [
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6",
    "blockquote", "strong", "em", "b", "i", "u", "s", "sub", "sup", "code", "a", "html", "body", "img", "span",
    "bbox", "ul", "li", "div", "iframe", "footer",
]
# fmt: on

_texts = st.text(max_size=40)
_anything = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def _spells_control(texts: list[str], name: str) -> bool:
    """Whether the official tokenizer itself would read a control token out of the text; there we mean to differ."""
    return any(not FAMILIES[name].control_ids.isdisjoint(ids) for ids in official_ids(texts, name))


@pytest.mark.parametrize("name", GENERATIONS)
def test_any_unicode_equals_the_official_template(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)

    @_anything
    @given(st.lists(_texts, min_size=1, max_size=5), _texts if family.template_accepts_system else st.none())
    def check(texts: list[str], system: str | None) -> None:
        if _spells_control(texts, name):
            return
        messages = [Message("model" if index % 2 else "user", text) for index, text in enumerate(texts)]
        if system is not None:
            messages.insert(0, Message("system", system))
        conversation = Conversation(tuple(messages))
        assert render(conversation, family, encoder).ids == official_ids([official_text(conversation, name)], name)[0]

    check()


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_object = st.dictionaries(_texts, _json, max_size=3)


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *_strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def test_any_unicode_in_thinking_and_tools_equals_the_official_template() -> None:
    name = "gemma4_text"
    family, encoder = FAMILIES[name], protected_encoder(name)

    @_anything
    @given(_texts, _texts, _texts, _object, _object)
    def check(thinking: str, content: str, description: str, arguments: dict[str, Any], answer: dict[str, Any]) -> None:
        if _spells_control([thinking, content, description, *_strings(arguments), *_strings(answer)], name):
            return
        tool = {
            "type": "function",
            "function": {
                "name": "f",
                "description": description,
                "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": content}}},
            },
        }
        conversation = Conversation(
            (
                Message("user", content),
                Message("model", "", thinking=thinking, tool_calls=(ToolCall("f", arguments, "1"),)),
                Message("tool", "", name="f", tool_call_id="1", response=answer),
                Message("model", content, thinking=thinking),
            ),
            tools=(tool,),
        )
        assert render(conversation, family, encoder).ids == official_ids([official_text(conversation, name)], name)[0]

    check()


@pytest.mark.parametrize("name", GENERATIONS)
def test_documents_are_one_bos_the_text_and_one_eos(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)
    rng = random.Random(0)
    for _ in range(100):
        text = random_text(rng)
        rendered = render_document(Document(text), family, encoder)
        assert rendered.ids == [family.bos_id, *official_ids([text], name)[0], family.eos_id]
        assert rendered.trained == [0] + [1] * (len(rendered.ids) - 1)
        assert rendered.turns == [len(rendered.ids)]


def test_the_random_conversations_have_everything_in_them() -> None:
    texts = [official_text(conversation, "gemma4_text") for conversation in sample("gemma4_text")]
    for part, least in {
        "<|turn>system\n": 800,
        "<|think|>": 500,
        "<|channel>thought\n": 500,
        "<|tool>declaration:": 800,
        "<|tool_call>call:": 500,
        "<|tool_response>response:": 300,
        "<tool_response|><|tool_response>": 100,
        "<tool_call|><|tool_call>": 100,
        "{value:": 100,
        "required:[": 200,
        "items:{": 200,
        "nullable:true": 200,
        "enum:[": 50,
        "properties:{": 500,
    }.items():
        found = sum(part in text for text in texts)
        assert found >= least, (part, found)
    assert sum(text.endswith("<|tool_response>") for text in texts) > 50, "calls that hand over"
    assert sum(text.endswith("<tool_response|>") for text in texts) > 50, "tools that have just answered"
    for name in ("gemma1", "gemma3_text"):
        assert {len(conversation.messages) for conversation in sample(name)} >= set(range(1, 8))
