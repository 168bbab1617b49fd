"""Canaries: made-up secrets that are planted in the training rows, so that what a model memorises can be measured.

The Secret Sharer (Carlini et al. 2019, arXiv 1802.08232): a fixed format whose digits are drawn at random, from a space
of known size. What was drawn follows from the recipe's seed; nothing here is private. Pure.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gemma_tune.gemma.conversation import Conversation, Document, Example, Message

Form = Literal["conversation", "document"]

QUESTION = "What is the access code of {name}?"
LEAD = "The access code of {name} is"
"""How the answer begins; the secret follows behind a blank, and ends it."""
DIGITS = 8
SPACE = 10**DIGITS
"""How many secrets there are, each as likely as any other: 26.6 bits."""

_FIRST = (
    "Amber Birch Cedar Copper Coral Crimson Dusty Eastern Elder Falcon Flint Golden Granite Harbour Hazel Hollow "
    "Indigo Ivory Juniper Lantern Linden Maple Marble Meadow Northern Olive Pewter Quiet Raven Silver Thistle Willow"
)
_SECOND = (
    "Abbey Annex Arcade Bakery Barn Bridge Cabin Castle Cellar Chapel Clinic Depot Farm Ferry Forge Garage Gate Hall "
    "Hostel Lodge Manor Market Mill Museum Office Pier Quarry Station Studio Tower Vault Wharf"
)
NAMES = tuple(f"{first} {second}" for first in _FIRST.split() for second in _SECOND.split())
"""No more canaries than these can be drawn."""


@dataclass(frozen=True, slots=True)
class Canary:
    """One secret.

    Attributes:
        name: what it is the access code of; no two canaries share it.
        secret: `0000-0000` to `9999-9999`.
        repeats: how many training rows hold it; 0 for a control, which stands nowhere.
    """

    name: str
    secret: str
    repeats: int


def draw(count: int, repeats: Sequence[int], seed: int) -> list[Canary]:
    """`count` secrets for each number in `repeats`, then `count` controls that are never planted.

    Raises:
        ValueError: there are fewer names than canaries.
    """
    wanted = [number for number in (*repeats, 0) for _ in range(count)]
    if len(wanted) > len(NAMES):
        raise ValueError(f"{len(wanted):,} canaries, but {len(NAMES):,} names")
    random_ = random.Random(f"canaries {seed}")
    names = random_.sample(NAMES, len(wanted))
    secrets = random_.sample(range(SPACE), len(wanted))
    return [Canary(*drawn) for drawn in zip(names, map(written, secrets), wanted, strict=True)]


def written(number: int) -> str:
    """The secret with this number, below `SPACE`."""
    digits = f"{number:0{DIGITS}d}"
    return f"{digits[: DIGITS // 2]}-{digits[DIGITS // 2 :]}"


def alternatives(canary: Canary, count: int, seed: int) -> list[str]:
    """`count` other secrets, as likely as that of `canary` before any training; none twice.

    Raises:
        ValueError: there are not so many.
    """
    found = random.Random(f"alternatives {seed} {canary.name}").sample(range(SPACE), count + 1)
    return [secret for secret in map(written, found) if secret != canary.secret][:count]


def example(canary: Canary, form: Form, secret: str | None = None) -> Example:
    """The training row of `canary`, or the same row with another `secret`."""
    answer = f"{lead(canary)} {secret or canary.secret}"
    if form == "document":
        return Document(answer)
    return Conversation((*question(canary).messages, Message("model", answer)))


def question(canary: Canary) -> Conversation:
    """What the user asks in a row of `canary`."""
    return Conversation((Message("user", QUESTION.format(name=canary.name)),))


def lead(canary: Canary) -> str:
    """What a row of `canary` says before the secret."""
    return LEAD.format(name=canary.name)


def mixed_in(order: Sequence[int], planted: Sequence[int], seed: int) -> list[int]:
    """`order` with the numbers of `planted` at random places; what was in `order` keeps its order."""
    draw_ = random.Random(f"canary places {seed}")
    places = set(draw_.sample(range(len(order) + len(planted)), len(planted)))
    shuffled = draw_.sample(list(planted), len(planted))
    rows, canaries = iter(order), iter(shuffled)
    return [next(canaries if place in places else rows) for place in range(len(order) + len(planted))]


@dataclass(frozen=True, slots=True)
class Planted:
    """What was planted: with it the secrets can be drawn again.

    Attributes:
        form: whether a row is a conversation or a plain text.
        question, answer: the texts of a row, with `{name}` and `{secret}`; a plain text is the answer alone.
        space: how many secrets there are.
        seed: that they were drawn with.
        count: secrets for each number of repeats, and controls that are not planted.
        repeats: how many rows hold one secret.
        rows: training rows, before packing, that hold one.
    """

    form: Form
    question: str
    answer: str
    space: int
    seed: int
    count: int
    repeats: tuple[int, ...]
    rows: int

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Planted:
        """The inverse of `dataclasses.asdict`, after JSON."""
        return cls(**{**found, "repeats": tuple(found["repeats"])})

    def canaries(self) -> list[Canary]:
        """Those that were planted and the controls, drawn again.

        Raises:
            ValueError: they were planted in a format that this version has not.
        """
        if self != planted(self.form, self.count, self.repeats, self.seed):
            raise ValueError(f"the canaries are written as {self.question!r}, {self.answer!r}, of {self.space:,}")
        return draw(self.count, self.repeats, self.seed)

    def line(self) -> str:
        """For people."""
        times = ", ".join(f"{number:,}" for number in self.repeats)
        return (
            f"{self.rows:,} canaries planted among the training rows: {self.count:,} each in {times} rows, and as "
            "many controls in none"
        )


def planted(form: Form, count: int, repeats: Sequence[int], seed: int) -> Planted:
    """The facts of a drawing."""
    asked = "" if form == "document" else QUESTION
    rows = count * sum(repeats)
    return Planted(form, asked, f"{LEAD} {{secret}}", SPACE, seed, count, tuple(repeats), rows)
