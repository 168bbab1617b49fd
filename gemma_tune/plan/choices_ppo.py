"""What PpoConfig (train/ppo/config.py) and the session of a PPO run receive beside what every stage has."""

from __future__ import annotations

from gemma_tune.gemma.families import Family
from gemma_tune.plan.choices_model import new_lora
from gemma_tune.plan.stages import written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Recipe

_OWN_NAMES = {"epochs": "ppo_epochs"}
"""Keys of the `ppo` section that PpoConfig calls otherwise: its own `epochs` would be those over the data."""
_OF_CRITIC = ("critic", "critic_warmup", "value_clip", "lam")


def ppo_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of PpoConfig alone: the `ppo` section, without the rewards, which are the session's."""
    keys = [key for key in type(recipe.ppo).model_fields if key != "reward"]
    chosen = {key: written(recipe, f"ppo.{key}") for key in keys}
    chosen["critic_learning_rate"] = _critic_rate(recipe)
    if recipe.ppo.estimator != "gae":
        unused = f"ppo.estimator: {recipe.ppo.estimator} has no critic, and reads it not"
        chosen |= {key: Choice(chosen[key].value, unused) for key in (*_OF_CRITIC, "critic_learning_rate")}
    return {_OWN_NAMES.get(key, key): choice for key, choice in chosen.items()}


def _critic_rate(recipe: Recipe) -> Choice:
    if recipe.ppo.critic_learning_rate is not None:
        return Choice(recipe.ppo.critic_learning_rate, "recipe")
    rate = written(recipe, "optim.learning_rate").value
    return Choice(2 * rate, f"default: twice optim.learning_rate ({rate:g})")


def rewards_choice(recipe: Recipe) -> Choice:
    """`{source, weight, kind}` of each source of the score."""
    return Choice([one.model_dump() | {"kind": one.kind} for one in recipe.ppo.reward], "recipe")


def critic_choice(recipe: Recipe, family: Family) -> Choice:
    """`{start, lora}` of the critic's adapter: the reward model that it is a copy of, or keywords of LoraConfig."""
    ppo = recipe.ppo
    if ppo.estimator != "gae":
        return Choice(None, f"ppo.estimator: {ppo.estimator} needs no critic")
    if ppo.critic == "head":
        return Choice(None, "ppo.critic: head: it reads the policy's trunk, and has no adapter")
    if ppo.judge:
        return Choice({"start": ppo.judge, "lora": None}, "a copy of the first reward model (arXiv 2203.02155)")
    lora = {key: choice.value for key, choice in new_lora(recipe, family).items()}
    return Choice({"start": None, "lora": lora}, "a new one, with the keys of `adapter`: no reward model rewards")
