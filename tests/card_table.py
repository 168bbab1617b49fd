"""The table of docs/evaluation.md: which task stands for each row of Gemma 1.1's model card.

python -m tests.card_table     writes it into the page
"""

from __future__ import annotations

from gemma_tune.evaluation.gemma_card import GEMMA_CARD, Row
from tests.pages import ROOT, filled, markdown_table

PAGE = ROOT / "docs" / "evaluation.md"
COMMAND = "python -m tests.card_table"


def tables() -> dict[str, str]:
    """Name -> Markdown."""
    head = ["row of the card", "task", "shots here", "card says", "card, 2B", "card, 7B"]
    return {"gemma-card": markdown_table(head, map(_cells, GEMMA_CARD))}


def _cells(row: Row) -> list[str]:
    said = row.stated if row.shots_stated else f"{row.stated}; no shots" if row.stated else "nothing"
    own = "the task's" if row.shots is None else str(row.shots)
    figures = ["–" if figure is None else f"{figure:g}" for figure in row.figures]
    turns = f", in turns `{row.chat_task}`" if row.chat_task and row.chat_task != row.task else ""
    return [row.card, f"`{row.task}`{turns}", own, said, *figures]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text("utf-8"), tables(), COMMAND), "utf-8")
