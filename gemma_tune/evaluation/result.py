"""evaluation.json: what was found about one subject, part by part; and evaluation.rows.jsonl, its single rows.

    {"format": 1,
     "subject": {"target", "base", "revision", "adapter_sha256", "content"},
     "created", "versions",
     "held_out": ..., "answers": ..., "reward": ..., "tasks": ..., "memorisation": ..., "comparison": ...}

Each command writes the parts that it measured. The others stay as long as they are about the same subject.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.errors import AccessError, UserError
from gemma_tune.plan.facts import read_json
from gemma_tune.train.checkpoint import disk_errors, write_atomically
from gemma_tune.train.provenance import redact, versions
from gemma_tune.train.session import dump, finite, now

FORMAT = 1
FILE = "evaluation.json"
ROWS = "evaluation.rows.jsonl"
_ABOUT = ("base", "revision", "adapter_sha256", "content")
"""What tells one subject from another. How the user named it does not, unless nothing else is known of it."""


def rows_file(file: Path) -> Path:
    """Where the rows of an evaluation.json are: beside it."""
    return (
        file.with_name(ROWS) if file.name == FILE else file.with_name(f"{file.name.removesuffix('.json')}.rows.jsonl")
    )


def read(file: Path) -> dict[str, Any]:
    """An earlier evaluation; empty where there is none.

    Raises:
        UserError: it is damaged, or of a format that this version does not know.
    """
    if not file.is_file():
        return {}
    found = dict(read_json(file))
    if found.get("format") != FORMAT or not isinstance(found.get("subject"), Mapping):
        raise UserError(
            f"this is no evaluation of format {FORMAT}", where=str(file), fix="move it away, or name another --output"
        )
    return found


def check_writable(file: Path) -> None:
    """Refuse a place where nothing can be written, before hours are spent on what goes there.

    Raises:
        AccessError: a folder that is no folder, or that may not be written to.
    """
    folder = next(one for one in file.absolute().parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise AccessError(
            "nothing can be written into it" if folder.is_dir() else "this is no folder",
            where=str(folder),
            fix="name a file elsewhere with --output FILE",
        )


def same_subject(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two subjects are the same weights."""
    if any(one.get(key) != other.get(key) for key in _ABOUT):
        return False
    known = one.get("adapter_sha256") or one.get("content") or one.get("revision")
    return bool(known) or one.get("target") == other.get("target")


def merged(earlier: Mapping[str, Any], subject: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """The whole document: `parts`, and the other parts of `earlier` where they are about `subject`.

    Tasks are a part each: what was measured before stays beside what was measured now.
    """
    kept = dict(earlier) if earlier and same_subject(earlier["subject"], subject) else {}
    parts = dict(parts)
    if "tasks" in parts and "tasks" in kept:
        parts["tasks"] = {**kept["tasks"], **parts["tasks"]}
    head = {"format": FORMAT, "subject": dict(subject), "created": now(), "versions": versions()}
    return head | {key: value for key, value in kept.items() if key not in head} | parts


def write(
    file: Path, subject: Mapping[str, Any], parts: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Merge `parts` into `file` and `rows` into the file beside it, each in one rename. Returns the document.

    Raises:
        UserError: what is there is no evaluation.
        AccessError: it cannot be written.
    """
    earlier = read(file)
    document = merged(earlier, subject, parts)
    rows = list(rows)
    with disk_errors(file, AccessError):
        file.parent.mkdir(parents=True, exist_ok=True)
        old = read_rows(file) if earlier and same_subject(earlier["subject"], subject) else []
        kept = [row for row in old if _part_of(row) not in {_part_of(new) for new in rows}]
        if kept or rows:
            lines = (redact(json.dumps(finite(row), ensure_ascii=False)) + "\n" for row in (*kept, *rows))
            write_atomically(rows_file(file), "".join(lines))
        elif old or rows_file(file).is_file():
            rows_file(file).unlink()  # those of another subject
        write_atomically(file, dump(document))
    return document


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows beside an evaluation.json; none where there is no such file.

    Raises:
        UserError: a line is damaged.
    """
    place = rows_file(file)
    if not place.is_file():
        return []
    rows = []
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except ValueError as exc:
            raise UserError("not a JSON object", where=f"{place}:{number}", fix="evaluate again") from exc
    return rows


def _part_of(row: Mapping[str, Any]) -> Sequence[Any]:
    return (row.get("part"), row.get("task"))
