from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gemma_tune.data.cells import RowError
from gemma_tune.data.pair_policies import apply_pair_policies
from gemma_tune.data.policies import Drop, Policies, Repaired
from gemma_tune.gemma.conversation import Message, Preference, ToolCall
from gemma_tune.gemma.families import Family
from tests.unit.data.toys import GEMMA1, GEMMA3, GEMMA4

SYSTEM, Q, A, R = Message("system", "s"), Message("user", "q"), Message("model", "a"), Message("user", "r")
GOOD, BAD = Message("model", "good"), Message("model", "bad")
PAIR = Preference((Q,), GOOD, BAD)


def pair(*prompt: Message, chosen: Message = GOOD, rejected: Message = BAD, **more: Any) -> Preference:
    return Preference(prompt, chosen, rejected, **more)


def applied(
    preference: Preference, family: Family = GEMMA3, margins: bool = False, **policies: Any
) -> Repaired[Preference] | Drop:
    return apply_pair_policies(preference, family, Policies(**policies), margins=margins)


@pytest.mark.parametrize("family", [GEMMA1, GEMMA3, GEMMA4])
def test_a_good_pair_stays_as_it_is(family: Family) -> None:
    for good in (PAIR, pair(Q, A, R, margin=0.5, group="g")):
        assert applied(good, family) == Repaired(good)


@pytest.mark.parametrize("family", [GEMMA1, GEMMA3])
def test_the_system_turn_is_treated_once_for_both_sides(family: Family) -> None:
    given = pair(SYSTEM, Q)
    assert applied(given, family) == Repaired(given, ("system turn folded into the first user turn",))
    assert applied(given, family, system_role="drop") == Repaired(PAIR, ("system turn removed",))
    with pytest.raises(RowError, match="turn 1 is 'system'") as caught:
        applied(given, family, system_role="error")
    assert "data.system_role" in caught.value.fix


def test_roles_are_merged_alike_in_both_prompts() -> None:
    given = pair(Q, R)
    with pytest.raises(RowError, match="turn 2 is 'user' after 'user'") as caught:
        applied(given)
    assert caught.value.kind == "roles do not alternate"
    assert applied(given, fix_roles="drop") == Drop("roles do not alternate")
    merged = pair(Message("user", "q\n\nr"))
    assert applied(given, fix_roles="merge") == Repaired(merged, ("turns of one role merged",))


@pytest.mark.parametrize("family", [GEMMA3, GEMMA4])
def test_an_answer_behind_the_models_own_turn_is_one_turn_with_it(family: Family) -> None:
    given = pair(Q, A)
    joined = pair(Q, chosen=Message("model", "a\n\ngood"), rejected=Message("model", "a\n\nbad"))
    assert applied(given, family, fix_roles="merge") == Repaired(joined, ("turns of one role merged",))
    assert applied(given, family, fix_roles="drop") == Drop("roles do not alternate")
    with pytest.raises(RowError, match=r"set data\.fix_roles: merge|alternate|nothing to answer") as caught:
        applied(given, family)
    assert "data.fix_roles: merge" in caught.value.fix


def test_a_call_without_its_answer_cannot_be_merged() -> None:
    call = Message("model", "", tool_calls=(ToolCall("f", {}),))
    with pytest.raises(RowError, match="the prompt ends with a turn of the model") as caught:
        applied(pair(Q, call), GEMMA4, fix_roles="merge")
    assert "data.fix_roles: drop" in caught.value.fix


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_empty_answer_is_named_by_its_side(side: str) -> None:
    given = replace(PAIR, **{side: Message("model", " \n")})
    with pytest.raises(RowError, match=rf"{side}: turn 2 \('model'\) is empty") as caught:
        applied(given)
    assert caught.value.kind == "empty turn" and "data.on_empty_turn: drop" in caught.value.fix
    assert applied(given, on_empty_turn="drop") == Drop("empty turn")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (pair(Q, rejected=GOOD), "chosen and rejected are the same"),
        (pair(Q, rejected=Message("model", "  good\n")), "chosen and rejected are the same"),
        (pair(Q, margin=0.0), "equal ratings"),
        (pair(Q, margin=-0.5), "rejected is rated higher"),
        (pair(Q, rejected=GOOD, margin=-1.0), "chosen and rejected are the same"),
    ],
)
def test_pairs_that_teach_nothing_are_dropped_under_every_policy(given: Preference, reason: str) -> None:
    for on_bad_row in ("error", "drop"):
        assert applied(given, on_bad_row=on_bad_row) == Drop(reason)


def test_answers_that_differ_in_their_thoughts_alone() -> None:
    given = pair(Q, chosen=replace(GOOD, thinking="well"), rejected=GOOD)
    assert applied(given, GEMMA4) == Repaired(given)
    assert applied(given, GEMMA3) == Drop("chosen and rejected are the same")
    spelled = pair(Q, chosen=Message("model", "<|channel>thought\nwell<channel|>good"), rejected=GOOD)
    assert applied(spelled, GEMMA4) == Drop("chosen and rejected are the same")


def test_thoughts_are_removed_from_both_sides_and_counted_once() -> None:
    given = pair(Q, chosen=replace(GOOD, thinking="x"), rejected=replace(BAD, thinking="y"), thinking=True, margin=1.0)
    assert applied(given) == Repaired(pair(Q, margin=1.0), ("reasoning removed",))


def test_margins_need_ratings() -> None:
    with pytest.raises(RowError, match="has no ratings of its answers") as caught:
        applied(PAIR, margins=True)
    assert "reward.margin: none" in caught.value.fix and "data.sources.columns" in caught.value.fix
    assert applied(pair(Q, margin=1.0), margins=True) == Repaired(pair(Q, margin=1.0))


def test_tools_need_a_gemma_that_has_them() -> None:
    tools = ({"type": "function", "function": {"name": "f"}},)
    given = pair(Q, chosen=Message("model", "", tool_calls=(ToolCall("f", {}),)), tools=tools)
    assert applied(given, GEMMA4) == Repaired(given)
    with pytest.raises(RowError, match=r"chosen: turn 2 calls a tool; Gemma 3"):
        applied(given)


def test_what_gemma4_is_not_prompted_for_is_refused() -> None:
    """Behind the answer of a tool, its prompt opens a thought: an answer without one would have to take it back."""
    call = Message("model", "", tool_calls=(ToolCall("f", {}),))
    prompt = (Q, call, Message("tool", "3", name="f"))
    thoughtful = {"chosen": replace(GOOD, thinking="x"), "rejected": replace(BAD, thinking="y")}
    assert isinstance(applied(pair(*prompt, **thoughtful, thinking=True), GEMMA4), Repaired)
    assert isinstance(applied(pair(*prompt), GEMMA4), Repaired)
    with pytest.raises(RowError, match=r"rejected: .* its prompt already says something else") as caught:
        applied(pair(*prompt, chosen=thoughtful["chosen"], thinking=True), GEMMA4)
    assert caught.value.kind == "refused by this Gemma's template"
