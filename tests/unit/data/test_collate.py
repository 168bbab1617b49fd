from __future__ import annotations

import random

import pytest
import torch

from gemma_tune.data.collate import IGNORED, Collator, PairCollator

LONG = {"input_ids": [2, 11, 12, 2, 13], "labels": [IGNORED, 11, 12, IGNORED, 13], "position_ids": [0, 1, 2, 0, 1]}
SHORT = {"input_ids": [2, 21], "labels": [IGNORED, 21], "position_ids": [0, 1]}


def test_packed_rows_have_positions_and_no_mask() -> None:
    batch = Collator(0)([LONG, SHORT])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 11, 12, 2, 13], [2, 21, 0, 0, 0]],
        "labels": [[IGNORED, 11, 12, IGNORED, 13], [IGNORED, 21, IGNORED, IGNORED, IGNORED]],
        # The padding is a document of its own: positions restart, so no real token can see it.
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
    }


def test_other_rows_have_a_mask_and_no_positions() -> None:
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in (LONG, SHORT)]
    batch = Collator(7)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["input_ids"][1].tolist() == [2, 21, 7, 7, 7]


def test_everything_is_int64() -> None:
    assert {str(tensor.dtype) for tensor in Collator(0)([SHORT, SHORT]).values()} == {"torch.int64"}


def test_packed_and_unpacked_do_not_mix() -> None:
    with pytest.raises(ValueError, match="packed and unpacked"):
        Collator(0)([LONG, {"input_ids": [2], "labels": [IGNORED]}])


def test_packed_padding_can_be_another_token_and_is_not_counted():
    rows = [
        {"input_ids": [2, 9, 8, 2, 7], "labels": [IGNORED, 9, 8, IGNORED, 7], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": [2, 9, 8, 7], "labels": [IGNORED, 9, 8, 7], "position_ids": [0, 1, 2, 3]},
        {"input_ids": [2, 9], "labels": [IGNORED, 9], "position_ids": [0, 1]},
    ]
    collate = Collator(0, fill_id=2)
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[2, 9, 8, 2, 7], [2, 9, 8, 7, 2], [2, 9, 2, 2, 2]]
    assert collate.tokens(batch) == 5 + 4 + 2
    assert Collator(0).tokens(Collator(0)(rows)) == 5 + 4 + 2
    plain = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    assert collate(plain)["input_ids"].tolist()[2] == [2, 9, 0, 0, 0]
    assert collate.tokens(collate(plain)) == 5 + 4 + 2


def test_flash_attention_gets_packed_rows_end_to_end_and_would_miss_the_documents_otherwise() -> None:
    # Of transformers: where this fails, batches of several rows are read right, and `flatten` can go.
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    stacked = Collator(0, fill_id=2)([LONG, SHORT])
    assert not _is_packed_sequence(stacked["position_ids"], batch_size=2)
    flatten = Collator(0, fill_id=2, flatten=True)
    batch = flatten([LONG, SHORT])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 11, 12, 2, 13, 2, 21]],
        "labels": [[IGNORED, 11, 12, IGNORED, 13, IGNORED, 21]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
    }
    assert _is_packed_sequence(batch["position_ids"], batch_size=1)
    assert flatten.tokens(batch) == 7


# -------------------------------------------------------------------------------------------------------------- pairs

PAIRS = [
    {"prompt_ids": [2, 11, 12], "chosen_ids": [13, 14], "rejected_ids": [15]},
    {"prompt_ids": [2, 21], "chosen_ids": [22], "rejected_ids": [23, 24]},
]


def test_pairs_come_chosen_first_with_a_mask_of_their_answers() -> None:
    batch = PairCollator(7)(PAIRS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 11, 12, 13, 14], [2, 21, 22, 7, 7], [2, 11, 12, 15, 7], [2, 21, 23, 24, 7]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_mask": [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert PairCollator(7).tokens(batch) == 5 + 3 + 4 + 4


@pytest.mark.parametrize("extra", [(), ("ref_chosen_logps", "ref_rejected_logps")])
def test_pairs_are_laid_out_as_trl_lays_them_out(extra: tuple[str, ...]) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rng = random.Random(3)
    rows = [
        {name: [rng.randrange(9) for _ in range(rng.randrange(1, 9))] for name in PAIRS[0]}
        | {name: -rng.random() * 99 for name in extra}
        for _ in range(17)
    ]
    ours, theirs = PairCollator(5)(rows), DataCollatorForPreference(pad_token_id=5)(rows)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name


def test_the_halves_of_a_reward_batch_are_those_of_trl() -> None:
    from trl.trainer.reward_trainer import DataCollatorForPreference

    whole = [
        {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")} | {"margin": margin}
        for row, margin in zip(PAIRS, (0.5, 2), strict=True)
    ]
    theirs = DataCollatorForPreference(pad_token_id=7)(whole)
    ours = PairCollator(7)([row | {"margin": margin} for row, margin in zip(PAIRS, (0.5, 2), strict=True)])
    assert set(ours) - set(theirs) == {"completion_mask"}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name


def test_a_row_without_what_the_others_have_is_an_error() -> None:
    with pytest.raises(KeyError, match="margin"):
        PairCollator(0)([PAIRS[0] | {"margin": 1.0}, PAIRS[1]])


def test_the_first_pairs_of_a_batch_keep_their_halves() -> None:
    rows = [{"prompt_ids": [2, n], "chosen_ids": [10 + n], "rejected_ids": [20 + n, 1], "margin": n} for n in range(3)]
    batch = PairCollator(0)(rows)
    first = PairCollator(0).first(batch, 2)
    assert first["input_ids"].tolist() == [[2, 0, 10, 0], [2, 1, 11, 0], [2, 0, 20, 1], [2, 1, 21, 1]]
    assert first["margin"].tolist() == [0.0, 1.0]
    assert {name: len(values) for name, values in first.items()} == {
        "input_ids": 4,
        "attention_mask": 4,
        "completion_mask": 4,
        "margin": 2,
    }
    assert PairCollator(0).first(batch, 1)["input_ids"][:, 2].tolist() == [10, 20]
