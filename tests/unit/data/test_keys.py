from __future__ import annotations

from dataclasses import replace

from gemma_tune.data.keys import group_of, key_of, texts_of
from gemma_tune.gemma.conversation import Conversation, Document, Message, Preference

SYSTEM, Q, A, R = Message("system", "s"), Message("user", "q"), Message("model", "a"), Message("user", "r")
PAIR = Preference((SYSTEM, Q, A, R), Message("model", "good"), Message("model", "bad"))


def test_a_pair_is_a_repetition_whatever_its_blanks_ratings_and_group() -> None:
    spaced = replace(PAIR, prompt=(SYSTEM, Message("user", " q\n"), A, R), chosen=Message("model", "good "))
    for same in (spaced, replace(PAIR, margin=2.0), replace(PAIR, group="g")):
        assert key_of(same) == key_of(PAIR)
    others = [
        replace(PAIR, chosen=PAIR.rejected, rejected=PAIR.chosen),
        replace(PAIR, rejected=Message("model", "worse")),
        replace(PAIR, prompt=(SYSTEM, Q)),
        replace(PAIR, thinking=True),
        replace(PAIR, tools=({"type": "function"},)),
    ]
    assert len({key_of(PAIR), *map(key_of, others)}) == 6


def test_pairs_of_one_first_question_share_a_group_unless_they_name_their_own() -> None:
    other = Preference((Message("user", "Q "),), Message("model", "x"), Message("model", "y"))
    assert group_of(PAIR) == group_of(other) == group_of(Conversation((Q, A))) == group_of(Document("q"))
    own, same = replace(PAIR, group="q"), replace(other, group="q")
    assert group_of(own) == group_of(same) != group_of(PAIR), "a group is no first turn of the same name"
    assert group_of(replace(PAIR, group="p")) != group_of(own)


def test_texts_are_all_that_is_said() -> None:
    assert texts_of(PAIR) == ["s", "q", "a", "r", "good", "bad"]
    assert texts_of(PAIR.conversation()) == ["s", "q", "a", "r"]
    assert texts_of(Document("x")) == ["x"]
