"""docs/generations.md states the facts of the table of families."""

from __future__ import annotations

import re

from gemma_tune.gemma.families import FAMILIES, text_only
from gemma_tune.gemma.sizes import PUBLISHED, count
from tests.generations import COMMAND, PAGE, SHOWN, tables
from tests.pages import filled

TEXT = PAGE.read_text("utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    assert filled(TEXT, tables(), COMMAND) == TEXT, COMMAND


def test_every_family_is_shown_itself_or_by_its_multimodal_class() -> None:
    assert {text_only(FAMILIES[name]) for name in SHOWN} == {text_only(family) for family in FAMILIES.values()}


def test_threads_are_those_of_the_code_or_named_with_their_place() -> None:
    linked = re.findall(r"\[([\w-]+)#(\d+)\]\(https://github\.com/[\w-]+/([\w-]+)/(?:issues|pull)/(\d+)\)", TEXT)
    assert len(linked) > 10
    assert all((name, number) == (repo, there) for name, number, repo, there in linked)


def test_figures_in_sentences() -> None:
    shape = PUBLISHED["google/gemma-3-270m"]
    parameters = count(shape)
    share = parameters.embedding / (parameters.embedding + parameters.linear + parameters.norms_and_rest)
    assert f"{100 * share:.0f} % of the 270M are its embedding" in TEXT
    assert f"has {PUBLISHED['google/gemma-2b'].vocab:,} rows" in TEXT
    assert f"global layers are {PUBLISHED['google/gemma-4-E2B'].global_head_dim} wide" in TEXT
