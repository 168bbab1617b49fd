"""Prepared data as a folder: what several processes, or several runs, share instead of each tokenising for itself.

    train/, held_out/            Arrow files of `datasets`, mapped into memory when they are read
    train.jsonl, held_out.jsonl  the examples of these rows, one JSON line each
    prepared.json                the report and the fingerprint

Whether a folder is whole is its writer's business (`train.checkpoint.seal`): here is only what stands in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from gemma_tune.data.build import Prepared
from gemma_tune.data.report import DataReport
from gemma_tune.data.spool import from_json, to_json

PARTS = ("train", "held_out")


def write_prepared(prepared: Prepared[Any], folder: Path) -> None:
    """Write `prepared` into the existing folder `folder`.

    Raises:
        TypeError: its training rows are a stream, which has no end that could be written.
    """
    for name, rows, examples in zip(
        PARTS,
        (prepared.train, prepared.held_out),
        (prepared.train_examples, prepared.held_out_examples),
        strict=True,
    ):
        if not isinstance(rows, datasets.Dataset):
            raise TypeError(f"the rows of {name} are a stream")
        # Of no rows datasets 5.2 would write no file, and could not read that (datasets#8385).
        rows.save_to_disk(str(folder / name), num_shards=None if len(rows) else 1)
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(to_json(example) + "\n" for example in examples)
    found = {"report": prepared.report.to_json(), "fingerprint": prepared.fingerprint}
    (folder / "prepared.json").write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")


def read_prepared(folder: Path) -> Prepared[Any]:
    """What `write_prepared` wrote: the same rows in the same order, the same report, the same fingerprint.

    The rows stay on the disk and are mapped into memory, once for all processes of a machine.

    Raises:
        OSError, ValueError: something is missing or is not what was written there.
    """
    train, held_out = (datasets.load_from_disk(str(folder / name), keep_in_memory=False) for name in PARTS)
    found = read_about(folder)
    return Prepared(
        train,
        held_out,
        _examples(folder / "held_out.jsonl"),
        DataReport.from_json(found["report"]),
        found["fingerprint"],
        _examples(folder / "train.jsonl"),
    )


def read_about(folder: Path) -> dict[str, Any]:
    """`report` and `fingerprint` of the prepared data in `folder`, without its rows.

    Raises:
        OSError, ValueError: as `read_prepared`.
    """
    found = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"report", "fingerprint"} <= found.keys():
        raise ValueError("prepared.json is none")
    return found


def _examples(path: Path) -> list[Any]:
    # Line by line: in JSON a line break is escaped, but U+2028 is not, at which splitlines would cut.
    with open(path, encoding="utf-8", newline="\n") as file:
        return [from_json(line) for line in file]
