from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.cells import RowError
from gemma_tune.data.policies import Drop, Policies, Repaired, apply_policies
from gemma_tune.gemma.chat import check_conversation, render
from gemma_tune.gemma.conversation import Conversation, Document, Message, ToolCall
from gemma_tune.gemma.families import FAMILIES, Family
from tests.unit.data.toys import GEMMA1, GEMMA3, GEMMA4, ByteEncoder, decoded

ROLES: Any = {"s": "system", "u": "user", "m": "model", "t": "tool"}


def talk(letters: str) -> Conversation:
    """One letter a turn; its text is the letter and its number."""
    return Conversation(tuple(Message(ROLES[c], f"{c}{i}") for i, c in enumerate(letters, 1)))


def texts(result: Repaired | Drop) -> list[str]:
    assert isinstance(result, Repaired) and isinstance(result.example, Conversation)
    return [message.content for message in result.example.messages]


@pytest.mark.parametrize(
    ("letters", "family", "policies", "expected", "repairs"),
    [
        ("um", GEMMA3, {}, ["u1", "m2"], ()),
        ("umum", GEMMA1, {}, ["u1", "m2", "u3", "m4"], ()),
        ("umu", GEMMA3, {}, ["u1", "m2"], ("trailing user turn removed",)),
        ("umuu", GEMMA4, {}, ["u1", "m2"], ("trailing user turn removed",)),
        ("sum", GEMMA3, {}, ["s1", "u2", "m3"], ("system turn folded into the first user turn",)),
        ("sum", GEMMA1, {"system_role": "fold"}, ["s1", "u2", "m3"], ("system turn folded into the first user turn",)),
        ("sum", GEMMA3, {"system_role": "drop"}, ["u2", "m3"], ("system turn removed",)),
        ("sum", GEMMA4, {"system_role": "drop"}, ["s1", "u2", "m3"], ()),
        ("sum", GEMMA4, {"system_role": "error"}, ["s1", "u2", "m3"], ()),
        ("uumm", GEMMA3, {"fix_roles": "merge"}, ["u1\n\nu2", "m3\n\nm4"], ("turns of one role merged",)),
        ("uumm", GEMMA4, {}, ["u1", "u2", "m3", "m4"], ()),
    ],
)
def test_repairs(
    letters: str, family: Family, policies: dict[str, Any], expected: list[str], repairs: tuple[str, ...]
) -> None:
    result = apply_policies(talk(letters), family, Policies(**policies))
    assert texts(result) == expected
    assert isinstance(result, Repaired) and result.repairs == repairs


def test_a_folded_system_turn_is_rendered_before_the_user_text() -> None:
    for family in (GEMMA1, GEMMA3):
        result = apply_policies(talk("sum"), family, Policies())
        assert isinstance(result, Repaired) and isinstance(result.example, Conversation)
        assert "user\ns1\n\nu2<end_of_turn>" in decoded(render(result.example, family, ByteEncoder()).ids, family)


@pytest.mark.parametrize(
    ("letters", "policies", "reason"),
    [
        ("u", {}, "no model turn"),
        ("su", {}, "no model turn"),
        ("uum", {"fix_roles": "drop"}, "roles do not alternate"),
        ("mum", {"fix_roles": "drop"}, "the model speaks first"),
    ],
)
def test_drops(letters: str, policies: dict[str, Any], reason: str) -> None:
    assert apply_policies(talk(letters), GEMMA3, Policies(**policies)) == Drop(reason)


@pytest.mark.parametrize(
    ("letters", "family", "policies", "what", "fix"),
    [
        (
            "umuum",
            GEMMA3,
            {},
            "turn 4 is 'user' after 'user'; this Gemma wants user and model to alternate",
            "set data.fix_roles: merge, or data.on_bad_row: drop",
        ),
        ("umm", GEMMA1, {}, "turn 3 is 'model' after 'model'", "data.fix_roles: merge"),
        ("suum", GEMMA3, {}, "turn 3 is 'user' after 'user'", "data.fix_roles: merge"),
        ("mum", GEMMA3, {}, "turn 1 is 'model'; this Gemma wants the user to speak first", "data.fix_roles: drop"),
        ("sm", GEMMA3, {"fix_roles": "merge"}, "turn 2 is 'model'; this Gemma wants the user", "data.fix_roles: drop"),
        ("sum", GEMMA3, {"system_role": "error"}, "turn 1 is 'system'", "data.system_role: fold or drop"),
        ("usm", GEMMA3, {}, "turn 2 is 'system'; a system turn can only be the first", "data.on_bad_row: drop"),
        ("ssum", GEMMA4, {}, "turn 2 is 'system'; a system turn can only be the first", "data.on_bad_row: drop"),
        ("umtm", GEMMA3, {}, "turn 3 is a tool turn", "Gemma 4"),
        ("umtm", GEMMA4, {}, "answers a tool call that nobody made", "data.on_bad_row: drop"),
    ],
)
def test_errors_name_the_turn_and_the_key(
    letters: str, family: Family, policies: dict[str, Any], what: str, fix: str
) -> None:
    with pytest.raises(RowError) as caught:
        apply_policies(talk(letters), family, Policies(**policies))
    assert what in caught.value.reason
    assert fix in caught.value.fix


