"""The keywords that the recipe takes away from `advanced.trainer` exist in the installed trainer."""

from __future__ import annotations

import dataclasses

from gemma_tune.recipe.names import OWNED_BY_RECIPE


def test_every_owned_keyword_is_one_of_the_trainers() -> None:
    from trl import SFTConfig

    keywords = {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(OWNED_BY_RECIPE) <= keywords
