"""What a verification counts, and where it draws the line between rounding and a fault."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gemma_tune.errors import GemmaTuneError
from gemma_tune.export.proof import compare
from gemma_tune.export.verify import (
    LIMITS,
    Parting,
    Reference,
    Verification,
    check_verification,
    kl_of,
    lines_of,
    verify,
)

ROWS = [[2, 5], [2, 6, 7]]
FIRST = torch.tensor([0.5, 0.25, 0.25]).log().double()
REFERENCE = Reference(ROWS, ((1, 2, 3), (4, 5, 6)), ((0.5, 0.4, 0.3), (0.2, 0.1, 0.05)), (FIRST, FIRST))


class Fake:
    def __init__(self, texts: list[list[int]], first: Any = FIRST) -> None:
        self.texts, self.first = texts, first

    def greedy(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        assert rows is REFERENCE.rows and count == 3
        return self.texts

    def log_probs(self, ids: Sequence[int]) -> Any:
        assert list(ids) in ROWS
        return self.first


def test_equal_texts() -> None:
    found = verify(REFERENCE, Fake([[1, 2, 3], [4, 5, 6]]), artefact="x", engine="llama.cpp", kind="f32")
    assert found.equal == (3, 3) and not found.partings and found.mean_kl == found.largest_kl == 0
    check_verification(found, "run")
    assert "2 of 2 prompts give 3 of 3 tokens" in lines_of(found)[0]


def test_the_first_other_token_counts_and_comes_with_the_lead_there() -> None:
    other = torch.tensor([0.25, 0.5, 0.25]).log()
    found = verify(REFERENCE, Fake([[1, 2, 9], [4, 8, 6]], other), artefact="x", engine="llama.cpp", kind="q4_k_m")
    assert found.equal == (2, 1)
    assert found.partings == (Parting(0, 2, 0.3), Parting(1, 1, 0.1))
    assert found.mean_kl == pytest.approx(0.25 * math.log(2), abs=1e-6)
    assert [line for line in lines_of(found) if "prompt 1" in line] == [
        "  prompt 1: other from token 1 on, where the two best were 0.1 nats apart"
    ]


def found_with(kind: str, lead: float | None, kl: float) -> Verification:
    partings = () if lead is None else (Parting(0, 7, 0.0), Parting(1, 3, lead))
    return Verification("x.gguf", "llama.cpp", kind, 48, (48, 48), partings, kl, kl)


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_what_rounding_explains_passes_and_what_it_does_not_is_refused(kind: str) -> None:
    lead, kl = LIMITS[kind]
    check_verification(found_with(kind, lead * 0.9, kl * 0.9), "run")
    for excess in (found_with(kind, lead * 1.1, 0.0), found_with(kind, math.nan, 0.0)):
        with pytest.raises(GemmaTuneError, match="goes on with another token at 3, where the best one led"):
            check_verification(excess, "run")
    for excess in (found_with(kind, None, kl * 1.1), found_with(kind, None, math.nan)):
        with pytest.raises(GemmaTuneError, match="the first token's KL is"):
            check_verification(excess, "run")


def test_fewer_bits_are_reported_only() -> None:
    check_verification(found_with("q4_k_m", 20.0, 5.0), "run")


def test_kl_of_vectors_of_two_lengths() -> None:
    assert kl_of(torch.tensor([0.0, -1000.0]), torch.tensor([0.0])) == 0
    assert kl_of(FIRST.numpy(), FIRST) == 0
    assert math.isnan(kl_of(FIRST, FIRST * math.nan))
    nowhere = compare([torch.ones(2, 3)], [torch.ones(2, 3) * math.nan])
    assert math.isnan(nowhere.largest_logit) and math.isnan(nowhere.mean_kl) and math.isnan(nowhere.largest_kl)


def test_differences_of_logits() -> None:
    one = [torch.tensor([[1.0, 2.0], [3.0, -4.0]]), torch.tensor([[0.0, 0.0]])]
    other = [torch.tensor([[1.0, 2.0], [3.0, -4.5]]), torch.tensor([[0.0, 1.0]])]
    found = compare(one, other)
    assert (found.largest_logit, found.scale, found.positions) == (1.0, 4.0, 3)
    assert found.same_choice == pytest.approx(2 / 3)
    tie = 0.5 * math.log(0.5 / (1 / (1 + math.e))) + 0.5 * math.log(0.5 / (math.e / (1 + math.e)))
    assert found.largest_kl == pytest.approx(tie)
    assert found.mean_kl == pytest.approx((tie + kl_of(one[0][1].log_softmax(-1), other[0][1].log_softmax(-1))) / 3)
    assert found.limit == 1e-3
    assert compare([one[0] * 1000], [one[0] * 1000]).limit == pytest.approx(0.04)
