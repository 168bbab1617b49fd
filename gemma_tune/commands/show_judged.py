"""`gemma-tune show` for recipes of judged answers: a prompt, its answer, and whether that was found good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.picture import legend, picture
from gemma_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from gemma_tune.data.report import DataReport
    from gemma_tune.gemma.chat import Encoder
    from gemma_tune.gemma.families import Family


def json_judged(recipe: Recipe, family: Family, encoder: Encoder, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Every answer that would be trained or held out, in the order of the sources.

    `prompt_ids` and `completion_ids` with their texts (`prompt`, `completion`), `label` and `where`.
    """
    from gemma_tune.data.mix import read_judged
    from gemma_tune.data.pair_tokens import tokenise_judged
    from gemma_tune.data.policies import Drop, Policies
    from gemma_tune.data.report import Tally

    data = recipe.data
    policies = Policies(data.system_role, data.fix_roles, data.on_empty_turn, data.on_overlong, data.on_bad_row)
    sources = [source.model_dump() for source in data.sources]
    kept = read_judged(sources, family, policies, tally := Tally(), deduplicate=data.deduplicate, seed=recipe.seed)
    shown = 0
    for one, fitted in tokenise_judged(kept, family, encoder, policies, max_length=data.max_length):
        if isinstance(fitted, Drop):
            tally.drop(fitted.reason, one.where)
            continue
        shown += 1
        ids = {"prompt": fitted.rendered.prompt, "completion": fitted.rendered.answer}
        yield {
            **{f"{part}_ids": list(found) for part, found in ids.items()},
            **{part: tokenizer.decode(found, skip_special_tokens=False) for part, found in ids.items()},
            "label": fitted.example.good,
            "where": one.where,
        }
    if not shown:
        from gemma_tune.data.build import nothing_left

        raise nothing_left(tally)


def show_judged(
    recipe: Recipe,
    keywords: Mapping[str, Any],
    family: Family,
    encoder: Encoder,
    tokenizer: Any,
    rows: int,
) -> DataReport:
    """Print `rows` training answers. Returns what happened to the data.

    Args:
        keywords: of `data.judged.build_judged`.
        rows: answers to print.
    """
    from gemma_tune.data.judged import build_judged

    prepared = build_judged(family, encoder, **keywords)
    marks = not console.stdout().is_terminal or console.stdout().no_color
    console.out(legend(marks))
    for number, row in enumerate(islice(prepared.train, rows), 1):
        prompt, answer = row["prompt_ids"], row["completion_ids"]
        judged = "good" if row["label"] else "bad"
        console.out(f"\nanswer {number}, {judged}: prompt {len(prompt):,}, completion {len(answer):,} tokens")
        for part, ids, labels in (("prompt", prompt, [-100] * len(prompt)), ("completion", answer, answer)):
            console.out(f"── {part}:")
            coloured = {"input_ids": ids, "labels": labels}
            console.stdout().print(picture(coloured, family, tokenizer, marks), soft_wrap=True)
    return prepared.report
