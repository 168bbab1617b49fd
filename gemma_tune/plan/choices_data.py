"""Every keyword that the preparation of the data receives."""

from __future__ import annotations

from gemma_tune.plan.stages import has_answers, sequences, unit, written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Data, Recipe

ONLY_SFT = frozenset({"packing", "train_on", "streaming", "shuffle_buffer", "canaries"})
"""Keys of the data section that pairs, judged answers and prompts have no use for. A recipe that writes them is refused
(`recipe.rules`)."""


def data_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of `data.build.build`, of `data.pairs.build_pairs`, of `data.judged.build_judged`, or of
    `data.prompts.build_prompts`."""
    left_out = frozenset() if recipe.stage == "sft" else ONLY_SFT
    chosen = {key: written(recipe, f"data.{key}") for key in Data.model_fields if key not in left_out}
    chosen["sources"] = Choice([source.model_dump() for source in recipe.data.sources], "recipe")
    if recipe.data.canaries is not None and "canaries" in chosen:
        planted = recipe.data.canaries
        chosen["canaries"] = Choice({"count": planted.count, "repeats": list(planted.repeats)}, "recipe")
    chosen["seed"] = Choice(recipe.seed, "the recipe's seed")
    if has_answers(recipe):
        rows = f"{unit(recipe.stage)}s"
        chosen["batch"] = Choice(recipe.batch.size, f"batch.size: {rows} of like length share a step, for less padding")
    if sequences(recipe.stage) == 2:
        chosen["margins"] = _margins(recipe)
    if recipe.stage == "ppo":
        new, length = recipe.ppo.max_new_tokens, recipe.data.max_length
        chosen["max_length"] = Choice(
            length - new, f"of a prompt: data.max_length {length} less {new} for its response (ppo.max_new_tokens)"
        )
    return chosen


def _margins(recipe: Recipe) -> Choice:
    if recipe.stage == "dpo":
        return Choice(False, "DPO's losses know no margin")
    margin = written(recipe, "reward.margin")
    return Choice(margin.value == "score", f"reward.margin: {margin.value} ({margin.reason})")
