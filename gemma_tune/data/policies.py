"""What happens to a conversation that this Gemma cannot be shown as it is: repair, drop, or stop.

Pure. Every repair and every drop has a name, which `build` counts and reports; nothing is changed without one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Generic, Literal, TypeVar

from gemma_tune.data.cells import RowError
from gemma_tune.gemma.chat import check_conversation, check_prompt, written_text
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Example, Message
from gemma_tune.gemma.families import Family

E = TypeVar("E", bound=Example | Answered)

ON_BAD_ROW = "data.on_bad_row: drop"


@dataclass(frozen=True, slots=True)
class Policies:
    """The `data.*` keys that decide, with the recipe's meanings and defaults."""

    system_role: Literal["auto", "fold", "drop", "error"] = "auto"
    fix_roles: Literal["error", "merge", "drop"] = "error"
    on_empty_turn: Literal["error", "drop"] = "error"
    on_overlong: Literal["split", "truncate", "drop", "error"] = "split"
    on_bad_row: Literal["error", "drop"] = "error"


@dataclass(frozen=True, slots=True)
class Repaired(Generic[E]):
    """What can be rendered, and the names of what was done to it (empty if nothing was)."""

    example: E
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drop:
    """The row is left out, and why."""

    reason: str


Turn = tuple[int, Message]
"""A turn with its number in the row, from 1, so that a message names the turn that the user can see."""


def apply_policies(example: Example, family: Family, policies: Policies) -> Repaired[Example] | Drop:
    """Make `example` one that `family` can be shown.

    Raises:
        RowError: a policy says `error`; its `fix` names the recipe key.
    """
    if isinstance(example, Document):
        return Repaired(example)
    found = _repaired(example, family, policies, prompt=False)
    return found if isinstance(found, Drop) else Repaired(found.example, found.repairs)


def apply_prompt_policies(prompt: Conversation, family: Family, policies: Policies) -> Repaired[Conversation] | Drop:
    """Make `prompt`, which does not end with a turn of the model, one that `family` can be asked.

    Raises:
        RowError: as `apply_policies`.
    """
    return _repaired(prompt, family, policies, prompt=True)


def _repaired(
    example: Conversation, family: Family, policies: Policies, *, prompt: bool
) -> Repaired[Conversation] | Drop:
    repairs: list[str] = []
    turns: list[Turn] = list(enumerate(example.messages, 1))
    try:
        turns = _without_empty_system(turns, repairs)
        _check_system(turns)
        turns = _system(turns, family, policies, repairs)
        if not prompt:
            turns = _without_trailing_user(turns, repairs)
        needed = "user" if prompt else "model"
        if not any(message.role == needed for _, message in turns):
            return Drop(f"no {needed} turn")
        _check_empty(turns, family, policies)
        turns = _with_paired_answers(turns, family, repairs)
        example = _without_unknown_features(example, turns, family, repairs)
        _note_lost_thoughts(turns, family, repairs)
        turns = _alternating(list(zip((n for n, _ in turns), example.messages, strict=True)), family, policies, repairs)
    except _Dropped as dropped:
        return Drop(dropped.reason)
    repaired = replace(example, messages=tuple(message for _, message in turns))
    reason = (check_prompt if prompt else check_conversation)(repaired, family)
    if reason:
        raise RowError(reason, fix=f"correct the row, or set {ON_BAD_ROW}", kind="refused by this Gemma's template")
    return Repaired(repaired, tuple(repairs))


