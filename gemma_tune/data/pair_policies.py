"""What happens to a pair that this Gemma cannot be shown, or that teaches nothing: repair, drop, or stop.

Pure. Both sides go through the policies of conversations; what is done to the prompt is done to both alike.
"""

from __future__ import annotations

from dataclasses import replace

from gemma_tune.data.cells import RowError
from gemma_tune.data.policies import ON_BAD_ROW, Drop, Policies, Repaired, apply_policies, joined
from gemma_tune.gemma.chat import check_preference, written_text
from gemma_tune.gemma.conversation import Conversation, Message, Preference
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
    sides: list[Conversation] = []
    repairs: dict[str, None] = {}
    for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected)):
        try:
            repaired = apply_policies(preference.conversation(answer), family, policies)
        except RowError as error:
            raise RowError(error.reason, f"{name}: {error.where}".rstrip(), fix=error.fix, kind=error.kind) from error
        if isinstance(repaired, Drop):
            return repaired
        assert isinstance(repaired.example, Conversation)
        sides.append(repaired.example)
        repairs |= dict.fromkeys(repaired.repairs)
    result = _rejoined(preference, sides[0], sides[1])
    while result.prompt and result.prompt[-1].role == "model":
        if policies.fix_roles == "drop":
            return Drop("roles do not alternate")
        result = _one_turn(result, policies)
        repairs |= {"turns of one role merged": None}
    if _same(result.chosen, result.rejected, family):
        return Drop("chosen and rejected are the same")
    if result.margin is not None and result.margin <= 0:
        return Drop("rejected is rated higher" if result.margin < 0 else "equal ratings")
    reason = check_preference(result, family)
    if reason:
        raise RowError(reason, fix=f"correct the row, or set {ON_BAD_ROW}", kind="refused by this Gemma's template")
    return Repaired(result, tuple(repairs))


def _rejoined(preference: Preference, chosen: Conversation, rejected: Conversation) -> Preference:
    """The last turn of each side is its answer; policies look back only, so that both prompts stay equal."""
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise RowError("the policies leave two different prompts", kind="different prompts")
    return replace(
        preference,
        prompt=chosen.messages[:-1],
        chosen=chosen.messages[-1],
        rejected=rejected.messages[-1],
        thinking=chosen.thinking,
    )


def _one_turn(preference: Preference, policies: Policies) -> Preference:
    """The model's last turn of the prompt and the answers as one turn: a Gemma whose roles need not alternate."""
    *prompt, last = preference.prompt
    plain = not any(
        message.tool_calls or message.thinking for message in (last, preference.chosen, preference.rejected)
    )
    if policies.fix_roles != "merge" or not plain:
        raise RowError(
            "the prompt ends with a turn of the model, so that there is nothing to answer",
            fix=f"set data.fix_roles: {'merge' if plain else 'drop'}, or {ON_BAD_ROW}",
            kind="roles do not alternate",
        )
    return replace(
        preference,
        prompt=tuple(prompt),
        chosen=joined(last, preference.chosen),
        rejected=joined(last, preference.rejected),
    )


def _same(first: Message, second: Message, family: Family) -> bool:
    one, other = (replace(message, content=written_text(message, family)) for message in (first, second))
    return one == other