@pytest.mark.parametrize("role", ["user", "model"])
def test_an_empty_turn_stops_or_drops(role: str) -> None:
    turns = [Message("user", "q"), Message("model", "a"), Message("user", "r"), Message("model", "b")]
    index = {"user": 2, "model": 3}[role]
    turns[index] = Message(turns[index].role, " \n\t")
    with pytest.raises(RowError, match=rf"turn {index + 1} \('{role}'\) is empty") as caught:
        apply_policies(Conversation(tuple(turns)), GEMMA3, Policies())
    assert "data.on_empty_turn: drop" in caught.value.fix
    assert apply_policies(Conversation(tuple(turns)), GEMMA3, Policies(on_empty_turn="drop")) == Drop("empty turn")


def test_an_empty_system_turn_means_none() -> None:
    conversation = Conversation((Message("system", " "), *talk("um").messages))
    for family in (GEMMA3, GEMMA4):
        result = apply_policies(conversation, family, Policies(system_role="error"))
        assert texts(result) == ["u1", "m2"]
        assert isinstance(result, Repaired) and result.repairs == ("empty system turn removed",)


def test_reasoning_is_removed_where_there_is_none() -> None:
    conversation = Conversation((Message("user", "q"), Message("model", "a", thinking="hm")), thinking=True)
    result = apply_policies(conversation, GEMMA3, Policies())
    assert result == Repaired(Conversation((Message("user", "q"), Message("model", "a"))), ("reasoning removed",))
    assert apply_policies(conversation, GEMMA4, Policies()) == Repaired(conversation)


def test_tools_need_a_gemma_with_tools() -> None:
    called = Conversation(
        (
            Message("user", "q"),
            Message("model", "", tool_calls=(ToolCall("f", {}, "1"),)),
            Message("tool", "", tool_call_id="1"),
            Message("model", "a"),
        ),
        tools=({"type": "function", "function": {"name": "f", "description": "d"}},),
    )
    assert apply_policies(called, GEMMA4, Policies()) == Repaired(called)
    with pytest.raises(RowError, match="turn 2 calls a tool"):
        apply_policies(called, GEMMA3, Policies())
    declared = Conversation(talk("um").messages, tools=called.tools)
    with pytest.raises(RowError, match="declares tools"):
        apply_policies(declared, GEMMA3, Policies())


def _calls(*calls: tuple[str, str | None]) -> Message:
    return Message("model", "", tool_calls=tuple(ToolCall(name, {}, call_id) for name, call_id in calls))


def _answer(content: str, call_id: str | None = None, name: str | None = None) -> Message:
    return Message("tool", content, tool_call_id=call_id, name=name)


@pytest.mark.parametrize(
    ("turns", "written"),
    [
        # In turn, where neither side says more.
        ([_calls(("f", None), ("g", None)), _answer("1"), _answer("2")], ["f:1", "g:2"]),
        ([_calls(("f", "a"), ("g", "b")), _answer("1"), _answer("2")], ["f:1", "g:2"]),
        ([_calls(("f", "a"), ("g", "b")), _answer("1")], ["f:1"]),
        # By name, then in turn.
        ([_calls(("f", None), ("g", None)), _answer("2", name="g"), _answer("1")], ["g:2", "f:1"]),
        ([_calls(("f", "a"), ("g", "b")), _answer("1", name="g"), _answer("2", name="f")], ["g:1", "f:2"]),
        # An answer that says it comes first.
        ([_calls(("f", "a"), ("g", "b")), _answer("1"), _answer("2", "a")], ["g:1", "f:2"]),
        # An only call with an id: without a pair its answer would be that of an unknown tool.
        ([_calls(("f", "a")), _answer("1")], ["f:1"]),
    ],
)
def test_answers_are_paired_with_their_calls(turns: list[Message], written: list[str]) -> None:
    conversation = Conversation((Message("user", "q"), *turns, Message("model", "a")))
    result = apply_policies(conversation, GEMMA4, Policies())
    assert isinstance(result, Repaired) and isinstance(result.example, Conversation)
    assert result.repairs == ("tool answers paired with their calls",)
    text = decoded(render(result.example, GEMMA4, ByteEncoder()).ids, GEMMA4)
    found = re.findall(r'response:(\w+)\{value:<\|"\|>(\w+)', text)
    assert [f"{name}:{value}" for name, value in found] == written


