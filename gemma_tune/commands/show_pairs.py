"""`gemma-tune show` for recipes of pairs: a prompt, its two answers, and which of their tokens the loss reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.picture import legend, picture
from gemma_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from gemma_tune.data.report import DataReport
    from gemma_tune.gemma.chat import Encoder
    from gemma_tune.gemma.families import Family

PARTS = ("prompt", "chosen", "rejected")


def json_pairs(recipe: Recipe, family: Family, encoder: Encoder, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Every pair that would be trained or held out, in the order of the sources.

    `prompt_ids`, `chosen_ids` and `rejected_ids` with their texts (`prompt`, `chosen`, `rejected`), `margin` (None
    where the row has no ratings) and `where`.
    """
    from gemma_tune.data.mix import read_preferences
    from gemma_tune.data.pair_tokens import tokenise_pairs
    from gemma_tune.data.policies import Drop, Policies
    from gemma_tune.data.report import Tally

    data = recipe.data
    policies = Policies(data.system_role, data.fix_roles, data.on_empty_turn, data.on_overlong, data.on_bad_row)
    kept = read_preferences(
        [source.model_dump() for source in data.sources],
        family,
        policies,
        tally := Tally(),
        margins=recipe.stage == "reward" and recipe.reward.margin == "score",
        deduplicate=data.deduplicate,
        seed=recipe.seed,
    )
    shown = 0
    for one, fitted in tokenise_pairs(kept, family, encoder, policies, max_length=data.max_length):
        if isinstance(fitted, Drop):
            tally.drop(fitted.reason, one.where)
            continue
        shown += 1
        ids = {part: list(getattr(fitted.rendered, part)) for part in PARTS}
        yield {
            **{f"{part}_ids": ids[part] for part in PARTS},
            **{part: tokenizer.decode(ids[part], skip_special_tokens=False) for part in PARTS},
            "margin": fitted.example.margin,
            "where": one.where,
        }
    if not shown:
        from gemma_tune.data.build import nothing_left

        raise nothing_left(tally)


def show_pairs(
    recipe: Recipe,
    keywords: Mapping[str, Any],
    family: Family,
    encoder: Encoder,
    tokenizer: Any,
    rows: int,
) -> DataReport:
    """Print `rows` training pairs. Returns what happened to the data.

    Args:
        keywords: of `data.pairs.build_pairs`.
        rows: pairs to print.
    """
    from gemma_tune.data.pairs import build_pairs

    prepared = build_pairs(family, encoder, **keywords)
    marks = not console.stdout().is_terminal or console.stdout().no_color
    console.out(legend(marks))
    if recipe.stage == "reward":
        console.out("the reward is read at the last token of an answer")
    for number, row in enumerate(islice(prepared.train, rows), 1):
        console.out(_heading(number, row))
        for part in PARTS:
            console.out(f"── {part}:")
            ids = row[f"{part}_ids"]
            coloured = {"input_ids": ids, "labels": labels(ids, part, recipe.stage)}
            console.stdout().print(picture(coloured, family, tokenizer, marks), soft_wrap=True)
    return prepared.report


def labels(ids: Sequence[int], part: str, stage: str) -> list[int]:
    """-100 where the loss does not look: at the prompt, and in a reward model's answer at all but the last token."""
    if part == "prompt":
        return [-100] * len(ids)
    return list(ids) if stage == "dpo" else [-100] * (len(ids) - 1) + list(ids[-1:])


def _heading(number: int, row: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{part} {len(row[f'{part}_ids']):,}" for part in PARTS)
    margin = f", margin {row['margin']:g}" if "margin" in row else ""
    return f"\npair {number}: {counts} tokens{margin}"
