"""What happens to answers that this Gemma cannot be shown, or that teach nothing: repair, drop, or stop.

Pure. Each answer goes through the policies of conversations; what is done to the prompt is done for all alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma_tune.data.cells import RowError
from gemma_tune.data.policies import ON_BAD_ROW, Drop, Policies, Repaired, apply_policies, joined
from gemma_tune.gemma.chat import check_answers, written_text
from gemma_tune.gemma.conversation import Answered, Conversation, Message, Preference
from gemma_tune.gemma.families import Family


def apply_pair_policies(
    preference: Preference, family: Family, policies: Policies, *, margins: bool = False
) -> Repaired[Preference] | Drop:
    """Make `preference` one that `family` can be shown and learn from.

    Args:
        margins: the stage needs to know by how much the chosen answer is better.

    Raises:
        RowError: a policy says `error`, or there is no margin; its `fix` names the recipe key.
    """
    if margins and preference.margin is None:
        raise RowError(
            "has no ratings of its answers, and reward.margin: score needs them",
            fix="set reward.margin: none, or data.sources.columns: {score_chosen: ..., score_rejected: ...}",
            kind="no ratings",
        )
    found = _repaired(preference, family, policies)
    if isinstance(found, Drop):
        return found
    chosen, rejected = found.answers
    result = replace(preference, prompt=found.prompt, chosen=chosen, rejected=rejected, thinking=found.thinking)
    if _same(result.chosen, result.rejected, family):
        return Drop("chosen and rejected are the same")
    if result.margin is not None and result.margin <= 0:
        return Drop("rejected is rated higher" if result.margin < 0 else "equal ratings")
    _check(result, family)
    return Repaired(result, found.repairs)


def apply_judged_policies(row: Answered, family: Family, policies: Policies) -> Repaired[Answered] | Drop:
    """Make a judged answer, or a pair that will be two of them, one that `family` can be shown and learn from.

    Raises:
        RowError: as `apply_pair_policies`.
    """
    if isinstance(row, Preference):
        pair = apply_pair_policies(row, family, policies)
        return pair if isinstance(pair, Drop) else Repaired(pair.example, pair.repairs)
    found = _repaired(row, family, policies)
    if isinstance(found, Drop):
        return found
    result = replace(row, prompt=found.prompt, answer=found.answers[0], thinking=found.thinking)
    _check(result, family)
    return Repaired(result, found.repairs)


@dataclass(frozen=True, slots=True)
class _Turns:
    """A prompt with its answers as the policies leave them."""

    prompt: tuple[Message, ...]
    answers: tuple[Message, ...]
    thinking: bool
    repairs: tuple[str, ...]


def _repaired(row: Answered, family: Family, policies: Policies) -> _Turns | Drop:
    """The last turn of each side is its answer; policies look back only, so that all prompts stay equal."""
    sides: list[Conversation] = []
    repairs: dict[str, None] = {}
    for name, answer in row.answers.items():
        try:
            repaired = apply_policies(row.conversation(answer), family, policies)
        except RowError as error:
            raise RowError(error.reason, f"{name}: {error.where}".rstrip(), fix=error.fix, kind=error.kind) from error
        if isinstance(repaired, Drop):
            return repaired
        assert isinstance(repaired.example, Conversation)
        sides.append(repaired.example)
        repairs |= dict.fromkeys(repaired.repairs)
    first = sides[0]
    prompt = first.messages[:-1]
    if any(side.messages[:-1] != prompt for side in sides):
        raise RowError("the policies leave two different prompts", kind="different prompts")
    answers = tuple(side.messages[-1] for side in sides)
    while prompt and prompt[-1].role == "model":
        if policies.fix_roles == "drop":
            return Drop("roles do not alternate")
        prompt, answers = _one_turn(prompt, answers, policies)
        repairs |= {"turns of one role merged": None}
    return _Turns(prompt, answers, first.thinking, tuple(repairs))


def _one_turn(
    prompt: tuple[Message, ...], answers: tuple[Message, ...], policies: Policies
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The model's last turn of the prompt and the answers as one turn: a Gemma whose roles need not alternate."""
    *before, last = prompt
    plain = not any(message.tool_calls or message.thinking for message in (last, *answers))
    if policies.fix_roles != "merge" or not plain:
        raise RowError(
            "the prompt ends with a turn of the model, so that there is nothing to answer",
            fix=f"set data.fix_roles: {'merge' if plain else 'drop'}, or {ON_BAD_ROW}",
            kind="roles do not alternate",
        )
    return tuple(before), tuple(joined(last, answer) for answer in answers)


def _check(row: Answered, family: Family) -> None:
    reason = check_answers(row, family)
    if reason:
        raise RowError(reason, fix=f"correct the row, or set {ON_BAD_ROW}", kind="refused by this Gemma's template")


def _same(first: Message, second: Message, family: Family) -> bool:
    one, other = (replace(message, content=written_text(message, family)) for message in (first, second))
    return one == other
