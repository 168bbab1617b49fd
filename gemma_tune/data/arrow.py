"""Training rows as an Arrow table that `datasets` serves, with a hash of their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa


def int_lists(names: Iterable[str]) -> datasets.Features:
    """Columns of int32 lists."""
    return datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in names})


def make_dataset(
    rows: Iterable[Mapping[str, Any]], features: datasets.Features, hashed: Collection[str]
) -> tuple[datasets.Dataset, str]:
    """Rows as a dataset, and the sha256 of its columns `hashed`.

    Built batch by batch: Python lists of all tokens would take eight times the memory. The hash is handed to the
    dataset, which would otherwise pickle the whole table to make one.
    """
    schema = features.arrow_schema
    batches = [
        pa.record_batch([pa.array([row[field.name] for row in batch], type=field.type) for field in schema], schema)
        for batch in _batches(rows)
    ]
    table = pa.Table.from_batches(batches, schema)
    digest = hashlib.sha256()
    for name in hashed:
        for chunk in table.column(name).chunks:
            for values in (chunk.value_lengths(), chunk.flatten()) if pa.types.is_list(chunk.type) else (chunk,):
                array = values.to_numpy(zero_copy_only=False)
                digest.update(array.astype(f"<{array.dtype.kind}4").tobytes())
    return datasets.Dataset(table, fingerprint=digest.hexdigest()[:16]), digest.hexdigest()


def lengths(data: datasets.Dataset, name: str) -> Iterator[Any]:
    """The lengths of the lists in a column as numpy arrays, chunk by chunk."""
    for chunk in data.data.column(name).chunks:
        yield chunk.value_lengths().to_numpy(zero_copy_only=False)


def values(data: datasets.Dataset, name: str) -> Iterator[Any]:
    """The values of a list column without its row borders as numpy arrays, chunk by chunk."""
    for chunk in data.data.column(name).chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=False)


def fingerprint(settings: Mapping[str, Any], *digests: str) -> str:
    """sha256 over the settings and the hashes of what they led to."""
    return hashlib.sha256(json.dumps([settings, *digests], sort_keys=True).encode()).hexdigest()


def _batches(rows: Iterable[Mapping[str, Any]], size: int = 1000) -> Iterator[list[Mapping[str, Any]]]:
    remaining = iter(rows)
    while batch := list(islice(remaining, size)):
        yield batch
