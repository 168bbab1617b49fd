"""What trl's RewardConfig, DPOConfig and KTOConfig receive beside what every stage has."""

from __future__ import annotations

from gemma_tune.plan.stages import written
from gemma_tune.plan.types import Choice
from gemma_tune.recipe.schema import Dpo, Recipe

NO_DROPOUT = "all answers, and the reference, must be seen by the same network"
SCORES = "an answer's score is the plain sum over its tokens, for the policy and for the reference"
REFERENCE = "the reference stays as it was at the start"


def pair_choices() -> dict[str, Choice]:
    """Keywords that the three share."""
    return {
        "disable_dropout": Choice(True, NO_DROPOUT),
        "pad_to_multiple_of": Choice(None, "rows are padded by gemma_tune.data, to the longest of a pass"),
    }


def reward_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of RewardConfig alone."""
    center = written(recipe, "reward.center")
    if center.value == 0:
        return {"center_rewards_coefficient": Choice(None, f"reward.center: 0 ({center.reason})")}
    return {"center_rewards_coefficient": center}


def dpo_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of DPOConfig alone."""
    dpo = recipe.dpo
    types, weights, smoothing = trl_loss(dpo)
    loss = written(recipe, "dpo.loss").reason
    asked = f"dpo.label_smoothing: {dpo.label_smoothing:g}"
    if smoothing == dpo.label_smoothing:
        smoothed = written(recipe, "dpo.label_smoothing")
    else:
        smoothed = Choice(smoothing, f"{asked}: as conservative DPO, in terms of trl's robust loss")
    if dpo.sft_weight:
        loss += f"; dpo.sft_weight: {dpo.sft_weight:g} adds the loss on the chosen answer"
    return {
        "loss_type": Choice(types, loss if types[0] == dpo.loss else f"{loss}; {asked} makes {dpo.loss} cDPO"),
        "loss_weights": Choice(weights, "dpo.loss, then dpo.sft_weight" if dpo.sft_weight else "one loss"),
        "beta": written(recipe, "dpo.beta"),
        "label_smoothing": smoothed,
        "precompute_ref_log_probs": Choice(False, "the scores of the reference are ours: taken once, and kept"),
        "sync_ref_model": Choice(False, REFERENCE),
    }


def kto_choices(recipe: Recipe) -> dict[str, Choice]:
    """Keywords of KTOConfig alone."""
    return {
        "loss_type": Choice("kto", "the loss of the paper, with its KL point"),
        "beta": written(recipe, "kto.beta"),
        "desirable_weight": written(recipe, "kto.desirable_weight"),
        "undesirable_weight": written(recipe, "kto.undesirable_weight"),
        "precompute_ref_log_probs": Choice(False, "the reference is asked in each pass: KL rows are made there"),
        "sync_ref_model": Choice(False, REFERENCE),
    }


def trl_loss(dpo: Dpo) -> tuple[list[str], list[float], float]:
    """(loss types, their weights, label_smoothing) of trl's DPOConfig for a recipe's `dpo` section.

    trl 1.16 ignores `label_smoothing` in its `sigmoid` loss, so that conservative DPO (cDPO, Mitchell's note of 2023)
    has no name there. Its `robust` loss does not ignore it. With L(x) = -log sigmoid(x) and smoothing s it is

        R(s) = [(1 - s) L(x) - s L(-x)] / (1 - 2 s)

    Put s = -e / (1 - 2 e): then 1 - 2 s = 1 / (1 - 2 e) and 1 - s = (1 - e) / (1 - 2 e), and so

        R(s) = (1 - e) L(x) + e L(-x)

    which is cDPO with smoothing e, exactly. trl warns about a negative s and computes it.
    """
    types, smoothing = [dpo.loss], dpo.label_smoothing
    if dpo.loss == "sigmoid" and smoothing:
        types, smoothing = ["robust"], -smoothing / (1 - 2 * smoothing)
    weights = [1.0]
    if dpo.sft_weight:
        return [*types, "sft"], [*weights, dpo.sft_weight], smoothing
    return [*types], weights, smoothing
