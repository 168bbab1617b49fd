"""`gemma-tune show` for recipes of PPO: the prompts, as the model is given them to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.picture import picture
from gemma_tune.gemma.conversation import as_messages
from gemma_tune.plan.choices_data import data_choices
from gemma_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from gemma_tune.data.report import DataReport
    from gemma_tune.gemma.chat import Encoder
    from gemma_tune.gemma.families import Family


def json_prompts(recipe: Recipe, family: Family, encoder: Encoder, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Every prompt that would be answered in the training or held out, in the order of the sources.

    `prompt_ids`, their text (`prompt`), `messages` (what a reward function gets of it) and `where`.
    """
    from gemma_tune.data.mix import read_prompts
    from gemma_tune.data.pair_tokens import tokenise_prompts
    from gemma_tune.data.policies import Drop, Policies
    from gemma_tune.data.prompts import once
    from gemma_tune.data.report import Tally

    data = recipe.data
    policies = Policies(data.system_role, data.fix_roles, data.on_empty_turn, data.on_overlong, data.on_bad_row)
    sources = [source.model_dump() for source in data.sources]
    kept = read_prompts(sources, family, policies, tally := Tally(), deduplicate=data.deduplicate, seed=recipe.seed)
    limit = data_choices(recipe)["max_length"].value
    found = tokenise_prompts(kept, family, encoder, policies, max_length=limit)
    shown = 0
    for one, fitted in once(found) if data.deduplicate else found:
        if isinstance(fitted, Drop):
            tally.drop(fitted.reason, one.where)
            continue
        shown += 1
        ids = list(fitted.rendered.prompt)
        yield {
            "prompt_ids": ids,
            "prompt": tokenizer.decode(ids, skip_special_tokens=False),
            "messages": as_messages(fitted.example),
            "where": one.where,
        }
    if not shown:
        from gemma_tune.data.build import nothing_left

        raise nothing_left(tally)


def show_prompts(
    recipe: Recipe,
    keywords: Mapping[str, Any],
    family: Family,
    encoder: Encoder,
    tokenizer: Any,
    rows: int,
) -> DataReport:
    """Print `rows` prompts of the training. Returns what happened to the data.

    Args:
        keywords: of `data.prompts.build_prompts`.
        rows: prompts to print.
    """
    from gemma_tune.data.prompts import build_prompts

    prepared = build_prompts(family, encoder, **keywords)
    marks = not console.stdout().is_terminal or console.stdout().no_color
    console.out(
        f"prompts of at most {keywords['max_length']:,} tokens; the model answers each with at most "
        f"{recipe.ppo.max_new_tokens:,} tokens, which alone are trained"
    )
    for number, row in enumerate(islice(prepared.train, rows), 1):
        ids = row["prompt_ids"]
        console.out(f"\nprompt {number}: {len(ids):,} tokens")
        uncoloured = {"input_ids": ids, "labels": [-100] * len(ids)}
        console.stdout().print(picture(uncoloured, family, tokenizer, marks), soft_wrap=True)
    return prepared.report
