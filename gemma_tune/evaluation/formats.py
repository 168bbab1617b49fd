"""Whether an answer is well-formed as a turn of Gemma. Pure.

A well-formed answer has none of these faults:

cut          it did not end by itself
wrong end    it ended at `<eos>` where a turn has to end at the turn end; a document has to end at `<eos>`
empty        it has no character but blanks
marker       it holds a control token, or the spelling of one that opens or closes turns or documents
role         a line of it is nothing but the name of a role, and it has other lines: a turn began inside of it
repetition   a stretch of it is the same 1 to LONGEST_UNIT characters, with a letter among them, again and again: at
             least REPEATS times and over at least SHORTEST_STRETCH characters. Blanks in a row count as one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from gemma_tune.gemma.families import FAMILIES, Family

REPEATS = 4
SHORTEST_STRETCH = 80
LONGEST_UNIT = 400
LOOKED_AT = 20_000
"""Characters of an answer that are looked at for repetition, from its end: what repeats endlessly does so there."""

_DOCUMENT = ("<bos>", "<eos>", "<pad>")
_MARKERS = frozenset(_DOCUMENT).union(*((row.turn_start, row.turn_end) for row in FAMILIES.values()))
_ROLE = re.compile(r"^[ \t]*(?:user|model|assistant|system)[ \t]*:?[ \t]*$", re.MULTILINE)


def faults(text: str, ids: Sequence[int], ended: bool, family: Family, *, document: bool = False) -> tuple[str, ...]:
    """What is wrong with an answer, by the names above; empty where it is well-formed.

    Args:
        text: without the stop token.
        ids: all generated tokens, the stop token among them.
        ended: whether it stopped by a stop token of its own.
        family: the generation that wrote it.
        document: it goes on with a text, where no turn was opened.
    """
    found = []
    if not ended or not ids:
        found.append("cut")
    elif (ids[-1] == family.eos_id) != document:
        found.append("wrong end")
    if not text.strip():
        found.append("empty")
    inside = ids[:-1] if ended else ids
    if not _forbidden(family).isdisjoint(inside) or any(marker in text for marker in _MARKERS):
        found.append("marker")
    if _ROLE.search(text) and len(text.split("\n")) > 1:
        found.append("role")
    if repeats(text):
        found.append("repetition")
    return tuple(found)


def format_rate(found: Sequence[Sequence[str]]) -> float | None:
    """Share of answers without a fault; None where there is no answer."""
    return sum(not each for each in found) / len(found) if found else None


def count_faults(found: Sequence[Sequence[str]]) -> dict[str, int]:
    """How many answers have each fault, the commonest first."""
    return dict(Counter(name for each in found for name in each).most_common())


def repeats(text: str) -> bool:
    """Whether a stretch of `text` repeats itself as the module says."""
    import numpy as np

    plain = (" ".join(text.split()) + " ")[-LOOKED_AT:]  # so that the last of several lines counts as the others do
    codes = np.frombuffer(plain.encode("utf-32-le"), dtype=np.uint32)
    for unit in range(1, min(LONGEST_UNIT, len(codes) // REPEATS) + 1):
        needed = max(REPEATS * unit, SHORTEST_STRETCH)
        if needed > len(codes):
            continue
        same = np.concatenate(([0], codes[unit:] == codes[:-unit], [0])).astype(np.int8)
        edges = np.diff(same)
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        for start in starts[ends - starts + unit >= needed]:
            if any(character.isalpha() for character in plain[start : start + unit]):
                return True
    return False


def _forbidden(family: Family) -> frozenset[int]:
    """Control tokens that no answer holds: all but those with which it thinks and calls tools."""
    borders = {family.bos_id, family.eos_id, family.pad_id, family.turn_start_id, family.turn_end_id}
    return (family.control_ids - frozenset(family.tokens.values())) | borders
