"""What a stage changes about the recipe's defaults, and what it is called elsewhere."""

from __future__ import annotations

from typing import Any

from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Recipe

CONFIGS = {
    "sft": "trl.SFTConfig",
    "reward": "trl.RewardConfig",
    "dpo": "trl.DPOConfig",
    "kto": "trl.KTOConfig",
    "ppo": "gemma_tune.train.ppo.config.PpoConfig",
}
"""Stage -> the class that the plan's trainer section holds the keywords of. trl has no PPO since 1.13."""

_DEFAULTS: dict[str, dict[str, Choice]] = {
    "reward": {
        "optim.learning_rate": Choice(1e-4, "reward: 1e-4, as trl's RewardConfig and its LoRA examples"),
        "adapter.dropout": Choice(0.0, "reward: both answers of a pair must be seen by the same network"),
        "samples.held_out": Choice(0, "reward: the model rates answers and gives none"),
    },
    "dpo": {
        "optim.learning_rate": Choice(5e-6, "dpo: 5e-6, as alignment-handbook/zephyr-7b-dpo-qlora"),
        "adapter.dropout": Choice(0.0, "dpo: the log-ratio against the reference is exact only without dropout"),
    },
    "kto": {
        "optim.learning_rate": Choice(5e-6, "kto: 5e-6, as in dpo, whose settings trl's script for KTO recommends"),
        "adapter.dropout": Choice(0.0, "kto: the log-ratio against the reference is exact only without dropout"),
    },
    "ppo": {
        "optim.learning_rate": Choice(1e-5, "ppo: 1e-5, as LLaMA-Factory's example of PPO with LoRA"),
        "optim.beta2": Choice(0.95, "ppo: 0.95, as OpenRLHF's: gradients of other rollouts are soon forgotten"),
        "optim.epsilon": Choice(1e-5, "ppo: 1e-5, as the code of arXiv 2403.17031"),
        "adapter.dropout": Choice(0.0, "ppo: the first ratio of new to old probability is 1 only without dropout"),
    },
}
"""Keys whose default is another one in a stage than in the schema, which has that of `sft`."""


def has_answers(recipe: Recipe) -> bool:
    """Whether a training row is a prompt with a judged answer or a pair of answers: such rows are not packed."""
    return recipe.stage not in ("sft", "ppo")


def sequences(stage: str) -> int:
    """Sequences in a training row: two where it is a pair."""
    return 2 if stage in ("reward", "dpo") else 1


def unit(stage: str) -> str:
    """What a training row is called."""
    return {"sft": "row", "kto": "answer", "ppo": "response"}.get(stage, "pair")


def has_reference(stage: str) -> bool:
    """Whether the loss compares the model with what it was at the start."""
    return stage in ("dpo", "kto", "ppo")


def least_micro(stage: str) -> int:
    """Rows in a pass at least: KTO takes answers to other prompts from the same pass."""
    return 2 if stage == "kto" else 1


def updates(recipe: Recipe) -> int:
    """Optimizer steps that the rows of a step are dealt out to, once."""
    return recipe.ppo.minibatches if recipe.stage == "ppo" else 1


def group(recipe: Recipe) -> int:
    """Rows of a step that one process must have together: the responses to one prompt."""
    return recipe.ppo.samples_per_prompt if recipe.stage == "ppo" else 1


def continues(recipe: Recipe) -> bool:
    """Whether the adapter that is trained was saved by another run."""
    return recipe.model.adapter is not None and recipe.model.adapter_mode == "continue"


def written(recipe: Recipe, key: str) -> Choice:
    """The value of `key` (`seed`, `optim.learning_rate`) and whose it is: `recipe`, the stage's with why, or `default`.

    A key of a section that is null is the schema's default.
    """
    *sections, leaf = key.split(".")
    section: Any = recipe
    for name in sections:
        section = getattr(section, name)
    if leaf in section.model_fields_set:
        return Choice(getattr(section, leaf), "recipe")
    return _DEFAULTS.get(recipe.stage, {}).get(key) or Choice(getattr(section, leaf), "default")
