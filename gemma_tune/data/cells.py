"""The cells of a row: text, lists and JSON as they should be, or a `RowError` that says where they are not. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]

_LARGEST = 1e38
"""The difference of two such numbers is still a float32."""


class SourceRow(NamedTuple):
    """One row as a source yields it: its number from 1, its value (or why it has none), and where it stands."""

    number: int
    value: Any
    where: str


class RowError(Exception):
    """A row cannot be used.

    Args:
        reason: what is wrong, without the place.
        where: place inside the row (`messages[2].content`), empty for the whole row.
        fix: what to do about it.
        kind: a short name that rows with the same fault share; it is what gets counted. By default `reason`.
    """

    def __init__(self, reason: str, where: str = "", *, fix: str = "", kind: str = "") -> None:
        super().__init__(f"{where} {reason}" if where else reason)
        self.reason = reason
        self.where = where
        self.fix = fix
        self.kind = kind or reason


def as_list(value: Any, where: str, *, empty: bool = False) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"is {kind_of(value)}, not a list", where, kind=f"{_column(where)} is not a list")
    if not value and not empty:
        raise RowError("is an empty list", where, kind=f"{_column(where)} is empty")
    return list(value)


def as_text(value: Any, where: str, *, trim: bool = True) -> str:
    """Text, or a list of text blocks as one text, of which each is trimmed (`trim`)."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                f"holds a lone surrogate (U+{ord(value[error.start]):04X}) at character {error.start}",
                where,
                fix="repair the row, or set data.on_bad_row: drop",
                kind="lone surrogate",
            ) from None
        return value
    if value is None:
        raise RowError("is null", where, kind=f"{_column(where)} is null")
    if isinstance(value, (list, tuple)):
        return _blocks(value, where, trim)
    raise RowError(f"is {kind_of(value)}, not text", where, kind=f"{_column(where)} is not text")


def _blocks(blocks: Collection[Any], where: str, trim: bool) -> str:
    """Content as a list of blocks: text only. The official templates trim the blocks of users and models, not those of
    a tool's answer, and join them without a blank."""
    texts = []
    for index, block in enumerate(blocks):
        place = f"{where}[{index}]"
        if not isinstance(block, Mapping):
            raise RowError(f"is {kind_of(block)}, not a content block", place, kind="content is not text")
        kind = block.get("type")
        if kind not in ("text", None):
            raise RowError(
                f"is a block of type {shown(str(kind))}; only text can be trained here",
                place,
                fix="remove the block, or set data.on_bad_row: drop",
                kind="content that is not text",
            )
        if isinstance(block.get("text"), (list, tuple)):
            raise RowError("is a list, not text", f"{place}.text", kind="content is not text")
        texts.append(as_text(block.get("text"), f"{place}.text"))
    return texts[0] if len(texts) == 1 else "".join(part.strip() if trim else part for part in texts)


def as_number(value: Any, where: str) -> float:
    """A number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"is {kind_of(value)}, not a number", where, kind=f"{_column(where)} is not a number")
    if not -_LARGEST < value < _LARGEST:  # false for NaN as well
        raise RowError("is not a finite number", where, kind=f"{_column(where)} is not a number")
    return float(value)


def optional_text(item: Row, key: str, where: str) -> str | None:
    value = item.get(key)
    return None if value is None else as_text(value, f"{where}.{key}")


def parsed_json(value: str, where: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"is not JSON: {shown(value)}", where, kind="broken JSON inside a row") from error


def written_json(value: Any, where: str) -> str:
    """Proof that `value` can be written as JSON; what cannot would fail later, far from its row."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode("utf-8").decode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError("cannot be written as JSON", where, kind="value that is not JSON") from error


def without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _column(where: str) -> str:
    """`messages[2].content` -> `content`: what rows with the same fault have in common."""
    return re.sub(r"\[\d+\]", "", where).rsplit(".", 1)[-1]


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", str: "text", list: "a list", tuple: "a list", dict: "an object"}
    name = names.get(type(value), f"a {type(value).__name__}")
    if isinstance(value, str):
        return f"{name} ({shown(value, 40)})"
    # A number of many digits cannot be printed (sys.set_int_max_str_digits).
    return f"{name} ({value})" if isinstance(value, (int, float)) and abs(value) < 1e15 else name


def listed(names: Iterable[Any], most: int = 12) -> str:
    listed = [shown(str(name), 40) for name in names]
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more


def shown(text: str, width: int = 80) -> str:
    """Shown to a person: at most `width` characters, control characters escaped, in quotes."""
    shown = text if len(text) <= width else text[: width - 3] + "..."
    return ascii(shown) if not shown.isprintable() else f"'{shown}'"
