"""`gemma-tune gather`: a checkpoint that several processes wrote in parts, as one plain folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from gemma_tune import console
from gemma_tune.errors import AccessError, UserError


def run(target: str, out: str | None) -> int:
    """Write the weights and the config of a sharded checkpoint in one folder, as PEFT and transformers open them.

    No more than a checkpoint in one file has: tokenizer, card and the statistics of a reward model are those of a
    finished run.

    Args:
        target: `RUN/checkpoint-N`.
        out: folder to make; by default `gathered-N` beside it.

    Raises:
        UserError: it is no checkpoint in parts, or the folder is there already.
        AccessError: the checkpoint is damaged.
    """
    from gemma_tune.train import checkpoint
    from gemma_tune.train.sharded_checkpoint import has_parts
    from gemma_tune.train.weights import write_gathered

    source = Path(target).expanduser().resolve()
    if not has_parts(source):
        raise UserError(
            "it is no checkpoint in parts", where=target, fix="name RUN/checkpoint-N of a run with checkpoint: sharded"
        )
    folder = Path(out).expanduser() if out else source.with_name(source.name.replace("checkpoint-", "gathered-"))
    if folder.exists():
        raise UserError("it is there already", where=str(folder), fix="choose another folder with --out")
    try:
        found = checkpoint.read(source)
    except checkpoint.Damaged as exc:
        raise AccessError(f"it is damaged: {exc}", where=target, fix="take another checkpoint of the run") from exc
    if found.identity.get("adapter.mode") == "stack":
        raise UserError(
            "this run trains on top of another adapter, and a checkpoint holds the upper one alone",
            where=target,
            fix="let the run end with --resume auto: its result is both in one",
        )
    staging = folder.with_name(f".staging-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    with checkpoint.disk_errors(folder, AccessError, fix="choose a larger disk with --out"):
        staging.mkdir(parents=True)
        count = write_gathered(source, staging)
        checkpoint.flush_all(staging)
        checkpoint.publish(staging, folder)
    console.out(f"{count} tensors of {source} are in {folder}")
    return 0
