"""docs/clusters.md states what runs on several processes as the tests run it."""

from __future__ import annotations

from pathlib import Path

from gemma_tune.recipe.rules import NOT_SHARDED
from tests.parallel_cases import CASES, ELSEWHERE, table

TESTS = Path(__file__).parents[1]


def test_the_page_has_the_matrix() -> None:
    page = (TESTS.parent / "docs" / "clusters.md").read_text(encoding="utf-8")
    assert table() in page, "write it in: python -m tests.parallel_cases"


def test_the_rows_are_of_tests_that_exist() -> None:
    for _, _, _, file, test in ELSEWHERE:
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8")


def test_what_is_refused_is_what_the_plan_refuses() -> None:
    refused = {what.split()[0].lower() for what, _, fsdp2, _, _ in ELSEWHERE if fsdp2 == "refused"}
    assert refused == set(NOT_SHARDED) and not any(case.stage in NOT_SHARDED for case in CASES)
