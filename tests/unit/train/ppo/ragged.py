"""Batches of responses of different length for hypothesis, with anything at all behind their last tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st

# No deadline: torch's first call of a kind takes as long as all others together.
many = settings(max_examples=40, deadline=None)

GARBAGE = (0.0, 1.0, -7.0, 1e30, -1e300, math.inf, -math.inf, math.nan)


@dataclass
class Ragged:
    """Tensors [B, T] fp64 whose rows are `lengths` long; `garbage` fills the rest."""

    lengths: list[int]
    columns: int
    garbage: float
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(self.columns) < torch.tensor(self.lengths)[:, None]

    def tokens(self, scale: float = 1.0) -> torch.Tensor:
        """[B, T]: normal with this standard deviation inside the mask, garbage outside."""
        drawn = torch.randn(len(self.lengths), max(self.lengths), generator=self.generator, dtype=torch.float64)
        filler = torch.full((len(self.lengths), self.columns), self.garbage, dtype=torch.float64)
        filler[:, : drawn.shape[1]] = scale * drawn
        return filler.masked_fill(~self.mask, self.garbage)

    def responses(self, scale: float = 1.0) -> torch.Tensor:
        """[B]."""
        return scale * torch.randn(len(self.lengths), generator=self.generator, dtype=torch.float64)

    def flags(self) -> torch.Tensor:
        """[B] bool."""
        return torch.rand(len(self.lengths), generator=self.generator) < 0.5

    def rows(self, tensor: torch.Tensor) -> list[list[float]]:
        """What stands inside the mask, as plain numbers."""
        return [row[:length].tolist() for row, length in zip(tensor, self.lengths, strict=True)]

    def padded(self, rows: list[list[float]]) -> torch.Tensor:
        """`rows` as [B, T] with zeros behind them: what our functions promise."""
        return torch.tensor([row + [0.0] * (self.columns - len(row)) for row in rows], dtype=torch.float64)


@st.composite
def ragged(draw: st.DrawFn, least_rows: int = 1) -> Ragged:
    lengths = draw(st.lists(st.integers(1, 7), min_size=least_rows, max_size=5))
    return Ragged(
        lengths=lengths,
        columns=max(lengths) + draw(st.integers(0, 3)),
        garbage=draw(st.sampled_from(GARBAGE)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)
