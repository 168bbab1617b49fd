"""`gemma-tune show`: training rows, or prompts, as the model will see them, token by token, with the loss mask.

Needs the tokenizer and the data, never the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.picture import borders, legend, picture
from gemma_tune.commands.show_judged import json_judged, show_judged
from gemma_tune.commands.show_pairs import json_pairs, show_pairs
from gemma_tune.commands.show_prompts import json_prompts, show_prompts
from gemma_tune.gemma.chat import render, render_prompt
from gemma_tune.gemma.conversation import Conversation, Document, Example, Message
from gemma_tune.plan.choices_data import data_choices
from gemma_tune.plan.facts import model_facts
from gemma_tune.recipe.reader import read_recipe
from gemma_tune.recipe.schema import Canaries, Recipe

if TYPE_CHECKING:
    from gemma_tune.data.mix import Kept
    from gemma_tune.data.report import DataReport
    from gemma_tune.gemma.chat import Encoder
    from gemma_tune.gemma.families import Family

SAMPLE = 1000
"""Rows of each source that are read for the picture and its report: enough to see, quick to wait for."""
HELD_OUT = 100
"""At most so many of them are held out, so that a holdout of thousands does not leave the picture empty."""


def run(recipe: str, overrides: list[str], rows: int, as_json: bool) -> int:
    """Print `rows` training rows of `recipe`.

    As JSON: one object a line for each example in the order of the sources, canaries last, before the holdout split and
    packing, with
    `ids`, `trained` (1 where a token carries loss), `text` (the ids decoded), `prompt_ids` (what the model is given to
    answer the first trained turn) and `where`. Pairs: see `show_pairs.json_pairs`; judged answers:
    `show_judged.json_judged`; prompts: `show_prompts.json_prompts`.
    """
    read = read_recipe(recipe, overrides)
    family, _ = model_facts(read.model.name, read.model.revision)
    from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer

    tokenizer = load_tokenizer(
        read.model.tokenizer or read.model.name, None if read.model.tokenizer else read.model.revision, family
    )
    encoder = GemmaEncoder(tokenizer, family)
    if as_json:
        rows_of = {"sft": json_rows, "kto": json_judged, "ppo": json_prompts}.get(read.stage, json_pairs)
        for row in islice(rows_of(read, family, encoder, tokenizer), rows):
            print(json.dumps(row, ensure_ascii=False))
    else:
        shown = {"sft": _show, "kto": show_judged, "ppo": show_prompts}.get(read.stage, show_pairs)
        report = shown(read, sampled(read), family, encoder, tokenizer, rows)
        console.out(f"\nthe data (at most {SAMPLE:,} rows of each source were read):")
        for line in report.lines():
            console.out(f"  {console.escaped(line)}")
    return 0


# -------------------------------------------------------------------------------------------------------------- JSON


def json_rows(recipe: Recipe, family: Family, encoder: Encoder, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Every example that would be trained, one by one, as `run` describes it."""
    from gemma_tune.data.mix import read_examples
    from gemma_tune.data.policies import Drop, Policies
    from gemma_tune.data.report import Tally
    from gemma_tune.data.tokens import tokenise

    data = recipe.data
    policies = Policies(data.system_role, data.fix_roles, data.on_empty_turn, data.on_overlong, data.on_bad_row)
    kept = read_examples(
        [source.model_dump() for source in data.sources],
        family,
        policies,
        tally := Tally(),
        deduplicate=data.deduplicate,
        streaming=data.streaming,
        seed=recipe.seed,
    )
    if data.canaries is not None:
        kept = _with_canaries(kept, data.canaries, recipe.seed)
    fitted = tokenise(kept, family, encoder, policies, max_length=data.max_length, train_on=data.train_on)
    shown = 0
    for one, pieces in fitted:
        if isinstance(pieces, Drop):
            tally.drop(pieces.reason, one.where)
            continue
        for piece in pieces:
            shown += 1
            yield {
                "ids": list(piece.ids),
                "trained": list(piece.trained),
                "text": tokenizer.decode(piece.ids, skip_special_tokens=False),
                "prompt_ids": prompt_ids(one.example, family, encoder, data.train_on),
                "where": one.where,
            }
    if not shown:
        from gemma_tune.data.build import nothing_left

        raise nothing_left(tally)


