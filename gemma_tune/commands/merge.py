"""`gemma-tune merge`: an adapter into its base, proved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from gemma_tune.errors import UserError


def run(
    targets: Sequence[str],
    out: str | None,
    base: Literal["original", "dequantized"],
    dtype: str | None,
    adapter: str | None,
    shares: Sequence[float],
    base_path: str | None,
) -> int:
    """Write base + adapter as one model, compare it with the adapter, and print the figures.

    Args:
        targets: runs or adapter folders of one base.
        out: folder to make; by default `merged` in the run.
        base: into the original 16-bit base, or into the dequantised 4-bit base of the training.
        dtype: of the files; None keeps the base's.
        adapter: which of several in a target.
        shares: the weight of each target.
        base_path: where the base lies now.
    """
    from gemma_tune.commands.export import export
    from gemma_tune.commands.train import quieten
    from gemma_tune.export.make import Order
    from gemma_tune.export.subject import find_subject

    quieten()
    subject: Any = find_subject(targets, shares=shares, adapter=adapter, base=base_path)
    if not subject.adapters:
        raise UserError(
            "there is no adapter to merge: this is a whole model", where=subject.target, fix="see: gemma-tune export -h"
        )
    name = "merged" if base == "original" else "merged-dequantized"
    return export(subject, Path(out).expanduser() if out else None, name, Order("safetensors", base, dtype))
