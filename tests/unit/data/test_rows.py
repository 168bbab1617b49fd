from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.cells import RowError
from gemma_tune.data.rows import SHAPES, detect_format, normalise
from gemma_tune.gemma.conversation import Conversation, Document, Message, ToolCall

USER, MODEL = Message("user", "q"), Message("model", "a")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, (USER, MODEL)),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}]}, (USER, MODEL)),
        (
            {"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "q"}]},
            (Message("system", "s"), USER),
        ),
        ({"prompt": "q", "completion": "a"}, (USER, MODEL)),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            (USER, MODEL),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, (USER, MODEL)),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, (USER, MODEL)),
        (
            {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
            (Message("system", "s"), USER),
        ),
        ({"instruction": "q", "input": "", "output": "a"}, (USER, MODEL)),
        ({"instruction": "q", "input": None, "output": "a"}, (USER, MODEL)),
        ({"instruction": "q", "input": "x", "output": "a"}, (Message("user", "q\n\nx"), MODEL)),
        (
            {"instruction": "r", "output": "b", "history": [["q", "a"]]},
            (USER, MODEL, Message("user", "r"), Message("model", "b")),
        ),
        ({"id": "0", "data": ["q", "a", "q", "a"]}, (USER, MODEL, USER, MODEL)),
        ({"prompt": "p", "prompt_id": "0", "messages": [{"role": "user", "content": "q"}]}, (USER,)),
        # SlimOrca: the weights say which turns are trained, and a user's is not.
        (
            {
                "conversations": [
                    {"from": "system", "value": "s", "weight": None},
                    {"from": "human", "value": "q", "weight": 0.0},
                    {"from": "gpt", "value": "a", "weight": 1.0},
                ]
            },
            (Message("system", "s"), USER, MODEL),
        ),
        # Capybara
        (
            {"source": "x", "conversation": [{"input": "q", "output": "a"}, {"input": "q", "output": "a"}]},
            (USER, MODEL, USER, MODEL),
        ),
        # Sets that were joined: the columns of both, of which a row fills its own.
        ({"messages": None, "text": None, "instruction": "q", "input": None, "output": "a"}, (USER, MODEL)),
    ],
)
def test_shapes_by_their_columns(row: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert normalise(row) == Conversation(expected)


def test_text_is_a_document_as_it_is() -> None:
    assert normalise({"text": " a\n"}) == Document(" a\n")


def test_every_turn_of_a_string_list_is_kept() -> None:
    texts = [f"turn {index}" for index in range(11)]
    found = normalise({"id": "1", "data": texts})
    assert isinstance(found, Conversation)
    assert [message.content for message in found.messages] == texts
    assert [message.role for message in found.messages] == ["user", "model"] * 5 + ["user"]


@pytest.mark.parametrize(
    ("quote", "author", "answer"),
    [
        (
            "“Be yourself; everyone else is taken.”",
            "Oscar Wilde",
            "Quote: Be yourself; everyone else is taken.\nAuthor: Oscar Wilde",
        ),
        ('"Plain marks."', "A. B.,", "Quote: Plain marks.\nAuthor: A. B."),
        ("“She said ‘no’ and meant it.”", "C, The Book", "Quote: She said ‘no’ and meant it.\nAuthor: C"),
        ("“Be,” he said, “quiet.”", "D", "Quote: “Be,” he said, “quiet.”\nAuthor: D"),
        ("“Cut at the end", "E", "Quote: Cut at the end\nAuthor: E"),
        ("Cut at the start”", "F", "Quote: Cut at the start\nAuthor: F"),
        ("No marks", "Martin Luther King, Jr., A Book", "Quote: No marks\nAuthor: Martin Luther King, Jr."),
        ("No author", " , ", "Quote: No author\nAuthor: Unknown"),
    ],
)
def test_quotes_lose_their_dirt(quote: str, author: str, answer: str) -> None:
    found = normalise({"quote": quote, "author": author, "tags": []})
    assert isinstance(found, Conversation)
    assert found.messages[1] == Message("model", answer)


@pytest.mark.parametrize(
    ("quote", "beginning"),
    [
        ("Imagination is more important than knowledge.", "Imagination is more"),
        ("One two three four five six seven eight nine ten", "One two three four"),
        ("Two words", "Two"),
        ("Word", "Word"),
    ],
)
def test_a_quote_is_asked_for_by_at_most_its_first_half(quote: str, beginning: str) -> None:
    found = normalise({"quote": quote, "author": "X"})
    assert isinstance(found, Conversation)
    assert found.messages[0] == Message("user", f"Quote: {beginning}")


def test_tool_calls_reasoning_and_tools() -> None:
    schema = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "enum": None}}}
    row = {
        "messages": [
            {"role": "user", "content": "time?", "tool_calls": None, "name": None},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "look it up",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "utc"}'}},
                    {"id": "2", "function": {"name": "now", "arguments": {"zone": "cet", "filled by Arrow": None}}},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": {"hour": 8}},
            {"role": "tool", "tool_call_id": "2", "name": "now", "content": "nine"},
        ],
        "tools": [schema],
        "enable_thinking": True,
    }
    found = normalise(row)
    assert isinstance(found, Conversation)
    _, model, first, second = found.messages
    assert model.thinking == "look it up" and model.content == ""
    assert model.tool_calls == (ToolCall("now", {"zone": "utc"}, "1"), ToolCall("now", {"zone": "cet"}, "2"))
    assert first.response == {"hour": 8} and json.loads(first.content) == {"hour": 8}
    assert (second.content, second.name, second.response) == ("nine", "now", None)
    assert found.tools == ({"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},)
    assert found.thinking


def test_nulls_of_arrow_go_at_every_depth_and_nulls_of_json_text_stay() -> None:
    calls = [
        {"function": {"name": "f", "arguments": {"a": {"b": 1, "of another row": None}, "c": [{"d": None, "e": 2}]}}},
        {"function": {"name": "f", "arguments": '{"a": {"b": null}}'}},
    ]
    found = normalise({"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]})
    assert isinstance(found, Conversation)
    (message,) = found.messages
    assert [call.arguments for call in message.tool_calls] == [{"a": {"b": 1}, "c": [{"e": 2}]}, {"a": {"b": None}}]


def test_the_first_form_of_openai_calls() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q", "function_call": None},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"role": "function", "name": "f", "content": "2", "function_call": {"name": None, "arguments": None}},
        ]
    }
    assert normalise(row) == Conversation(
        (USER, Message("model", "", tool_calls=(ToolCall("f", {"x": 1}),)), Message("tool", "2", name="f"))
    )


def test_sharegpt_calls() -> None:
    one, two = {"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}
    for value, expected in ((one, ("f",)), ([one, two], ("f", "g"))):
        found = normalise({"conversations": [{"from": "function_call", "value": json.dumps(value)}]})
        assert isinstance(found, Conversation)
        assert tuple(call.name for call in found.messages[0].tool_calls) == expected


def test_reasoning_under_any_of_its_names() -> None:
    message = {"role": "assistant", "content": "a", "reasoning": "", "reasoning_content": "r", "thinking": None}
    assert normalise({"messages": [message]}) == Conversation((Message("model", "a", thinking="r"),))


def test_tools_may_be_json_text() -> None:
    found = normalise({"messages": [{"role": "user", "content": "q"}], "tools": '[{"name": "f"}]'})
    assert isinstance(found, Conversation)
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)


def test_text_blocks_are_joined_as_the_official_templates_do() -> None:
    blocks = [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]
    assert normalise({"messages": [{"role": "user", "content": blocks}]}) == Conversation((Message("user", "ab"),))
    # gemma4_v5.jinja joins those of a tool's answer as they are.
    assert normalise({"messages": [{"role": "tool", "content": blocks}]}) == Conversation((Message("tool", " a b"),))


def _message(**message: Any) -> dict[str, Any]:
    return {"messages": [message]}


@pytest.mark.parametrize(
    ("row", "what", "fix"),
    [
        (3, "the row is a number (3), not an object", ""),
        (None, "the row is null", ""),
        ([1], "the row is a list", ""),
        ({"messages": None}, "messages is null, not a list", ""),
        ({"messages": "hello"}, "messages is text ('hello'), not a list", ""),
        ({"messages": []}, "messages is an empty list", ""),
        ({"messages": ["hi"]}, "messages[0] is text ('hi'), not an object", ""),
        (_message(content="x"), "messages[0] has no 'role'", ""),
        (_message(role="user"), "messages[0] has no 'content'", ""),
        (_message(role="user", content=None), "messages[0].content is null", ""),
        (_message(role="user", content=7), "messages[0].content is a number (7), not text", ""),
        (_message(role="user", content=True), "messages[0].content is true or false", ""),
        (
            _message(role="user", content=[{"type": "image"}]),
            "messages[0].content[0] is a block of type 'image'",
            "remove the block",
        ),
        (_message(role="user", content=["x"]), "messages[0].content[0] is text ('x'), not a content block", ""),
        (_message(role="assitant", content="x"), "unknown role 'assitant'", "did you mean 'assistant'?"),
        (_message(role="User", content="x"), "unknown role 'User'", "did you mean 'user'?"),
        (_message(role="gpt", content="x"), "unknown role 'gpt'", "set data.sources.format: sharegpt"),
        (_message(role=1, content="x"), "messages[0].role is a number (1), not a role", ""),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "has 'from' and no 'role'",
            "set data.sources.format: sharegpt",
        ),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from unknown role 'alien'", "rename"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] has no 'value'", ""),
        (_message(role="user", content="a\ud800"), "messages[0].content holds a lone surrogate (U+D800)", "drop"),
        (_message(role="assistant", content="x", weight=0), "not to be trained", "remove the mark"),
        (_message(role="assistant", content="x", train=False), "not to be trained", "remove the mark"),
        (_message(role="assistant", content="x", tool_responses=[1]), "'tool_responses'", "role 'tool'"),
        (
            _message(role="assistant", content="x", tool_calls=[{"function": {"name": "f", "arguments": "{"}}]),
            "is not JSON",
            "",
        ),
        (
            _message(role="assistant", content="x", tool_calls=[{"function": {"name": "f", "arguments": "3"}}]),
            "not a JSON object",
            "",
        ),
        (_message(role="assistant", content="x", tool_calls=[{"function": {}}]), "has no function name", ""),
        ({"prompt": None, "completion": "a"}, "prompt is null", ""),
        ({"prompt": "q", "completion": 3}, "completion is a number (3), not a list", ""),
        ({"instruction": "q", "output": None}, "output is null", ""),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "history[0] has 1 items", ""),
        ({"data": ["q", None]}, "data[1] is null", ""),
        ({"data": "q"}, "data is text ('q'), not a list", ""),
        ({"data": []}, "data is an empty list", ""),
        ({"text": None}, "text is null", ""),
        ({"text": "  \n"}, "text is empty", ""),
        ({"quote": "“”", "author": "x"}, "quote is empty", ""),
        ({"quote": "x", "author": None}, "author is null", ""),
        (
            {"question": "q", "answer": "a"},
            "the columns 'question', 'answer' fit no known shape",
            "{prompt: question, completion: answer}",
        ),
        ({"message": []}, "fit no known shape", "{messages: message}"),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "x"},
            "fit no known shape",
            "{output: response, input: context}",
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},
            "fit no known shape",
            "{prompt: question, completion: response, system: system_prompt}",
        ),
        ({"conversation": [{"role": "user", "content": "q"}]}, "has no 'input'", "{messages: conversation}"),
        ({"messages": [{"role": "user", "content": "q"}], "tools": [3]}, "tools[0] is a number", ""),
        ({"messages": [{"role": "user", "content": "q"}], "enable_thinking": "yes"}, "not true or false", ""),
    ],
)
def test_a_bad_row_says_what_and_where(row: Any, what: str, fix: str) -> None:
    with pytest.raises(RowError) as caught:
        normalise(row)
    assert what in str(caught.value)
    assert fix in caught.value.fix


