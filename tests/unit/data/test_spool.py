from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.cells import RowError
from gemma_tune.data.spool import Spool, from_json, to_json
from gemma_tune.gemma.conversation import Conversation, Document, Example, Message, Preference, ToolCall

_text = st.text(st.characters(exclude_categories=["Cs"]))
_json: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**40), 2**40), _text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_text, inner, max_size=3)),
    max_leaves=5,
)
_call = st.builds(ToolCall, _text, st.dictionaries(_text, _json, max_size=2), st.one_of(st.none(), _text))
_message = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "model", "tool"]),
    content=_text,
    thinking=st.one_of(st.none(), _text),
    tool_calls=st.lists(_call, max_size=2).map(tuple),
    name=st.one_of(st.none(), _text),
    tool_call_id=st.one_of(st.none(), _text),
    response=_json,
)
_tools = st.lists(st.dictionaries(_text, _json, max_size=2), max_size=2).map(tuple)
_example = st.one_of(
    st.builds(Document, _text),
    st.builds(Conversation, st.lists(_message, min_size=1, max_size=3).map(tuple), _tools, st.booleans()),
    st.builds(
        Preference,
        st.lists(_message, min_size=1, max_size=3).map(tuple),
        _message,
        _message,
        _tools,
        st.booleans(),
        st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
        _text,
    ),
)


@given(example=_example)
def test_an_example_survives(example: Example | Preference) -> None:
    assert from_json(to_json(example)) == example
    assert "\n" not in to_json(example)


@given(examples=st.lists(_example, max_size=4))
def test_read_back_in_any_order(examples: list[Example | Preference]) -> None:
    spool: Spool[Example | Preference] = Spool()
    for example in examples:
        spool.append(example)
    assert len(spool) == len(examples)
    assert [spool[index] for index in reversed(range(len(spool)))] == examples[::-1]
    assert list(spool) == examples
    spool.close()


def test_the_hash_is_of_contents_and_order() -> None:
    def digest(*texts: str) -> str:
        spool = Spool()
        for text in texts:
            spool.append(Document(text))
        return spool.sha256()

    assert digest("a", "b") == digest("a", "b") != digest("b", "a")
    assert digest("ab") != digest("a", "b")


def test_what_is_not_json_is_a_row_error() -> None:
    with pytest.raises(RowError):
        to_json(Conversation((Message("model", "", tool_calls=(ToolCall("f", {"x": object()}),)),)))