def _with_canaries(kept: Iterator[Kept[Example]], chosen: Canaries, seed: int) -> Iterator[Kept[Example]]:
    """What is kept, and behind it each canary as often as it is planted."""
    from gemma_tune.data import canaries
    from gemma_tune.data.mix import Kept

    form: canaries.Form = "document"
    for one in kept:
        if isinstance(one.example, Conversation):
            form = "conversation"
        yield one
    for canary in canaries.draw(chosen.count, chosen.repeats, seed):
        for _ in range(canary.repeats):
            yield Kept(canaries.example(canary, form), f"data.canaries: {canary.name}", b"")


def prompt_ids(example: Example, family: Family, encoder: Encoder, train_on: str = "model_turns") -> list[int]:
    """What the model is given at inference, to answer the first trained turn. A document starts from nothing."""
    if isinstance(example, Document):
        return [family.bos_id]
    place = _first_trained(example.messages, last=train_on == "last_model_turn")
    before = example.messages[:place]
    if not before:  # the model speaks first, behind its header and a system turn that declares thinking and tools
        rendered = render(example, family, encoder)
        return rendered.ids[: rendered.trained.index(1)]
    return render_prompt(replace(example, messages=before), family, encoder)


def _first_trained(messages: Sequence[Message], last: bool) -> int:
    """Where the first (or the last) turn of the model begins. Calls, their answers and what follows are one turn."""
    begins = [
        index
        for index, message in enumerate(messages)
        if message.role == "model" and (not index or messages[index - 1].role not in ("model", "tool"))
    ]
    return begins[-1 if last else 0]


# ------------------------------------------------------------------------------------------------------- for people


def _show(
    recipe: Recipe, keywords: Mapping[str, Any], family: Family, encoder: Encoder, tokenizer: Any, rows: int
) -> DataReport:
    from gemma_tune.data.build import build

    prepared = build(family, encoder, **keywords)
    marks = not console.stdout().is_terminal or console.stdout().no_color
    console.out(legend(marks))
    for number, row in enumerate(islice(prepared.train, rows), 1):
        console.out(_heading(number, row, family))
        console.stdout().print(picture(row, family, tokenizer, marks), soft_wrap=True)
    example = next(iter(prepared.held_out_examples), None)
    if isinstance(example, Conversation):
        ids = prompt_ids(example, family, encoder, recipe.data.train_on)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        console.out("\nthe prompt at inference, for the first held-out row:")
        console.out(console.escaped(text))
    return prepared.report


def sampled(recipe: Recipe) -> dict[str, Any]:
    """The plan's keywords for the data, with few rows of each source."""
    keywords = {key: choice.value for key, choice in data_choices(recipe).items()}
    sources = [source | {"limit": min(source["limit"] or SAMPLE, SAMPLE)} for source in keywords["sources"]]
    # A number is one of all rows, not of those that are read here.
    holdout = min(keywords["holdout"], HELD_OUT) if keywords["holdout"] >= 1 else keywords["holdout"]
    return keywords | {"sources": sources, "holdout": holdout, "workers": 1}


def _heading(number: int, row: Mapping[str, Any], family: Family) -> str:
    ids = row["input_ids"]
    trained = sum(label != -100 for label in row["labels"])
    documents = len(borders(row))
    return (
        f"\nrow {number}: {len(ids):,} tokens, {trained:,} trained, "
        f"{documents} document{'s' if documents > 1 else ''}, {ids.count(family.bos_id)} BOS"
    )
