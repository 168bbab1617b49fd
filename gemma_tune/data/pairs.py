"""The data of a run on preferences: sources -> pairs -> tokens -> held-out split, with every loss counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np

from gemma_tune.data.arrow import fingerprint, int_lists, lengths, make_dataset
from gemma_tune.data.build import Prepared, nothing_left, source_identity, split
from gemma_tune.data.mix import read_preferences
from gemma_tune.data.pack import alike
from gemma_tune.data.pair_tokens import PARTS, Pairs, tokenise_pairs
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.report import DataReport, PairFigures, Tally
from gemma_tune.data.spool import Spool
from gemma_tune.data.tokens import TrainRow
from gemma_tune.gemma.chat import Encoder
from gemma_tune.gemma.conversation import Preference
from gemma_tune.gemma.families import Family

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
    tally, pairs = Tally(), Pairs()
    spool: Spool[Preference] = Spool()
    groups: list[bytes] = []
    kept = read_preferences(sources, family, policies, tally, margins=margins, deduplicate=deduplicate, seed=seed)
    for one, fitted in tokenise_pairs(kept, family, encoder, policies, max_length=max_length, workers=workers):
        if isinstance(fitted, Drop):
            tally.drop(fitted.reason, one.where)
            continue
        for name in fitted.repairs:
            tally.repair(name, one.where)
        pairs.append(fitted.rendered, fitted.preference.margin or 0.0)
        groups.append(one.group)
        spool.append(fitted.preference)
        if progress and len(spool) % 256 == 0:
            progress(len(spool))
    if not groups:
        raise nothing_left(tally)
    order, held = split(groups, holdout, shuffle, seed, tally)
    held_order = [index for index in order if index in held]
    kept_order = [index for index in order if index not in held]
    if shuffle and batch > 1:
        kept_order = alike(kept_order, [pairs.length(index) for index in range(len(pairs))], batch, seed)
    train, train_digest = _dataset((pairs.row(index) for index in kept_order), margins)
    held_out, held_digest = _dataset((pairs.row(index) for index in held_order), margins)
    examples = [spool[index] for index in held_order]
    digest = fingerprint(settings, spool.sha256(), train_digest, held_digest)
    spool.close()
    return Prepared(train, held_out, examples, _report(tally, train, len(held)), digest)


def _dataset(rows: Iterable[TrainRow], margins: bool) -> tuple[datasets.Dataset, str]:
    features = int_lists(PARTS)
    if margins:
        features["margin"] = datasets.Value("float32")
    return make_dataset(rows, features, hashed=list(features))


def _report(tally: Tally, train: datasets.Dataset, held_out: int) -> DataReport:
    prompt, chosen, rejected = (np.concatenate(list(lengths(train, name))) for name in PARTS)
    longer = (chosen > rejected).mean() + (chosen == rejected).mean() / 2
    return tally.report(
        documents=len(train),
        held_out=held_out,
        rows=len(train),
        tokens=int((2 * prompt + chosen + rejected).sum()),
        trained_tokens=int((chosen + rejected).sum()),
        pairs=PairFigures(float(chosen.mean()), float(rejected.mean()), float(longer)),
    )
