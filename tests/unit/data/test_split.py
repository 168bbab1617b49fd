from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.data.split import hold_out
from gemma_tune.errors import UserError

MANY = [str(index).encode() for index in range(1000)]


@pytest.mark.parametrize(
    ("holdout", "rows"), [(0, 0), (0.1, 100), (0.0001, 1), (1, 1), (1.0, 1), (37, 37), (0.999, 999)]
)
def test_how_many(holdout: float, rows: int) -> None:
    assert len(hold_out(MANY, holdout, 0)) == rows


def test_the_choice_depends_on_the_seed_and_not_on_the_order() -> None:
    first = {MANY[index] for index in hold_out(MANY, 50, 0)}
    turned = MANY[::-1]
    assert {turned[index] for index in hold_out(turned, 50, 0)} == first
    assert {MANY[index] for index in hold_out(MANY, 50, 1)} != first


@given(groups=st.lists(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), min_size=1), holdout=st.floats(0.01, 0.99))
def test_no_group_is_on_both_sides(groups: list[bytes], holdout: float) -> None:
    try:
        held = hold_out(groups, holdout, 0)
    except UserError as error:
        assert error.problems[0].fix
        return
    assert 0 < len(held) < len(groups)
    inside = {groups[index] for index in held}
    assert inside.isdisjoint(groups[index] for index in range(len(groups)) if index not in held)


@pytest.mark.parametrize(
    ("groups", "holdout", "what"),
    [
        (MANY, 1000, "1,000 of 1,000 rows would be held out"),
        (MANY[:1], 0.01, "1 of 1 rows would be held out"),
        ([b"a"] * 9, 0.3, "all 9 rows begin with the same user turn"),
        (MANY, 2.5, "2.5 is no number of rows"),
    ],
)
def test_what_cannot_be_split(groups: list[bytes], holdout: float, what: str) -> None:
    with pytest.raises(UserError) as caught:
        hold_out(groups, holdout, 0)
    assert what in str(caught.value) and "data.holdout" in str(caught.value)
