"""Tokens as coloured text: which of them carry loss, and which control the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from gemma_tune import console

if TYPE_CHECKING:
    from rich.text import Text

    from gemma_tune.gemma.families import Family

_STYLES = {"trained": "green", "trained control": "bold black on green", "control": "bold magenta", "plain": "dim"}


def legend(marks: bool) -> Text:
    """What the colours of `picture` mean, or its marks."""
    from rich.text import Text

    if marks:
        return Text("tokens between ⟦ and ⟧ carry loss")
    return Text.assemble(
        ("trained", _STYLES["trained"]),
        " ",
        ("trained control token", _STYLES["trained control"]),
        " ",
        ("control token", _STYLES["control"]),
        " ",
        ("not trained", _STYLES["plain"]),
    )


def borders(row: Mapping[str, Any]) -> list[int]:
    """Where the documents of a row begin: their positions restart at 0."""
    positions = row.get("position_ids")
    return [0] if positions is None else [index for index, position in enumerate(positions) if position == 0]


def picture(row: Mapping[str, Any], family: Family, tokenizer: Any, marks: bool = False) -> Text:
    """The tokens of a training row as coloured text, documents divided by a line.

    Args:
        row: `input_ids`, `labels`, and `position_ids` where it is packed.
        marks: put trained tokens between brackets, for outputs without colour.
    """
    from rich.text import Text

    control = frozenset(family.tokens.values())
    text = Text()
    places = [*borders(row), len(row["input_ids"])]
    for number, (start, end) in enumerate(pairwise(places)):
        if number:
            text.append(f"\n──── document {number + 1} ────\n", "yellow")
        ids, labels = row["input_ids"][start:end], row["labels"][start:end]
        for trained, tokens in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100):
            text.append("⟦" if marks and trained else "")
            for is_control, run_of in groupby([token for token, _ in tokens], key=lambda token: token in control):
                style = (
                    ("trained control" if trained else "control") if is_control else ("trained" if trained else "plain")
                )
                text.append(_decoded(list(run_of), tokenizer), _STYLES[style])
            text.append("⟧" if marks and trained else "")
    return text


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return console.escaped(tokenizer.decode(ids, skip_special_tokens=False))
