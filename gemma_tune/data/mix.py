"""Rows of all sources as one stream: normalised, repaired, without repetitions, mixed by weight.

The same for examples, preferences, judged answers and prompts; a `_Kind` says what differs.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from gemma_tune.data.by_hand import check_by_hand
from gemma_tune.data.cells import RowError, SourceRow
from gemma_tune.data.keys import group_of, key_of, texts_of
from gemma_tune.data.pair_policies import apply_judged_policies, apply_pair_policies
from gemma_tune.data.policies import Drop, Policies, Repaired, apply_policies, apply_prompt_policies
from gemma_tune.data.prompt_rows import Asked, asked
from gemma_tune.data.report import Tally
from gemma_tune.data.sources import Opened, Wanted, open_source
from gemma_tune.errors import Problem, UserError
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Example, Judged, Preference
from gemma_tune.gemma.families import Family

E = TypeVar("E", bound=Example | Answered)

LOOK_AHEAD = 1000
"""Rows that are looked at after a bad one, to say how many more there are."""


class Kept(NamedTuple, Generic[E]):
    """An example that can be trained, where it came from, and the key that keeps it on one side of the holdout."""

    example: E
    where: str
    group: bytes


@dataclass(frozen=True, slots=True)
class _Kind(Generic[E]):
    """What a stage makes of its rows, and what is done to each."""

    wanted: Wanted
    repair: Callable[[Any], Repaired[E] | Drop]


def read_examples(
    sources: Sequence[Mapping[str, Any]],
    family: Family,
    policies: Policies,
    tally: Tally,
    *,
    deduplicate: bool = True,
    streaming: bool = False,
    seed: int = 0,
) -> Iterator[Kept[Example]]:
    """Every usable example, once.

    Several sources are drawn from by weight, without repetition, until one runs out; the draws depend on `seed` alone.

    Raises:
        UserError: a row is bad and `policies` say `error`; a source cannot be read.
    """
    kind = _Kind("examples", partial(apply_policies, family=family, policies=policies))
    return _mixed(kind, sources, family, policies, tally, deduplicate, streaming, seed)


def read_preferences(
    sources: Sequence[Mapping[str, Any]],
    family: Family,
    policies: Policies,
    tally: Tally,
    *,
    margins: bool = False,
    deduplicate: bool = True,
    seed: int = 0,
) -> Iterator[Kept[Preference]]:
    """Every usable pair, once, as `read_examples` reads examples.

    Args:
        margins: a row without ratings is a bad row.

    Raises:
        UserError: as `read_examples`.
    """
    repair = partial(apply_pair_policies, family=family, policies=policies, margins=margins)
    return _mixed(_Kind("preferences", repair), sources, family, policies, tally, deduplicate, False, seed)


def read_judged(
    sources: Sequence[Mapping[str, Any]],
    family: Family,
    policies: Policies,
    tally: Tally,
    *,
    deduplicate: bool = True,
    seed: int = 0,
) -> Iterator[Kept[Judged]]:
    """Every usable judged answer, once, as `read_examples` reads examples. A pair gives two, the chosen one first.

    An answer that is found both good and bad is kept twice, and noted: to one person it is good.

    Raises:
        UserError: as `read_examples`.
    """
    repair = partial(apply_judged_policies, family=family, policies=policies)
    seen: set[bytes] = set()
    # Repetitions are looked for among the answers: pairs of one prompt often share one of theirs.
    for one in _mixed(_Kind("judged", repair), sources, family, policies, tally, False, False, seed):
        for judged in one_by_one(one.example):
            key = key_of(judged)
            if deduplicate and key in seen:
                tally.drop("repetition", one.where)
                continue
            if key_of(replace(judged, good=not judged.good)) in seen:
                tally.note("answer that is judged both good and bad", one.where)
            seen.add(key)
            yield Kept(judged, one.where, one.group)


def read_prompts(
    sources: Sequence[Mapping[str, Any]],
    family: Family,
    policies: Policies,
    tally: Tally,
    *,
    deduplicate: bool = True,
    seed: int = 0,
) -> Iterator[Kept[Conversation]]:
    """Every usable prompt, once, as `read_examples` reads examples: what comes before the last turn of the model.

    Raises:
        UserError: as `read_examples`.
    """

    def repair(row: Asked) -> Repaired[Conversation] | Drop:
        return apply_prompt_policies(row.prompt, family, policies)

    return _mixed(_Kind("prompts", repair), sources, family, policies, tally, deduplicate, False, seed)


def one_by_one(row: Answered) -> Iterator[Judged]:
    """A judged answer as it is, a pair as two of them."""
    if isinstance(row, Judged):
        yield row
        return
    for answer, good in ((row.chosen, True), (row.rejected, False)):
        yield Judged(row.prompt, answer, good, row.tools, row.thinking, row.group)


def _mixed(
    kind: _Kind[E],
    sources: Sequence[Mapping[str, Any]],
    family: Family,
    policies: Policies,
    tally: Tally,
    deduplicate: bool,
    streaming: bool,
    seed: int,
) -> Iterator[Kept[E]]:
    seen: set[bytes] | None = set() if deduplicate else None
    opened = [open_source(source, wanted=kind.wanted, streaming=streaming) for source in sources]
    streams = [_usable(one, kind, family, policies, tally, seen) for one in opened]
    if len(streams) == 1:
        yield from streams[0]
        return
    weights = [float(source.get("weight") or 1.0) for source in sources]
    draw = random.Random(f"mix {seed}")
    while True:
        index = draw.choices(range(len(streams)), weights)[0]
        kept = next(streams[index], None)
        if kept is None:
            tally.remarks.append(f"the mix ends where {opened[index].label} ran out of rows")
            return
        yield kept


def _usable(
    source: Opened, kind: _Kind[E], family: Family, policies: Policies, tally: Tally, seen: set[bytes] | None
) -> Iterator[Kept[E]]:
    rows = iter(source)
    for row in rows:
        tally.row(source.label)
        try:
            read = _example(row.value, source, kind.wanted)
            repaired = kind.repair(read)
            key = b"" if isinstance(repaired, Drop) else key_of(repaired.example)
        except RowError as error:
            if policies.on_bad_row == "error":
                raise _bad_rows(error, row, rows, source, kind) from error
            tally.drop(error.kind, row.where)
            continue
        if isinstance(repaired, Drop):
            tally.drop(repaired.reason, row.where)
            continue
        if seen is not None:
            if key in seen:
                tally.drop("repetition", row.where)
                continue
            seen.add(key)
        for name in repaired.repairs:
            tally.repair(name, row.where)
        how = "read" if kind.wanted == "prompts" else "trained"
        _note_oddities(repaired.example, family, tally, row.where, how)
        named = read.group if isinstance(read, Asked) else ""
        yield Kept(repaired.example, row.where, group_of(repaired.example, named))


_BY_HAND: dict[Wanted, tuple[type, ...]] = {
    "examples": (Conversation, Document),
    "preferences": (Preference,),
    "judged": (Judged, Preference),
    "prompts": (Conversation, Document, Preference, Judged),
}


def _example(value: Any, source: Opened, wanted: Wanted) -> Example | Answered | Asked:
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, (Conversation, Document, Preference, Judged)):
        return source.to_example(value)
    if not isinstance(value, _BY_HAND[wanted]):
        trained = {"examples": "conversations", "preferences": "preferences", "judged": "judged answers"}[wanted]
        stage = "kto" if isinstance(value, Judged) else "reward or dpo" if isinstance(value, Preference) else "sft"
        raise RowError(
            f"is a {type(value).__name__}; this stage trains on {trained}",
            fix=f"set stage: {stage}, or yield what the stage needs",
            kind="example of another stage",
        )
    check_by_hand(value)
    return asked(value) if wanted == "prompts" else value


def _bad_rows(
    error: RowError, row: SourceRow, rest: Iterable[SourceRow], source: Opened, kind: _Kind[Any]
) -> UserError:
    """The first bad row, and how many of the next ones are bad as well: one by one would be a long evening."""
    found: dict[str, tuple[RowError, SourceRow]] = {error.kind: (error, row)}
    counts = Counter({error.kind: 1})
    try:
        for other in islice(rest, LOOK_AHEAD):
            try:
                kind.repair(_example(other.value, source, kind.wanted))
            except RowError as another:
                found.setdefault(another.kind, (another, other))
                counts[another.kind] += 1
    except UserError:
        pass  # the file itself breaks further on; the first bad row is what has to be mended now
    problems = []
    for name, (first, place) in list(found.items())[:20]:
        more = f" (and {counts[name] - 1:,} more rows like it)" if counts[name] > 1 else ""
        problems.append(Problem(f"{first}{more}", place.where, first.fix or "correct it, or set data.on_bad_row: drop"))
    return UserError(problems[0].what, problems=problems)


def _note_oddities(example: Example | Answered, family: Family, tally: Tally, where: str, how: str) -> None:
    texts = texts_of(example)
    spelled = _spellings(family)
    if any(spelled.search(text) for text in texts):
        tally.note(f"text that looks like a control token, {how} as plain text", where)
    if any("\0" in text for text in texts):
        tally.note("NUL character", where)


def _spellings(family: Family) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, family.tokens)))  # re caches compiled patterns
