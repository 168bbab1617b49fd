"""The data of a run on prompts: sources -> prompts -> tokens -> held-out split, with every loss counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np

from gemma_tune.data.arrow import int_lists, lengths
from gemma_tune.data.build import Prepared, source_identity
from gemma_tune.data.keys import key_of
from gemma_tune.data.mix import Kept, read_prompts
from gemma_tune.data.pair_tokens import PROMPT_PARTS, AnswerRows, FittedPrompt, tokenise_prompts
from gemma_tune.data.pairs import prepare
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.report import PromptFigures, Tally
from gemma_tune.gemma.chat import Encoder
from gemma_tune.gemma.conversation import Conversation
from gemma_tune.gemma.families import Family

FORMAT = 1
"""Raised when the same recipe and data would give other rows than before: it is part of the fingerprint."""


def build_prompts(
    family: Family,
    encoder: Encoder,
    *,
    sources: Sequence[Mapping[str, Any]],
    max_length: int = 2048,
    holdout: float = 0.01,
    deduplicate: bool = True,
    shuffle: bool = True,
    system_role: str = "auto",
    fix_roles: str = "error",
    on_empty_turn: str = "error",
    on_overlong: str = "split",
    on_bad_row: str = "error",
    workers: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Prepared[Conversation]:
    """Read, repair, tokenise and split. The keywords are those of `recipe.schema.Data` that mean something for prompts.

    A prompt is everything before the last turn of the model in a row of any other stage; a row that ends with another
    turn is a prompt as it is. The same arguments and contents give the same rows in the same order, in every process.

    Args:
        max_length: tokens of a prompt, its response not counted. The oldest exchanges are left out where it is longer
            (`on_overlong`: `split` and `truncate` are the same here).
        progress: called with the number of prompts so far, now and then.

    Returns:
        Rows of `prompt_ids` (int32 lists), which end with the opening of the model's turn, in the order in which they
        are asked. The examples are what was rendered: prompts as they are once they fit.

    Raises:
        UserError: a source, a row or a setting is wrong, or no prompt is left.
        AccessError: the hub cannot be reached or refuses.
    """
    policies = Policies(system_role, fix_roles, on_empty_turn, on_overlong, on_bad_row)  # type: ignore[arg-type]
    settings = {
        "format": FORMAT,
        "rows": "prompts",
        "family": family.name,
        "template": family.template_sha256,
        "sources": [source_identity(source) for source in sources],
        "max_length": max_length,
        "holdout": float(holdout),
        "deduplicate": deduplicate,
        "shuffle": shuffle,
        "policies": asdict(policies),
        "seed": seed,
    }
    tally = Tally()
    kept = read_prompts(sources, family, policies, tally, deduplicate=deduplicate, seed=seed)
    fitted = tokenise_prompts(kept, family, encoder, policies, max_length=max_length, workers=workers)
    return prepare(
        once(fitted) if deduplicate else fitted,
        AnswerRows(PROMPT_PARTS, "number"),
        lambda prompt: 0.0,
        features=int_lists(PROMPT_PARTS),
        figures=_figures,
        settings=settings,
        tally=tally,
        holdout=holdout,
        shuffle=shuffle,
        batch=1,
        seed=seed,
        train_examples=True,
        progress=progress,
    )


def once(
    fitted: Iterable[tuple[Kept[Conversation], FittedPrompt | Drop]],
) -> Iterator[tuple[Kept[Conversation], FittedPrompt | Drop]]:
    """Prompts that differ in their oldest turns alone are repetitions of each other once those are left out."""
    seen: set[bytes] = set()
    for one, found in fitted:
        if not isinstance(found, Drop):
            key = key_of(found.example)
            if key in seen:
                found = Drop("repetition")
            seen.add(key)
        yield one, found


def _figures(train: datasets.Dataset) -> dict[str, Any]:
    (tokens,) = (np.concatenate(list(lengths(train, name))) for name in PROMPT_PARTS)
    return {
        "tokens": int(tokens.sum()),
        "trained_tokens": 0,
        "prompts": PromptFigures(float(tokens.mean()), int(tokens.max())),
    }
