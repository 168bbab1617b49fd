from __future__ import annotations

import pytest

from gemma_tune.data.collate import IGNORED, Collator

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
