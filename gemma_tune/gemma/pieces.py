"""A conversation as pieces: control tokens and plain text, each with who is to emit it.

The renderers write pieces; only `chat.py` turns them into ids. A piece of text is encoded by itself, so that nothing
in it can become a control token. Splitting there does not change the tokens: control tokens, and the newline that ends
a turn header, are split off by the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Token(str):
    """A control token by its spelling. A plain `str` is text, whatever it looks like."""

    __slots__ = ()


class By(IntEnum):
    """Who emits a piece, which decides whether it can carry loss."""

    NOBODY = 0  # BOS, and the newline after a turn end: no one ever has to predict it
    OTHERS = 1  # headers, users, system, tools: trained only by train_on "all"
    MODEL = 2  # what the model itself must emit


@dataclass(slots=True)
class Piece:
    """Text or a control token.

    Attributes:
        value: a `Token`, or text.
        by: who emits it.
        turn: number of the model turn that it belongs to, from 0; -1 outside of model turns.
        stop: whether the model ends here: its turn end, or the token with which it hands over to a tool.
    """

    value: str
    by: By
    turn: int = -1
    stop: bool = False


class Script:
    """Pieces in the making. Adjacent texts of the same kind join, since the tokenizer sees them as one."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.turn = -1

    def open_turn(self) -> None:
        """What follows belongs to the next model turn."""
        self.turn += 1

    def add(self, values: str | Iterable[str], by: By, *, stop: bool = False) -> None:
        """Append text and tokens. `stop` marks the last one."""
        for value in (values,) if isinstance(values, str) else values:
            self._append(value, by)
        if stop:
            self.pieces[-1].stop = True

    def _append(self, value: str, by: By) -> None:
        turn = self.turn if by is By.MODEL else -1
        last = self.pieces[-1] if self.pieces else None
        if isinstance(value, Token):
            self.pieces.append(Piece(value, by, turn))
        elif not value:
            return
        elif last is not None and not isinstance(last.value, Token) and last.by is by and last.turn == turn:
            last.value += value
        else:
            self.pieces.append(Piece(value, by, turn))
