"""The data of a run on judged answers: sources -> answers -> tokens -> held-out split, with every loss counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np

from gemma_tune.data.arrow import int_lists, lengths
from gemma_tune.data.build import Prepared, source_identity
from gemma_tune.data.mix import read_judged
from gemma_tune.data.pair_tokens import JUDGED_PARTS, AnswerRows, tokenise_judged
from gemma_tune.data.pairs import prepare
from gemma_tune.data.policies import Policies
from gemma_tune.data.report import JudgedFigures, Tally
from gemma_tune.gemma.chat import Encoder
from gemma_tune.gemma.conversation import Judged
from gemma_tune.gemma.families import Family

FORMAT = 1
"""Raised when the same recipe and data would give other rows than before: it is part of the fingerprint."""


def build_judged(
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
    progress: Callable[[int], None] | None = None,
) -> Prepared[Judged]:
    """Read, repair, tokenise and split. The keywords are those of `data.pairs.build_pairs`.

    A row that is a pair becomes two judged answers. The same arguments and contents give the same rows in the same
    order, in every process.

    Args:
        batch: answers in an optimizer step. Those of like length share one where rows are shuffled, and those to one
            prompt stand apart in it (`apart`).

    Returns:
        Rows of `prompt_ids`, `completion_ids` (int32 lists) and `label` (int8: 1 good, 0 bad).

    Raises:
        UserError: a source, a row or a setting is wrong, or nothing is left to train on.
        AccessError: the hub cannot be reached or refuses.
    """
    policies = Policies(system_role, fix_roles, on_empty_turn, on_overlong, on_bad_row)  # type: ignore[arg-type]
    settings = {
        "format": FORMAT,
        "rows": "judged",
        "family": family.name,
        "template": family.template_sha256,
        "sources": [source_identity(source) for source in sources],
        "max_length": max_length,
        "holdout": float(holdout),
        "deduplicate": deduplicate,
        "shuffle": shuffle,
        "policies": asdict(policies),
        "seed": seed,
        "batch": batch,
    }
    tally = Tally()
    kept = read_judged(sources, family, policies, tally, deduplicate=deduplicate, seed=seed)
    return prepare(
        tokenise_judged(kept, family, encoder, policies, max_length=max_length, workers=workers),
        AnswerRows(JUDGED_PARTS, "label"),
        lambda judged: float(judged.good),
        features=datasets.Features({**int_lists(JUDGED_PARTS), "label": datasets.Value("int8")}),
        figures=_figures,
        settings=settings,
        tally=tally,
        holdout=holdout,
        shuffle=shuffle,
        batch=batch,
        seed=seed,
        arrange=lambda order, groups: apart(order, groups, batch),
        progress=progress,
    )


def apart(order: Sequence[int], groups: Sequence[bytes], batch: int) -> list[int]:
    """`order` with the rows of one group as far from each other as their optimizer step allows.

    Each step keeps its rows: the first of every group come first, then the second ones. KTO compares with answers to
    other prompts, which it takes from the same pass, and both answers of a pair would often stand side by side.

    Args:
        order: row numbers as they are trained.
        groups: of each row number.
        batch: rows in an optimizer step.
    """
    found: list[int] = []
    for start in range(0, len(order), batch):
        seen: Counter[bytes] = Counter()
        turns: list[tuple[int, int]] = []
        for index in order[start : start + batch]:
            turns.append((seen[groups[index]], index))
            seen[groups[index]] += 1
        found += [index for _, index in sorted(turns, key=lambda turn: turn[0])]
    return found


def _figures(train: datasets.Dataset) -> dict[str, Any]:
    prompt, answer = (np.concatenate(list(lengths(train, name))) for name in JUDGED_PARTS)
    good = np.asarray(train["label"]) == 1
    means = (float(answer[side].mean()) if side.any() else None for side in (good, ~good))
    return {
        "tokens": int((prompt + answer).sum()),
        "trained_tokens": int(answer.sum()),
        "judged": JudgedFigures(int(good.sum()), int((~good).sum()), *means),
    }
