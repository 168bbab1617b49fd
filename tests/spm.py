"""How llama.cpp finds tokens with a vocabulary of scores, written from its rule: the reference for `export.gguf`.

1. Tokens that are CONTROL or USER_DEFINED are cut out of the raw text, the longest first, each from the left.
2. Blanks become U+2581. Each piece of text is its characters; of all neighbours whose joint text is a token, those
   of the highest score are joined, of equals the leftmost, until none is left.
3. What is no token then is written as its bytes.
"""

from __future__ import annotations

import itertools

from gemma_tune.export.gguf.vocabulary import CONTROL, USER_DEFINED, Vocabulary


class ScoreTokenizer:
    """Slow and plain."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.ids = {piece: number for number, piece in enumerate(vocabulary.pieces)}
        self.scores = vocabulary.scores
        fixed = [n for n, kind in enumerate(vocabulary.types) if kind in (CONTROL, USER_DEFINED)]
        self.fixed = sorted((vocabulary.pieces[number] for number in fixed), key=len, reverse=True)

    def encode(self, text: str) -> list[int]:
        found: list[int] = []
        for part in self._cut(text):
            found += [self.ids[part[1:]]] if part[0] == "=" else self._join(part[1:].replace(" ", "▁"))
        return found

    def _cut(self, text: str) -> list[str]:
        """Parts of the text: `=token`, or `?text` to look into."""
        parts = [f"?{text}"] if text else []
        for token in self.fixed:
            if token not in text:
                continue
            cut: list[str] = []
            for part in parts:
                if part[0] == "=":
                    cut.append(part)
                    continue
                for number, piece in enumerate(part[1:].split(token)):
                    cut += [f"={token}"] * (number > 0) + [f"?{piece}"] * bool(piece)
            parts = cut
        return parts

    def _join(self, text: str) -> list[int]:
        symbols = list(text)
        while True:
            pairs = [a + b for a, b in itertools.pairwise(symbols)]
            known = [(-self.scores[self.ids[pair]], place) for place, pair in enumerate(pairs) if pair in self.ids]
            if not known:
                break
            place = min(known)[1]
            symbols[place : place + 2] = [pairs[place]]
        ids: list[int] = []
        for symbol in symbols:
            if symbol in self.ids:
                ids.append(self.ids[symbol])
            else:
                ids += [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode("utf-8")]
        return ids
