"""The data of a run on preferences: sources -> pairs -> tokens -> held-out split, with every loss counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import datasets
import numpy as np

from gemma_tune.data.arrow import fingerprint, int_lists, lengths, make_dataset
from gemma_tune.data.build import Prepared, nothing_left, source_identity, split
from gemma_tune.data.mix import Kept, read_preferences
from gemma_tune.data.pack import alike
from gemma_tune.data.pair_tokens import PARTS, AnswerRows, Fitted, R, tokenise_pairs
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.report import PairFigures, Tally
from gemma_tune.data.spool import Spool
from gemma_tune.gemma.chat import Encoder
from gemma_tune.gemma.conversation import Answered, Conversation, Preference
from gemma_tune.gemma.families import Family

A = TypeVar("A", bound=Answered | Conversation)

FORMAT = 1
"""Raised when the same recipe and data would give other rows than before: it is part of the fingerprint."""


def build_pairs(
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
    batch: int = 1,
    margins: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Prepared[Preference]:
    """Read, repair, tokenise and split. The keywords are those of `recipe.schema.Data` that mean something for pairs.

    The same arguments and contents give the same rows in the same order, in every process.

    Args:
        max_length: tokens of a prompt with one of its answers. An answer is never cut; the oldest exchanges of a prompt
            are left out where it is too long (`on_overlong`: `split` and `truncate` are the same here).
        batch: pairs in an optimizer step. Pairs of like length share one where rows are shuffled, since pairs cannot be
            packed and padding costs as much as tokens.
        margins: every row needs ratings, and gets a column `margin`.
        progress: called with the number of pairs so far, now and then.

    Raises:
        UserError: a source, a row or a setting is wrong, or nothing is left to train on.
        AccessError: the hub cannot be reached or refuses.
    """
    policies = Policies(system_role, fix_roles, on_empty_turn, on_overlong, on_bad_row)  # type: ignore[arg-type]
    settings = {
        "format": FORMAT,
        "rows": "pairs",
        "family": family.name,
        "template": family.template_sha256,
        "sources": [source_identity(source) for source in sources],
        "max_length": max_length,
        "holdout": float(holdout),
        "deduplicate": deduplicate,
        "shuffle": shuffle,
        "policies": asdict(policies),
        "seed": seed,
        "margins": margins,
        "batch": batch if shuffle else 1,
    }
    tally = Tally()
    kept = read_preferences(sources, family, policies, tally, margins=margins, deduplicate=deduplicate, seed=seed)
    features = int_lists(PARTS)
    if margins:
        features["margin"] = datasets.Value("float32")
    return prepare(
        tokenise_pairs(kept, family, encoder, policies, max_length=max_length, workers=workers),
        AnswerRows(PARTS, "margin"),
        lambda preference: preference.margin or 0.0,
        features=features,
        figures=_figures,
        settings=settings,
        tally=tally,
        holdout=holdout,
        shuffle=shuffle,
        batch=batch,
        seed=seed,
        progress=progress,
    )


def prepare(
    fitted: Iterable[tuple[Kept[A], Fitted[A, R] | Drop]],
    rows: AnswerRows,
    number: Callable[[A], float],
    *,
    features: datasets.Features,
    figures: Callable[[datasets.Dataset], Mapping[str, Any]],
    settings: Mapping[str, Any],
    tally: Tally,
    holdout: float,
    shuffle: bool,
    batch: int,
    seed: int,
    arrange: Callable[[Sequence[int], Sequence[bytes]], list[int]] = lambda order, groups: list(order),
    train_examples: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Prepared[A]:
    """What pairs, judged answers and prompts share once they are tokenised: count, split, order, store.

    Args:
        fitted: rows with their ids, or why they are dropped.
        rows: where the ids go; empty.
        number: the number of a row.
        features: columns of the prepared rows.
        figures: prepared rows -> what the report says of them beside the counts.
        settings: all that decides about the rows, for the fingerprint.
        arrange: (order of the training rows, group of each row) -> the order in which they are trained.
        train_examples: whether those of the training rows are wanted as well.
        progress: called with the number of rows so far, now and then.

    Raises:
        UserError: nothing is left to train on.
    """
    spool: Spool[A] = Spool()
    groups: list[bytes] = []
    for one, found in fitted:
        if isinstance(found, Drop):
            tally.drop(found.reason, one.where)
            continue
        for name in found.repairs:
            tally.repair(name, one.where)
        rows.append(found.rendered, number(found.example))
        groups.append(one.group)
        spool.append(found.example)
        if progress and len(spool) % 256 == 0:
            progress(len(spool))
    if not groups:
        raise nothing_left(tally)
    order, held = split(groups, holdout, shuffle, seed, tally)
    held_order = [index for index in order if index in held]
    kept_order = [index for index in order if index not in held]
    if shuffle and batch > 1:
        kept_order = alike(kept_order, [rows.length(index) for index in range(len(rows))], batch, seed)
    kept_order = arrange(kept_order, groups)
    train, train_digest = make_dataset((rows.row(index) for index in kept_order), features, hashed=list(features))
    held_out, held_digest = make_dataset((rows.row(index) for index in held_order), features, hashed=list(features))
    examples = [spool[index] for index in held_order]
    trained = [spool[index] for index in kept_order] if train_examples else []
    digest = fingerprint(settings, spool.sha256(), train_digest, held_digest)
    spool.close()
    report = tally.report(documents=len(train), held_out=len(held), rows=len(train), **figures(train))
    return Prepared(train, held_out, examples, report, digest, trained)


def _figures(train: datasets.Dataset) -> dict[str, Any]:
    prompt, chosen, rejected = (np.concatenate(list(lengths(train, name))) for name in PARTS)
    longer = (chosen > rejected).mean() + (chosen == rejected).mean() / 2
    return {
        "tokens": int((2 * prompt + chosen + rejected).sum()),
        "trained_tokens": int((chosen + rejected).sum()),
        "pairs": PairFigures(float(chosen.mean()), float(rejected.mean()), float(longer)),
    }
