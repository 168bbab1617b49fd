"""A batch from training rows.

Packed rows must reach the model WITHOUT an attention mask: transformers looks for document borders in `position_ids`
only where the mask is absent (masking_utils.py), and a mask of ones lets documents see each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gemma_tune.data.tokens import IGNORED as IGNORED


class Collator:
    """Pads rows to the longest of the batch, on the right.

    A row with `position_ids` is packed: its padding is a document of its own, whose positions restart, so that no real
    token sees it and the batch needs no mask. Other rows get an `attention_mask`.

    Args:
        pad_id: id of the padding token.
        fill_id: fills packed rows, by default `pad_id`. The model reads this padding as a document, and the embedding
            of Gemma's `<pad>` may be zero: AltUp (Gemma 3n) divides by the norm of what it reads, and a document of
            zeros turns every gradient into NaN. BOS is safe: each real document begins with it, none ends with it.
        flatten: lay packed rows end to end, as one row without padding. FlashAttention needs it: transformers (up to at
            least 5.23, `_is_packed_sequence`) looks for documents only in a batch of one row, and would let those of a
            larger batch see each other.
    """

    def __init__(self, pad_id: int, fill_id: int | None = None, *, flatten: bool = False) -> None:
        self.pad_id = pad_id
        self.fill_id = pad_id if fill_id is None else fill_id
        self.flatten = flatten

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows of `input_ids`, `labels`, perhaps `position_ids` (lists) -> int64 tensors of shape (rows, longest).

        Packed rows that are flattened come as (1, sum of lengths).
        """
        width = max(len(row["input_ids"]) for row in rows)
        packed = [row.get("position_ids") is not None for row in rows]
        if any(packed) != all(packed):
            raise ValueError("packed and unpacked rows in one batch")
        if self.flatten and all(packed):
            return {key: _end_to_end(rows, key) for key in ("input_ids", "labels", "position_ids")}
        filler = self.fill_id if all(packed) else self.pad_id
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], width, filler),
            "labels": _padded([row["labels"] for row in rows], width, IGNORED),
        }
        if all(packed):
            batch["position_ids"] = torch.stack([_positions(row["position_ids"], width) for row in rows])
        else:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], width, 0)
        return batch

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens of `batch` without its padding: an int64 scalar on the batch's device."""
        if "attention_mask" in batch:
            return batch["attention_mask"].sum()
        filling = batch["input_ids"].eq(self.fill_id)
        padding = (filling & batch["position_ids"].gt(0)).sum() + filling[:, -1].sum()
        return batch["input_ids"].numel() - padding


class PairCollator:
    """Pads the sequences of pairs to the longest of the batch, on the right; the chosen half comes first.

    The layout is that of TRL's `DataCollatorForPreference` for DPO, which RewardTrainer's is a part of.

    Args:
        pad_id: id of the padding token.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """B rows of `prompt_ids`, `chosen_ids`, `rejected_ids` (lists) -> tensors, T the longest sequence.

        Returns:
            `input_ids`, `attention_mask` and `completion_mask` (1 on the tokens of the answers), int64, (2B, T): row b
            is the prompt of pair b with its chosen answer, row B + b with its rejected one. Where the rows have them:
            `margin`, `ref_chosen_logps`, `ref_rejected_logps`, float32, (B,).

        Raises:
            KeyError: a row lacks what the first one has.
        """
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
        batch = _prompted(sides, self.pad_id)
        for name in ("margin", "ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch

    def first(self, batch: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The first `count` pairs of `batch`, as wide as it is."""
        pairs = len(batch["input_ids"]) // 2
        return {
            name: torch.cat([values[:count], values[pairs : pairs + count]]) if len(values) > pairs else values[:count]
            for name, values in batch.items()
        }

    def tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens of `batch` without its padding, both sequences of a pair counted: an int64 scalar on its device."""
        return batch["attention_mask"].sum()


class JudgedCollator:
    """Pads prompts with their judged answers to the longest of the batch, on the right, and makes the KL rows of KTO.

    A KL row is a prompt with an answer to another prompt of the batch: what the policy and the reference think of such
    answers is the point from which KTO counts (arXiv 2402.01306, section 4.1). As in TRL each prompt is given the
    answer of the row before it; where that row has the same prompt, of the next one before that has another. A batch
    of one prompt has no KL rows, and its KL point is 0.

    The layout is that of TRL's `DataCollatorForUnpairedPreference`.

    Args:
        pad_id: id of the padding token.
        max_length: a KL row that is longer loses the end of its answer. The answer is no row of the data, so nothing
            is lost, and both models see the same beginning of it.
    """

    def __init__(self, pad_id: int, max_length: int) -> None:
        self.pad_id = pad_id
        self.max_length = max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """B rows of `prompt_ids`, `completion_ids` (lists), `label` -> tensors.

        Returns:
            `input_ids`, `attention_mask`, `completion_mask` (1 on the tokens of the answer), int64, (B, T); the same
            of the KL rows as `KL_...`, (B, longest KL row), unless there are none; `label`, bool, (B,).
        """
        batch = self._sequences([(row["prompt_ids"], row["completion_ids"]) for row in rows])
        batch["label"] = torch.tensor([bool(row["label"]) for row in rows])
        others = answers_to_others(rows)
        if others is not None:
            mixed = [
                (row["prompt_ids"], other[: self.max_length - len(row["prompt_ids"])])
                for row, other in zip(rows, others, strict=True)
            ]
            batch |= {f"KL_{name}": tensor for name, tensor in self._sequences(mixed).items()}
        return batch

    def first(self, batch: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
        """The first `count` answers of `batch` with their KL rows, as wide as it is."""
        return {name: values[:count] for name, values in batch.items()}

    def _sequences(self, sides: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, torch.Tensor]:
        return _prompted(sides, self.pad_id)


def answers_to_others(rows: Sequence[Mapping[str, Any]]) -> list[Sequence[int]] | None:
    """For each row the answer of the nearest row before it, around the beginning, whose prompt is another.

    None where all rows have one prompt. A row that brings `KL_completion_ids` has its answer already.
    """
    if "KL_completion_ids" in rows[0]:
        return [row["KL_completion_ids"] for row in rows]
    prompts = [tuple(row["prompt_ids"]) for row in rows]
    if len(set(prompts)) == 1:
        return None
    return [
        next(rows[place - back]["completion_ids"] for back in range(1, len(rows)) if prompts[place - back] != prompt)
        for place, prompt in enumerate(prompts)
    ]


def _prompted(sides: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Prompts with answers -> `input_ids`, `attention_mask` and `completion_mask`, padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in sides)
    return {
        "input_ids": _padded([[*prompt, *answer] for prompt, answer in sides], width, pad_id),
        "attention_mask": _padded([[1] * (len(prompt) + len(answer)) for prompt, answer in sides], width, 0),
        "completion_mask": _padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in sides], width, 0),
    }


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return padded


def _end_to_end(rows: Sequence[Mapping[str, Any]], key: str) -> torch.Tensor:
    return torch.cat([torch.as_tensor(row[key], dtype=torch.long) for row in rows])[None]


def _positions(row: Sequence[int], width: int) -> torch.Tensor:
    return torch.cat([torch.as_tensor(row, dtype=torch.long), torch.arange(width - len(row), dtype=torch.long)])
