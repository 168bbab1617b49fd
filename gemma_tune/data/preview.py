"""A few training rows as text with their loss mask, small enough for run.json.

`gemma-tune show` reads the data again to picture them; this is what a finished run keeps of the rows that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from gemma_tune.data.build import Prepared
from gemma_tune.data.tokens import IGNORED

ROWS = 3
TOKENS = 320
"""Of each part of a row at most; `more` says how many follow."""

_CUT = "\ufffd"
"""What decoding a part of a character's bytes gives."""


def preview(
    stage: str,
    prepared: Prepared[Any],
    control: frozenset[int],
    decode: Callable[[Sequence[int]], str],
    allowed: Callable[[str], bool] = lambda text: True,
) -> list[dict[str, Any]]:
    """The first training rows; of a stream, whose rows are not read yet, the first held-out ones.

    Args:
        stage: decides which tokens of an answer the loss reads.
        prepared: the data of the run.
        control: ids of control tokens.
        decode: ids -> text, control tokens included.
        allowed: whether a text may be written down; a row with another one is left out.

    Returns:
        A row: `held_out`, `label` (judged answers) and `parts`. A part: `name`, `tokens` (how many it has), `text`,
        and of each piece of the text, in words divided by blanks: `lengths` in characters, `kinds`, one letter each:
        `t` carries loss, `p` does not, capitals are control tokens. A piece is a token, or several where a character
        has several. `begins`: the pieces at which a further document of a packed row begins. `more`: tokens that are
        not shown.
    """
    streamed = not hasattr(prepared.train, "__len__")
    rows = prepared.held_out if streamed else prepared.train
    found = (_row(stage, row, control, decode, streamed) for row in rows)
    return list(islice((row for row in found if all(allowed(part["text"]) for part in row["parts"])), ROWS))


def _row(
    stage: str, row: Mapping[str, Any], control: frozenset[int], decode: Callable[[Sequence[int]], str], held: bool
) -> dict[str, Any]:
    parts = [_part(*part, control, decode) for part in _parts(stage, row)]
    label = {"label": "good" if row["label"] else "bad"} if "label" in row else {}
    return {"held_out": held, **label, "parts": parts}


def _parts(stage: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[int], Sequence[bool], Sequence[int]]]:
    """(name, ids, which carry loss, where documents begin)."""
    if "input_ids" in row:
        begins = [index for index, position in enumerate(row.get("position_ids") or ()) if position == 0 and index]
        yield "row", row["input_ids"], [label != IGNORED for label in row["labels"]], begins
        return
    for name in ("prompt", "chosen", "rejected", "completion"):
        if (ids := row.get(f"{name}_ids")) is None:
            continue
        if name == "prompt":
            trained = [False] * len(ids)
        elif stage == "reward":  # the score is read at the turn end
            trained = [False] * (len(ids) - 1) + [True]
        else:
            trained = [True] * len(ids)
        yield name, ids, trained, []


def _part(
    name: str,
    ids: Sequence[int],
    trained: Sequence[bool],
    begins: Sequence[int],
    control: frozenset[int],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    texts, kinds, starts = [], [], []
    place, end = 0, min(len(ids), TOKENS)
    while place < end:
        width = 1
        text = decode(ids[place : place + 1])
        # Bytes of one character: a character has four of them at most, and all of them have the same mask.
        while _CUT in text and width < 4 and place + width < end and trained[place + width] == trained[place]:
            width += 1
            text = decode(ids[place : place + width])
        if _CUT in text:  # no whole character here
            text, width = decode(ids[place : place + 1]), 1
        kind = "t" if trained[place] else "p"
        texts.append(text)
        kinds.append(kind.upper() if ids[place] in control else kind)
        starts.append(place)
        place += width
    return {
        "name": name,
        "tokens": len(ids),
        "text": "".join(texts),
        "lengths": " ".join(str(len(text)) for text in texts),
        "kinds": "".join(kinds),
        "begins": " ".join(str(starts.index(begin)) for begin in begins if begin in starts),
        "more": len(ids) - place,
    }