@pytest.mark.parametrize(
    "turns",
    [
        [_calls(("f", None)), _answer("1")],
        [_calls(("f", "a"), ("g", "b")), _answer("1", "b"), _answer("2", "a")],
        [_calls(("f", "a")), _answer("1", name="other")],
    ],
)
def test_answers_that_say_enough_stay(turns: list[Message]) -> None:
    conversation = Conversation((Message("user", "q"), *turns, Message("model", "a")))
    assert apply_policies(conversation, GEMMA4, Policies()) == Repaired(conversation)


def test_more_answers_than_calls_are_refused() -> None:
    turns = [_calls(("f", None), ("g", None)), _answer("1"), _answer("2"), _answer("3")]
    with pytest.raises(RowError, match="does not say which of 2 tool calls"):
        apply_policies(Conversation((Message("user", "q"), *turns)), GEMMA4, Policies())


def test_reasoning_that_is_not_written_is_counted() -> None:
    thought = Message("model", "a", thinking="t")
    turns = (Message("user", "q"), thought, Message("user", "r"), thought)
    result = apply_policies(Conversation(turns), GEMMA4, Policies())
    assert isinstance(result, Repaired) and result.repairs == ("reasoning of earlier turns left out",)
    assert apply_policies(Conversation(turns[2:]), GEMMA4, Policies()) == Repaired(Conversation(turns[2:]))
    spelled = Message("model", "<|channel>thought\nt<channel|>a")
    result = apply_policies(Conversation((turns[0], spelled)), GEMMA4, Policies())
    assert isinstance(result, Repaired) and result.repairs == ("reasoning inside a text left out",)


def test_an_answer_of_nothing_but_spelled_out_reasoning_is_empty() -> None:
    """It would train the model to end its turn at once."""
    turns = (Message("user", "q"), Message("model", "<|channel>thought\nt<channel|>\n"))
    with pytest.raises(RowError, match=r"turn 2 \('model'\) is empty"):
        apply_policies(Conversation(turns), GEMMA4, Policies())
    assert apply_policies(Conversation(turns), GEMMA4, Policies(on_empty_turn="drop")) == Drop("empty turn")
    assert apply_policies(Conversation(turns), GEMMA3, Policies()) == Repaired(Conversation(turns)), "plain text there"


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": ["city"]},
        {"properties": {"x": {"type": "object", "required": True}}},
        {"properties": {"x": {"type": "array", "items": {"type": 3}}}},
        {"properties": {}, "required": 1},
    ],
)
def test_a_schema_that_is_none_is_a_bad_row(parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(RowError, match=r"tool 1 \('f'\) has parameters that are no JSON schema"):
        apply_policies(Conversation((Message("user", "q"), Message("model", "a")), (tool,)), GEMMA4, Policies())


def test_a_document_passes() -> None:
    assert apply_policies(Document("x"), GEMMA3, Policies()) == Repaired(Document("x"))


@settings(max_examples=400, deadline=None)
@given(
    letters=st.text("sumt", min_size=1, max_size=7),
    empty=st.sets(st.integers(0, 6)),
    family=st.sampled_from(sorted(FAMILIES)),
    policies=st.builds(
        Policies,
        system_role=st.sampled_from(["auto", "fold", "drop", "error"]),
        fix_roles=st.sampled_from(["error", "merge", "drop"]),
        on_empty_turn=st.sampled_from(["error", "drop"]),
    ),
)
def test_what_comes_out_can_be_rendered(letters: str, empty: set[int], family: str, policies: Policies) -> None:
    messages = [
        Message(m.role, "" if i in empty else m.content) for i, m in enumerate(talk(letters).messages)
    ]  # fmt: skip
    try:
        result = apply_policies(Conversation(tuple(messages)), FAMILIES[family], policies)
    except RowError as error:
        assert error.fix
        return
    if isinstance(result, Repaired):
        assert isinstance(result.example, Conversation)
        assert check_conversation(result.example, FAMILIES[family]) is None
        assert any(message.role == "model" for message in result.example.messages)
        changed = result.example.messages != tuple(messages)
        assert not changed or result.repairs, "a change without a name"
