"""What `gemma-tune eval` measures of one target by default: its held-out rows, and its answers to fixed prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gemma_tune import console
from gemma_tune.errors import UserError
from gemma_tune.evaluation.answers import Given, answer_prompts, side_by_side
from gemma_tune.evaluation.held_out import Rows, build_rows, rows_of_run, score_tokens, token_rows
from gemma_tune.evaluation.overlap import check_unseen
from gemma_tune.evaluation.rewards import describe, score_pairs
from gemma_tune.evaluation.stages import STAGES, stage_figures
from gemma_tune.evaluation.target import Opened, Target, Voice, base_of_full_run, open_target
from gemma_tune.plan.types import Plan

Lines = list[dict[str, Any]]


def rows_for(
    target: Target, opened: Opened, recipe: Plan | None, *, limit: int | None, max_new_tokens: int | None
) -> Rows:
    """The rows to measure on: the target's own, or those of a recipe.

    Raises:
        UserError: as `rows_of_run`; the target was trained on rows that the recipe holds out; or it is a reward model
            and they are no pairs.
    """
    if recipe is None:
        return rows_of_run(target, opened, limit=limit, max_new_tokens=max_new_tokens)
    rows = build_rows(recipe, opened.family, opened.encoder, limit=limit, max_new_tokens=max_new_tokens)
    if target.is_reward and rows.stage not in ("reward", "dpo"):
        raise UserError(
            "a reward model is measured on pairs of answers, and these rows are none",
            where="--recipe",
            fix="name a recipe of stage reward or dpo",
        )
    if target.tuned:
        said = check_unseen(target, rows)
        if said != "no":
            console.note(f"whether it was trained on these rows is {said}")
    return rows


def measure(
    target: Target, recipe: Plan | None, *, base: bool, limit: int | None, max_new_tokens: int | None
) -> tuple[dict[str, Any], Lines]:
    """Parts of evaluation.json and lines of evaluation.rows.jsonl.

    Args:
        recipe: the plan of a recipe whose held-out rows are used; None for the target's own.
        base: whether what the training began with is measured too.
        limit: rows and prompts at most.
        max_new_tokens: of an answer; None for what the run or the recipe says.

    Raises:
        UserError: nothing is held out, the data have changed, or rows and model do not fit together.
    """
    opened = open_target(target, recipe)
    rows = rows_for(target, opened, recipe, limit=limit, max_new_tokens=max_new_tokens)
    if target.is_reward:
        return measure_pairs(target, opened, rows)
    figures: dict[Voice, dict[str, Any]] = {}
    given: dict[Voice, Given] = {}
    lines: Lines = []
    own_figures = recipe is None and rows.stage in STAGES
    scored = [] if own_figures else token_rows(rows)
    if not scored and not own_figures and not rows.prompts:
        raise UserError(
            "its held-out rows have no answer to be scored, and nothing is asked",
            where="--recipe",
            fix="set samples.held_out above 0, or name a recipe whose rows hold answers",
        )
    trained = own_voices(target, opened, base=base)
    for voice, one in voices(target, opened, trained):
        with one.speaking(voice):
            tokens = score_tokens(one, scored, batch_size=rows.batch_size, plan=target.plan) if scored else None
            figures[voice] = tokens.whole.to_json() if tokens else {}
            lines += tokens.rows(voice) if tokens else []
            if rows.prompts:
                given[voice] = answer_prompts(one, rows)
                lines += given[voice].lines(voice)
    if own_figures:
        figures = stage_figures(target, opened, rows, trained)
    for voice, answered in given.items():
        figures.setdefault(voice, {}).update(answered.figures())
    part: dict[str, Any] = {
        "stage": rows.stage if own_figures else "sft",
        "rows": len(rows.rows),
        "tokens": next((found["tokens"] for found in figures.values() if "tokens" in found), None),
        "fingerprint": rows.data.fingerprint,
    } | {str(voice): found for voice, found in figures.items()}
    return {"held_out": part, "answers": side_by_side(given)}, lines


def own_voices(target: Target, opened: Opened, *, base: bool) -> list[Voice]:
    """What of a target speaks: of a plain model only what is called the base."""
    if not target.tuned:
        return ["base"]
    possible = opened.before is not None or base_of_full_run(target) is not None
    return ["base", "tuned"] if base and possible else ["tuned"]


def voices(target: Target, opened: Opened, wanted: list[Voice]) -> Iterator[tuple[Voice, Opened]]:
    """Each voice with the model that has it. What a full fine-tune began with is opened and let go."""
    other = base_of_full_run(target)
    for voice in wanted:
        if voice == "base" and other is not None:
            before = open_target(other)
            yield voice, before
            before.let_go()
        else:
            yield voice, opened


def measure_pairs(target: Target, opened: Opened, rows: Rows) -> tuple[dict[str, Any], Lines]:
    """A reward model on pairs. What it was before the training is not measured: that head was drawn, and not kept."""
    plan = target.plan if rows.plan is target.plan else None
    scores = score_pairs(opened.reward(), rows.rows, batch_size=rows.batch_size, pad_id=opened.family.pad_id, plan=plan)
    assert scores is not None
    part = {"stage": "reward", "rows": len(rows.rows), "tokens": None, "fingerprint": rows.data.fingerprint}
    return {"held_out": part | {"tuned": scores.whole.to_json()}, "reward": describe(scores)}, scores.rows()