class _Dropped(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# ------------------------------------------------------------------------------------------------------ system turn


def _without_empty_system(turns: list[Turn], repairs: list[str]) -> list[Turn]:
    """Public sets write "no system prompt" as an empty one."""
    kept = [turn for turn in turns if turn[1].role != "system" or turn[1].content.strip()]
    if len(kept) != len(turns):
        repairs.append("empty system turn removed")
    return kept


def _check_system(turns: list[Turn]) -> None:
    for index, (number, message) in enumerate(turns):
        if message.role == "system" and index > 0:
            raise RowError(
                f"turn {number} is 'system'; a system turn can only be the first",
                fix=f"correct the row, or set {ON_BAD_ROW}",
                kind="system turn that is not the first",
            )


def _system(turns: list[Turn], family: Family, policies: Policies, repairs: list[str]) -> list[Turn]:
    """The system turn where the generation has none. `fold` leaves the folding to the renderer, which does it as the
    official template does, for training and for inference alike."""
    if family.system_role != "fold" or not turns or turns[0][1].role != "system":
        return turns
    if policies.system_role == "error":
        raise RowError(
            f"turn {turns[0][0]} is 'system'; this Gemma has no system turn",
            fix=f"set data.system_role: fold or drop, or {ON_BAD_ROW}",
            kind="system turn",
        )
    if policies.system_role == "drop":
        repairs.append("system turn removed")
        return turns[1:]
    repairs.append("system turn folded into the first user turn")
    return turns


# --------------------------------------------------------------------------------------------------- what is missing


def _without_trailing_user(turns: list[Turn], repairs: list[str]) -> list[Turn]:
    """Nothing follows a last user turn, so nothing can be learnt from it."""
    end = len(turns)
    while end and turns[end - 1][1].role == "user":
        end -= 1
    if end != len(turns):
        repairs.append("trailing user turn removed")
    return turns[:end]


def _check_empty(turns: list[Turn], family: Family, policies: Policies) -> None:
    for number, message in turns:
        empty = not written_text(message, family) and not message.tool_calls and message.role != "tool"
        if not empty:
            continue
        if policies.on_empty_turn == "drop":
            raise _Dropped("empty turn")
        raise RowError(
            f"turn {number} ('{message.role}') is empty",
            fix=f"set data.on_empty_turn: drop, or {ON_BAD_ROW}",
            kind="empty turn",
        )


def _without_unknown_features(
    example: Conversation, turns: Iterable[Turn], family: Family, repairs: list[str]
) -> Conversation:
    """Tools and thinking exist in Gemma 4 only. Without tools a row makes no sense; without its reasoning it does."""
    turns = list(turns)
    if not family.tools:
        for number, message in turns:
            if message.role == "tool" or message.tool_calls:
                raise RowError(
                    f"turn {number} {'is a tool turn' if message.role == 'tool' else 'calls a tool'}; "
                    f"{family.label} has no tools",
                    fix=f"use a Gemma with tools (Gemma 4), or set {ON_BAD_ROW}",
                    kind="tools",
                )
        if example.tools:
            raise RowError(
                f"the row declares tools; {family.label} has none",
                fix=f"use a Gemma with tools (Gemma 4), or set {ON_BAD_ROW}",
                kind="tools",
            )
    messages = tuple(message for _, message in turns)
    if not family.thinking and (example.thinking or any(message.thinking for message in messages)):
        repairs.append("reasoning removed")
        messages = tuple(replace(message, thinking=None) for message in messages)
        example = replace(example, thinking=False)
    return replace(example, messages=messages)


def _with_paired_answers(turns: list[Turn], family: Family, repairs: list[str]) -> list[Turn]:
    """An answer that does not say which call it answers gets its id: by the tool's name where it has one, else in turn.

    What cannot be paired so stays as it is; the renderer refuses it where it cannot name the tool.
    """
    if not family.tools:
        return turns
    paired = list(turns)
    for index, (number, message) in enumerate(turns):
        calls = [
            call if call.id is not None else replace(call, id=f"call {place}")
            for place, call in enumerate(message.tool_calls, 1)
        ]
        answers = list(takewhile(lambda turn: turn[1].role == "tool", turns[index + 1 :])) if calls else []
        given = {answer.tool_call_id for _, answer in answers}
        waiting = [call for call in calls if call.id not in given]
        for place, (answer_number, answer) in enumerate(answers, index + 1):
            # The template itself finds the tool of an only call without an id, or the answer brings its name.
            clear = len(calls) == 1 and (message.tool_calls[0].id is None or answer.name)
            if clear or answer.tool_call_id is not None:
                continue
            call = next((call for call in waiting if answer.name in (None, "", call.name)), None)
            if call is None:
                continue
            waiting.remove(call)
            paired[index] = (number, replace(message, tool_calls=tuple(calls)))
            paired[place] = (answer_number, replace(answer, tool_call_id=call.id))
    if paired != turns:
        repairs.append("tool answers paired with their calls")
    return paired


def _note_lost_thoughts(turns: list[Turn], family: Family, repairs: list[str]) -> None:
    """What the renderer leaves out, as the template does. It is done there, so that inference sees the same."""
    if not family.thinking:
        return
    last_user = max((place for place, (_, message) in enumerate(turns) if message.role == "user"), default=-1)
    if any(message.thinking for _, message in turns[: last_user + 1]):
        repairs.append("reasoning of earlier turns left out")
    if any(written_text(message, family) != message.content.strip() for _, message in turns):
        repairs.append("reasoning inside a text left out")


# -------------------------------------------------------------------------------------------------------- alternation


def _alternating(turns: list[Turn], family: Family, policies: Policies, repairs: list[str]) -> list[Turn]:
    if not family.roles_alternate:
        return turns
    merged: list[Turn] = []
    for number, message in turns:
        before = merged[-1][1] if merged else None
        if before is None or before.role != message.role:
            merged.append((number, message))
        elif policies.fix_roles == "drop":
            raise _Dropped("roles do not alternate")
        elif policies.fix_roles == "merge":
            merged[-1] = (merged[-1][0], joined(before, message))
        else:
            raise RowError(
                f"turn {number} is '{message.role}' after '{before.role}'; "
                "this Gemma wants user and model to alternate",
                fix=f"set data.fix_roles: merge, or {ON_BAD_ROW}",
                kind="roles do not alternate",
            )
    if len(merged) != len(turns):
        repairs.append("turns of one role merged")
    number, first = next(turn for turn in merged if turn[1].role != "system")
    if first.role != "user":
        if policies.fix_roles == "drop":
            raise _Dropped("the model speaks first")
        raise RowError(
            f"turn {number} is '{first.role}'; this Gemma wants the user to speak first",
            fix=f"set data.fix_roles: drop, or {ON_BAD_ROW}",
            kind="the model speaks first",
        )
    return merged


def joined(first: Message, second: Message) -> Message:
    """Two turns of one role as one, with a blank line between them."""
    return replace(first, content=f"{first.content.strip()}\n\n{second.content.strip()}")
