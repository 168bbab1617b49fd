"""The reference of a preference loss: what the model would have said before the training, on the same base.

Never a second model. A new adapter has the plain base as its reference; a training that began with an adapter has that
adapter, frozen. The scores of a fixed reference are the same in every epoch, so they can be taken once and kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_tune.data.tokens import IGNORED
from gemma_tune.models.reference import cache_folder
from gemma_tune.models.roles import reference_adapters, speaking_as
from gemma_tune.train import provenance

NOT_FOR_THE_MODEL = frozenset({"completion_mask", "ref_chosen_logps", "ref_rejected_logps"})


def answer_log_probs(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """log p(answer | prompt) of each sequence of a batch, summed over its tokens: fp32; of pairs the chosen ones first.

    The vocabulary's logits are never held as a whole (`train/loss_head.py`, or TRL's fused
    head on a GPU).
    """
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    inputs = {key: value for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
    return model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)


def reference_answers(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`answer_log_probs` of the reference. Keeps nothing for a backward pass."""
    with torch.no_grad(), speaking_as(model, reference_adapters(model)):
        return answer_log_probs(model, batch)


def reference_log_probs(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen [B], rejected [B]) log-probabilities of the reference for a batch of pairs."""
    chosen, rejected = reference_answers(model, batch).chunk(2)
    return chosen, rejected


def drop_copy_of_trl(model: Any) -> None:
    """Remove the reference that TRL's `__init__` makes of a PeftModel: a copy of its adapter, named "ref".

    For a new adapter that is the plain base at the price of an adapter, and the switches that TRL uses for it undo what
    is frozen (models/roles.py).
    """
    if "ref" in model.peft_config:
        model.delete_adapter("ref")


# --- judged answers


def sequences_of(batch: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The sequences of a batch of `JudgedCollator`, or its KL rows (`KL_`), as `answer_log_probs` reads them."""
    return {name: batch[prefix + name] for name in ("input_ids", "attention_mask", "completion_mask")}


def judged_log_probs(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of the answers [B] and of the KL rows [B], for which a batch without any has one 0. fp32, no gradient."""
    with torch.no_grad():
        answers = answer_log_probs(model, sequences_of(batch))
        if "KL_input_ids" not in batch:
            return answers, answers.new_zeros(1)
        return answers, answer_log_probs(model, sequences_of(batch, "KL_"))


def judged_reference(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`judged_log_probs` of the reference."""
    with speaking_as(model, reference_adapters(model)):
        return judged_log_probs(model, batch)


# --- scores that are taken once


def cache_key(identity: Mapping[str, Any]) -> str:
    """sha256 of everything that decides about the scores: data, base, its types, the frozen adapter, the libraries."""
    decisive = ("family", "data.fingerprint", "adapter.start")
    kept = {
        key: value for key, value in identity.items() if key in decisive or key.startswith(("model.", "quantization."))
    } | {"versions": provenance.versions()}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def with_reference(
    rows: Any,
    name: str,
    *,
    key: str,
    score: Callable[[Sequence[Mapping[str, Any]]], list[tuple[float, float]]],
    writes: bool = True,
    agree: Callable[[bool], bool] = lambda missing: missing,
) -> Any:
    """`rows` with columns `ref_chosen_logps` and `ref_rejected_logps` (fp32), from the cache where they are there.

    Args:
        rows: a `datasets.Dataset` of prepared pairs.
        name: `train` or `held_out`: the two have a file each.
        key: from `cache_key`.
        score: scores the rows that it is given, in their order.
        writes: whether this process keeps what was scored.
        agree: whether the scores are missing on any process: all of them score together, or none does.
    """
    file = cache_folder() / "reference" / f"{key[:32]}-{name}.npy"
    scores = _read(file, len(rows))
    if agree(scores is None) or scores is None:
        scores = np.asarray(score(rows), dtype=np.float32).reshape(len(rows), 2)
        if writes:
            _keep(file, scores)
    rows = rows.add_column("ref_chosen_logps", scores[:, 0])
    return rows.add_column("ref_rejected_logps", scores[:, 1])


def _read(file: Path, rows: int) -> np.ndarray | None:
    """What was kept; None where there is nothing, or where it was cut."""
    try:
        scores = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return scores if scores.shape == (rows, 2) and np.isfinite(scores).all() else None


def _keep(file: Path, scores: np.ndarray) -> None:
    """In one rename, so that nobody reads half a file. A cache that cannot be written costs time, and nothing else."""
    staging = file.with_suffix(f".{os.getpid()}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(staging, "wb") as handle:
            np.save(handle, scores)
        os.replace(staging, file)
    except OSError:
        staging.unlink(missing_ok=True)
