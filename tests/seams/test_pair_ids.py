"""Pairs against the official templates and the real tokenizers, token for token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.data.mix import one_by_one
from gemma_tune.gemma.chat import (
    RenderedPair,
    check_answers,
    render,
    render_judged,
    render_preferences,
    render_prompt,
    written_text,
)
from gemma_tune.gemma.conversation import Conversation, Message, Preference, ToolCall
from gemma_tune.gemma.families import FAMILIES, Family
from tests.conversations import random_conversation, random_text
from tests.seams.test_official_templates import GENERATIONS, official_ids, official_text
from tests.tokenizers import protected_encoder

PAIRS = 500


def random_pairs(family: Family, seed: str, wanted: int = PAIRS) -> list[Preference]:
    """Conversations that end with an answer, and another answer to the same prompt. Some the family refuses."""
    rng = random.Random(seed)
    pairs: list[Preference] = []
    while len(pairs) < wanted:
        conversation = random_conversation(rng, family)
        *prompt, answer = conversation.messages
        if answer.role != "model" or not prompt or prompt[-1].role not in ("user", "tool"):
            continue
        other = Message("model", random_text(rng))
        if family.thinking and rng.random() < 0.5:
            other = replace(other, thinking=random_text(rng))
        if family.tools and rng.random() < 0.3:
            other = replace(other, tool_calls=(ToolCall("search", {"x": random_text(rng, 4)}),))
        sides = (answer, other) if rng.random() < 0.5 else (other, answer)
        pairs.append(Preference(tuple(prompt), *sides, tools=conversation.tools, thinking=conversation.thinking))
    return pairs


def check_against_the_template(preference: Preference, pair: RenderedPair, name: str) -> None:
    family = FAMILIES[name]
    (newline,) = official_ids(["\n"], name)
    sides = [preference.conversation(answer) for answer in (preference.chosen, preference.rejected)]
    prompt, *whole = official_ids(
        [official_text(preference.conversation(), name, prompt=True), *(official_text(side, name) for side in sides)],
        name,
    )
    assert pair.prompt == prompt
    for answer, side, official in zip((pair.chosen, pair.rejected), sides, whole, strict=True):
        ids = pair.prompt + answer
        assert official[: len(ids)] == ids
        stops = {family.turn_end_id, family.tokens.get("<|tool_response>")}
        assert answer[-1] in stops, "an answer ends where the model stops"
        assert official[len(ids) :] == (newline if answer[-1] == family.turn_end_id else [])
        assert family.bos_id not in answer
        assert answer == render(side, family, protected_encoder(name)).ids[len(prompt) : len(ids)]


@pytest.mark.parametrize("name", GENERATIONS)
def test_prompts_and_answers_are_those_of_the_official_template(name: str) -> None:
    family, encoder = FAMILIES[name], protected_encoder(name)
    pairs = random_pairs(family, f"pairs {name}")
    fine = [pair for pair in pairs if check_answers(pair, family) is None]
    assert len(fine) > 0.8 * PAIRS
    for preference, rendered in zip(fine, render_preferences(fine, family, encoder), strict=True):
        check_against_the_template(preference, rendered, name)
        assert rendered.prompt == render_prompt(preference.conversation(), family, encoder)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_begins_a_conversation_with_prompt_and_answer(name: str) -> None:
    """Those that share a template and a tokenizer too: each has its own row of facts."""
    family, encoder = FAMILIES[name], protected_encoder(name)
    pairs = [pair for pair in random_pairs(family, name, 60) if check_answers(pair, family) is None]
    assert pairs
    for preference, pair in zip(pairs, render_preferences(pairs, family, encoder), strict=True):
        for answer, ids in ((preference.chosen, pair.chosen), (preference.rejected, pair.rejected)):
            rendered = render(preference.conversation(answer), family, encoder)
            assert rendered.ids[: rendered.turns[-1]] == pair.prompt + ids
            assert all(rendered.trained[len(pair.prompt) : rendered.turns[-1]]), "all of it is the model's own"
    for good, side in ((True, "chosen"), (False, "rejected")):
        alone = [judged for pair in pairs for judged in one_by_one(pair) if judged.good is good]
        rendered_pairs = render_preferences(pairs, family, encoder)
        for found, pair in zip(render_judged(alone, family, encoder), rendered_pairs, strict=True):
            assert (found.prompt, found.answer) == (pair.prompt, getattr(pair, side)), "as in its pair"


def test_what_gemma4_cannot_be_prompted_for_is_refused_and_nothing_else() -> None:
    """Behind the answer of a tool, the official prompt opens a thought, or is the end of a turn that holds text."""
    family = FAMILIES["gemma4_text"]
    refused = 0
    for pair in random_pairs(family, "refused"):
        *_, last = pair.prompt
        caller = next((m for m in reversed(pair.prompt) if m.role == "model" and m.tool_calls), None)
        expected = False
        if last.role == "tool" and caller is not None:
            thoughts = [answer.thinking or "" for answer in (pair.chosen, pair.rejected)]
            unanswered = any(not thought or thought.startswith("\n") for thought in thoughts)
            expected = bool(written_text(caller, family)) or (pair.thinking and unanswered)
        assert (check_answers(pair, family) is not None) == expected, pair
        refused += expected
    assert refused > 20


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(GENERATIONS),
    texts=st.lists(st.text(max_size=40), min_size=1, max_size=3),
    chosen=st.text(max_size=60),
    rejected=st.text(max_size=60),
)
def test_any_text_keeps_the_border_between_prompt_and_answer(
    name: str, texts: list[str], chosen: str, rejected: str
) -> None:
    turns = [Message("user" if index % 2 == 0 else "model", text) for index, text in enumerate(texts)]
    if turns[-1].role == "model":
        turns.append(Message("user", "?"))
    preference = Preference(tuple(turns), Message("model", chosen), Message("model", rejected))
    family, encoder = FAMILIES[name], protected_encoder(name)
    (pair,) = render_preferences([preference], family, encoder)
    for text, ids in ((chosen, pair.chosen), (rejected, pair.rejected)):
        rendered = render(Conversation((*turns, Message("model", text))), family, encoder)
        assert rendered.ids[: rendered.turns[-1]] == pair.prompt + ids
        assert sum(token in family.control_ids for token in ids) == 1, "text cannot end the turn"
