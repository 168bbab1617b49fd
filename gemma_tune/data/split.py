"""The holdout split. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from gemma_tune.errors import UserError


def wanted_rows(holdout: float, rows: int) -> int:
    """How many of `rows` are asked for; groups that are larger can make it more."""
    if holdout == 0 or holdout >= 1:
        return int(holdout)
    return max(1, round(holdout * rows))


def hold_out(groups: Sequence[bytes], holdout: float, seed: int) -> set[int]:
    """Which rows are held out. Rows of one group go to one side, so that no prompt is on both.

    Groups are taken in the order of a hash of (seed, group), which does not depend on the order of the rows.

    Args:
        groups: the group of each row.
        holdout: a fraction below 1, or a number of rows. A fraction above 0 holds out one row at least.
        seed: of the choice.

    Raises:
        UserError: not enough rows, or all rows share one group.
    """
    rows = len(groups)
    if holdout == 0:
        return set()
    if holdout >= 1 and holdout != int(holdout):
        raise UserError(
            f"{holdout} is no number of rows", where="data.holdout", fix="give a fraction below 1 or an integer"
        )
    wanted = wanted_rows(holdout, rows)
    if wanted >= rows:
        raise UserError(
            f"{wanted:,} of {rows:,} rows would be held out: nothing is left to train on",
            where="data.holdout",
            fix="lower data.holdout, or set it to 0",
        )
    members: dict[bytes, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    salt = str(seed).encode()
    order = sorted(members, key=lambda group: hashlib.blake2b(salt + b"/" + group, digest_size=16).digest())
    held: set[int] = set()
    for group in order:
        if len(held) + len(members[group]) <= wanted:
            held.update(members[group])
        if len(held) == wanted:
            break
    if not held and len(members) > 1:
        # Every group is larger than what was asked for.
        held.update(members[min(order, key=lambda group: len(members[group]))])
    if not held or len(held) == rows:
        raise UserError(
            f"all {rows:,} rows begin with the same user turn, are of one group, or come from one text, and cannot be "
            "split without leakage",
            where="data.holdout",
            fix="set data.holdout: 0",
        )
    return held
