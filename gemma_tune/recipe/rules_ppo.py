"""Rules over the keys of `stage: ppo`. Each is silent in other stages."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_tune.recipe.clash import Clash, Place
from gemma_tune.recipe.schema import Recipe

MIN_PROMPT = 16
"""Tokens that must be left for a prompt: what data.max_length itself must have at least."""
_OF_CRITIC = ("critic", "critic_learning_rate", "critic_warmup", "value_clip", "lam")
"""Keys that `gae` alone reads."""


def _reward(recipe: Recipe, place: Place) -> Iterator[Clash]:
    ppo = recipe.ppo
    if recipe.stage != "ppo":
        return
    if not ppo.reward:
        yield Clash(
            ("ppo.reward", "stage"),
            f"stage: ppo ({place('stage')}) needs something that scores responses, but ppo.reward "
            f"({place('ppo.reward')}) names nothing",
            "set ppo.reward to a run of `gemma-tune reward`, or to a function: ./mine.py:score",
        )
    names = [one.source for one in ppo.reward]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Clash(
            ("ppo.reward",),
            f"ppo.reward ({place('ppo.reward')}) names {name} {names.count(name)} times",
            "write it once, with the sum of the weights",
        )
    if ppo.reward and not any(one.weight for one in ppo.reward):
        yield Clash(
            ("ppo.reward",),
            f"every source of ppo.reward ({place('ppo.reward')}) has weight 0, which rewards nothing",
            "give one of them a weight above 0",
        )
    if ppo.reward and ppo.normalize and "normalize" in ppo.model_fields_set and not ppo.models:
        yield Clash(
            ("ppo.normalize", "ppo.reward"),
            f"ppo.normalize: true ({place('ppo.normalize')}) scales rewards of reward models, but ppo.reward "
            f"({place('ppo.reward')}) has only functions, whose numbers stay as they are",
            "remove ppo.normalize",
        )


def _length(recipe: Recipe, place: Place) -> Iterator[Clash]:
    new, length = recipe.ppo.max_new_tokens, recipe.data.max_length
    if recipe.stage != "ppo" or length - new >= MIN_PROMPT:
        return
    left = f"leaves {length - new} tokens" if length > new else "leaves nothing"
    yield Clash(
        ("ppo.max_new_tokens", "data.max_length"),
        f"ppo.max_new_tokens: {new} ({place('ppo.max_new_tokens')}) {left} of data.max_length: {length} "
        f"({place('data.max_length')}) for a prompt",
        f"set data.max_length to {new + MIN_PROMPT} at the very least, such as {4 * new}, or lower ppo.max_new_tokens",
    )


def _batch(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """A step's responses are whole groups of a prompt, and are dealt out to minibatches of whole passes."""
    ppo, size, micro = recipe.ppo, recipe.batch.size, recipe.batch.micro
    if recipe.stage != "ppo":
        return
    batch = f"batch.size: {size} ({place('batch.size')})"
    group = f"ppo.samples_per_prompt: {ppo.samples_per_prompt} ({place('ppo.samples_per_prompt')})"
    if ppo.estimator == "rloo" and ppo.samples_per_prompt == 1:
        yield Clash(
            ("ppo.estimator", "ppo.samples_per_prompt"),
            f"ppo.estimator: rloo ({place('ppo.estimator')}) compares the responses to one prompt, but {group} gives "
            "one",
            "set ppo.samples_per_prompt to 2 or more, such as 4",
        )
    if size % ppo.samples_per_prompt:
        yield Clash(
            ("ppo.samples_per_prompt", "batch.size"),
            f"{batch} responses a step are no multiple of {group}",
            f"set batch.size to {_multiples(size, ppo.samples_per_prompt)}",
        )
    least = micro if micro != "auto" else 1
    if size % least == 0 and size % (ppo.minibatches * least):
        passes = f" of passes of {micro}" if least > 1 else ""
        yield Clash(
            ("ppo.minibatches", "batch.size"),
            f"{batch} responses a step cannot be dealt out to ppo.minibatches: {ppo.minibatches} "
            f"({place('ppo.minibatches')}){passes}",
            f"set batch.size to {_multiples(size, ppo.minibatches * least)}"
            + (", or batch.micro: auto" if least > 1 else ""),
        )


def _multiples(size: int, of: int) -> str:
    """The multiples of `of` around `size`."""
    lower = size // of * of
    return f"{lower} or {lower + of}" if lower else f"{of}"


def _critic(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """Keys that say something to a part of PPO which this recipe leaves out."""
    ppo, steps = recipe.ppo, recipe.optim.max_steps
    if recipe.stage != "ppo":
        return
    estimator = f"ppo.estimator: {ppo.estimator} ({place('ppo.estimator')})"
    if ppo.estimator != "gae":
        for key in sorted(ppo.model_fields_set.intersection(_OF_CRITIC)):
            yield Clash(
                (f"ppo.{key}", "ppo.estimator"),
                f"ppo.{key} ({place(f'ppo.{key}')}) is about a critic, but {estimator} has none",
                f"remove ppo.{key}, or set ppo.estimator: gae",
            )
    if ppo.estimator == "rloo" and ppo.gamma != 1:
        yield Clash(
            ("ppo.gamma", "ppo.estimator"),
            f"ppo.gamma: {ppo.gamma:g} ({place('ppo.gamma')}) has no meaning in {estimator}, which takes a response "
            "as one action",
            "remove ppo.gamma, or set ppo.estimator: gae",
        )
    if ppo.estimator == "gae" and steps is not None and ppo.critic_warmup >= steps:
        yield Clash(
            ("ppo.critic_warmup", "optim.max_steps"),
            f"ppo.critic_warmup: {ppo.critic_warmup} ({place('ppo.critic_warmup')}) leaves none of optim.max_steps: "
            f"{steps} ({place('optim.max_steps')}) to the policy",
            "lower ppo.critic_warmup",
        )


def _kl(recipe: Recipe, place: Place) -> Iterator[Clash]:
    ppo, size = recipe.ppo, recipe.batch.size
    if recipe.stage != "ppo":
        return
    target = f"ppo.kl_target ({place('ppo.kl_target')})"
    horizon = f"ppo.kl_horizon: {ppo.kl_horizon} ({place('ppo.kl_horizon')})"
    if ppo.kl_target is None:
        if "kl_horizon" in ppo.model_fields_set:
            yield Clash(
                ("ppo.kl_horizon", "ppo.kl_target"),
                f"{horizon} says how fast ppo.kl is adapted, but {target} is not set: it stays as it is",
                "set ppo.kl_target, or remove ppo.kl_horizon",
            )
        return
    if ppo.kl == 0:
        yield Clash(
            ("ppo.kl_target", "ppo.kl"),
            f"{target} adapts ppo.kl by factors, but ppo.kl: 0 ({place('ppo.kl')}) stays 0",
            "set ppo.kl above 0, such as 0.05",
        )
    if ppo.kl_horizon < size:
        yield Clash(
            ("ppo.kl_horizon", "batch.size"),
            f"{horizon} is less than the batch.size: {size} ({place('batch.size')}) responses of one step, in which "
            "ppo.kl would jump",
            f"set ppo.kl_horizon to {100 * size} or more",
        )


PPO_RULES = (_reward, _length, _batch, _critic, _kl)