def test_forced_format_and_renames() -> None:
    assert normalise({"text": "x", "q": "q", "a": "a"}, "prompt_completion", {"prompt": "q", "completion": "a"}) == (
        Conversation((USER, MODEL))
    )
    with pytest.raises(RowError, match="no column 'messages'; columns found: 'msgs'") as caught:
        normalise({"msgs": []}, "messages")
    assert "{messages: msgs}" in caught.value.fix
    with pytest.raises(RowError, match="no column 'dialog'; columns found: 'dialogs'") as caught:
        normalise({"dialogs": []}, "auto", {"messages": "dialog"})
    assert "'dialogs'" in caught.value.fix


def test_detection_needs_all_columns_of_a_shape() -> None:
    assert {name: detect_format(shape.required) for name, shape in SHAPES.items()} == {name: name for name in SHAPES}


_keys = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "quote",
        "author",
        "data",
        "text",
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "tools",
        "system",
        "history",
        "type",
        "thinking",
        "enable_thinking",
    ]
)
_leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["user", "assistant", "human", "gpt", "tool", "text", "\ud800", "{}", "function_call"]),
)
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_keys, inner, max_size=5)),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(row=st.one_of(_values, st.dictionaries(_keys, _values, max_size=5)), format=st.sampled_from(["auto", *SHAPES]))
def test_no_row_makes_anything_but_an_example_or_a_row_error(row: Any, format: str) -> None:
    try:
        found = normalise(row, format)
    except RowError as error:
        assert error.reason and error.kind
    else:
        assert isinstance(found, (Conversation, Document))


def test_deep_nesting_is_a_row_error() -> None:
    row: Any = "x"
    for _ in range(100_000):
        row = [row]
    with pytest.raises(RowError):
        normalise({"messages": [{"role": "user", "content": row}]})
    with pytest.raises(RowError):
        normalise({"messages": [{"role": "user", "content": "q"}], "tools": [{"name": "f", "parameters": row}]})
