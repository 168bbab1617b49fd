"""Every keyword that the preparation of the data receives."""

from __future__ import annotations

from gemma_tune.plan.stages import has_pairs, written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Data, Recipe

NOT_OF_PAIRS = frozenset({"packing", "train_on", "streaming", "shuffle_buffer"})
"""Keys of the data section that pairs have no use for. A recipe that writes them is refused (`recipe.rules`)."""


def data_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of `data.build.build`, or of `data.pairs.build_pairs` where rows are pairs."""
    pairs = has_pairs(recipe)
    chosen = {key: written(recipe, f"data.{key}") for key in Data.model_fields if not (pairs and key in NOT_OF_PAIRS)}
    chosen["sources"] = Choice([source.model_dump() for source in recipe.data.sources], "recipe")
    chosen["seed"] = Choice(recipe.seed, "the recipe's seed")
    if pairs:
        chosen["margins"] = _margins(recipe)
        chosen["batch"] = Choice(recipe.batch.size, "batch.size: pairs of like length share a step, for less padding")
    return chosen


def _margins(recipe: Recipe) -> Choice:
    if recipe.stage == "dpo":
        return Choice(False, "DPO's losses know no margin")
    margin = written(recipe, "reward.margin")
    return Choice(margin.value == "score", f"reward.margin: {margin.value} ({margin.reason})")
