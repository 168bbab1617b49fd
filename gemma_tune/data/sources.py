"""Where rows come from: named sets, hub sets, local files, a function of the user's.

A new named set is one function: what a row becomes, under a decorator that says where the rows are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from gemma_tune.data import judgements, preferences, prompt_rows, rows
from gemma_tune.data.cells import SourceRow
from gemma_tune.data.files import read_file, suffix_of
from gemma_tune.data.prompt_rows import Asked
from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Example, Judged, Preference
from gemma_tune.recipe.functions import UserFunction, failure, is_function, load_user_function
from gemma_tune.recipe.shipped import sample_file

Wanted = Literal["examples", "preferences", "judged", "prompts"]
"""What a stage makes of its rows: conversations and documents (sft), pairs of answers (reward, dpo), judged answers
(kto), which it makes of pairs as well, or prompts (ppo), which it makes of all but documents."""
Place = Literal["function", "hub", "file"]
"""What a source's name is: a function by its file, a set of the hub, or a data file."""
Read = TypeVar("Read", bound=Callable[..., Example | Answered])


@dataclass(frozen=True, slots=True)
class Named:
    """A set that has a name here: its hub id, its training split, and what a row of it becomes."""

    name: str
    hub: str
    split: str
    holds: Wanted
    read: Callable[[Mapping[str, Any]], Example | Answered]


NAMED: dict[str, Named] = {}


def named(name: str, *, hub: str, split: str = "train", holds: Wanted = "examples") -> Callable[[Read], Read]:
    """Register a set under `name`. The function below the decorator turns one row into what the set holds."""

    def register(read: Read) -> Read:
        NAMED[name] = Named(name, hub, split, holds, read)
        return read

    return register


@named("ultrachat", hub="HuggingFaceH4/ultrachat_200k", split="train_sft")
def ultrachat(row: Mapping[str, Any]) -> Example:
    """UltraChat 200k (MIT): filtered dialogues with ChatGPT. Columns `prompt`, `prompt_id`, `messages`."""
    return rows.messages(row)


@named("ultrachat_original", hub="stingning/ultrachat")
def ultrachat_original(row: Mapping[str, Any]) -> Example:
    """UltraChat (MIT): columns `id`, `data`; all turns of `data`, user first."""
    return rows.string_list(row)


@named("english_quotes", hub="Abirate/english_quotes")
def english_quotes(row: Mapping[str, Any]) -> Example:
    """2,508 quotes (CC-BY-4.0): columns `quote`, `author`, `tags`; each row is one conversation."""
    return rows.quotes(row)


@named("ultrafeedback", hub="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs", holds="preferences")
def ultrafeedback(row: Mapping[str, Any]) -> Preference:
    """UltraFeedback (MIT): columns `prompt`, `chosen`, `rejected` (whole chats), `score_chosen`, `score_rejected`."""
    return preferences.preference(row)


@named("hh_rlhf", hub="Anthropic/hh-rlhf", holds="preferences")
def hh_rlhf(row: Mapping[str, Any]) -> Preference:
    """Helpful and harmless dialogues (MIT) as text: columns `chosen`, `rejected`."""
    return preferences.dialogue_preference(row)


@named("kto_mix", hub="trl-lib/kto-mix-14k", holds="judged")
def kto_mix(row: Mapping[str, Any]) -> Judged:
    """KTO mix 14k: columns `prompt` and `completion` (lists of messages), `label`."""
    return judgements.judged(row)


UNTRAINABLE_SPLITS: dict[tuple[str, Wanted], tuple[str, str]] = {
    ("HuggingFaceH4/ultrachat_200k", "examples"): (r"_gen$", "_sft"),
    ("HuggingFaceH4/ultrafeedback_binarized", "examples"): (r"_gen$", "_sft"),
    ("HuggingFaceH4/ultrafeedback_binarized", "preferences"): (r"_(gen|sft)$", "_prefs"),
    ("HuggingFaceH4/ultrafeedback_binarized", "judged"): (r"_(gen|sft)$", "_prefs"),
}
"""Hub id, what is wanted -> pattern of splits that are made for something else, and what to write in its place.

Rows of `_gen` are prompts to generate from, those of `_sft` are made for sft.
"""


@dataclass
class Opened:
    """A source that is ready to be read, once.

    Attributes:
        label: how its rows are named to a person.
        rows: its rows; a value is a mapping, an example, or the `RowError` that says why there is none.
        to_example: turns the value of a row into an example, or into what it asks, or raises `RowError`.
    """

    label: str
    rows: Iterator[SourceRow]
    to_example: Callable[[Any], Example | Answered | Asked] = field(repr=False)

    def __iter__(self) -> Iterator[SourceRow]:
        return self.rows


def open_source(source: Mapping[str, Any], *, wanted: Wanted = "examples", streaming: bool = False) -> Opened:
    """Open what a recipe calls a source.

    Args:
        source: the keys of `recipe.schema.Source`; only `name` is needed.
        wanted: what its rows are read as.
        streaming: read a hub set over the network, row by row, instead of downloading it first.

    Raises:
        UserError: the name is no set, file, hub id or function; the set holds something else; a file cannot be read.
        AccessError: the hub cannot be reached or refuses.
    """
    name = source["name"]
    known = NAMED.get(name)
    if known and wanted not in ("prompts", known.holds) and (known.holds, wanted) != ("preferences", "judged"):
        raise _other_stage(known, wanted)
    place, found_at = place_of(name)
    if place == "function":
        found = _called(load_user_function(name))
    elif place == "hub":
        found = _hub_rows(found_at, name, known.split if known else "train", source, wanted, streaming)
    else:
        _no_hub_keys(name, source)
        found = read_file(found_at)
    limit = source.get("limit")
    return Opened(name, islice(found, limit) if limit else found, _reader(source, known, wanted))


def place_of(name: str) -> tuple[Place, str]:
    """Where the rows of source `name` are: a function's file, a hub id, or the path of a data file. Opens nothing.

    Raises:
        UserError: the name is no set, file, hub id or function.
    """
    if re.match(r"https?://", name):
        raise UserError(f"{name!r} is an address", where="data.sources", fix="download the file and give its path")
    if is_function(name):
        return "function", str(Path(name.partition(".py")[0] + ".py").expanduser())
    if name in NAMED:
        return "hub", NAMED[name].hub
    if name.startswith("sample:"):
        return "file", str(sample_file(name.removeprefix("sample:")))
    if suffix_of(name) or name.startswith((".", "/", "~")) or Path(name).exists():
        return "file", str(Path(name).expanduser())
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return "hub", name
    raise _unknown(name)


def _reader(
    source: Mapping[str, Any], known: Named | None, wanted: Wanted
) -> Callable[[Any], Example | Answered | Asked]:
    format, columns = source.get("format") or "auto", dict(source.get("columns") or {})
    if known and format == "auto" and not columns:
        read = partial(_read_named, known)
        return (lambda row: prompt_rows.asked(read(row))) if wanted == "prompts" else read
    if wanted == "preferences":
        return partial(preferences.normalise_pair, format=format, columns=columns)
    if wanted == "judged":
        return partial(judgements.normalise_judged, format=format, columns=columns)
    if wanted == "prompts":
        return partial(prompt_rows.normalise_prompt, format=format, columns=columns)
    return partial(rows.normalise, format=format, columns=columns)


_HELD: dict[Wanted, tuple[str, str]] = {
    "examples": ("no pairs: a set for sft", "sft"),
    "preferences": ("pairs of answers: a set for reward, dpo and kto", "dpo, reward or kto"),
    "judged": ("single answers that are judged: a set for kto", "kto"),
}
"""What a named set holds -> in words, and the stages that it is for."""


def _other_stage(known: Named, wanted: Wanted) -> UserError:
    what, stages = _HELD[known.holds]
    fitting = ("preferences", "judged") if wanted == "judged" else (wanted,)
    others = ", ".join(one.name for one in NAMED.values() if one.holds in fitting)
    return UserError(
        f"{known.name!r} holds {what}",
        where="data.sources",
        fix=f"set stage: {stages}, or name another set: {others}",
    )


def _read_named(known: Named, row: Any) -> Example | Answered:
    try:
        return known.read(row)
    except KeyError as error:
        raise rows.RowError(
            f"no column {error.args[0]!r}: the set has changed",
            fix="set data.sources.format and data.sources.columns",
            kind="missing column",
        ) from None


def _unknown(name: str) -> UserError:
    near = difflib.get_close_matches(name, NAMED, 1, 0.5)
    known = (
        f"known sets: {', '.join(NAMED)}; otherwise a hub id (owner/name), a file, sample:NAME, or ./mine.py:function"
    )
    return UserError(
        f"{name!r} is no dataset", where="data.sources", fix=f"did you mean {near[0]!r}? {known}" if near else known
    )


def _no_hub_keys(name: str, source: Mapping[str, Any]) -> None:
    for key in ("subset", "split", "revision"):
        if source.get(key) is not None:
            raise UserError(f"{key!r} means nothing for a file", where=f"data.sources: {name}", fix=f"remove {key!r}")


# --------------------------------------------------------------------------------------------------------------- hub


def _hub_rows(
    hub: str, label: str, split: str, source: Mapping[str, Any], wanted: Wanted, streaming: bool
) -> Iterator[SourceRow]:
    split = source.get("split") or split
    pattern, instead = UNTRAINABLE_SPLITS.get((hub, wanted), ("", ""))
    if pattern and re.search(pattern, split):
        what = "prompts without an answer" if split.endswith("_gen") else "conversations for sft"
        raise UserError(
            f"split {split!r} of {hub} holds {what}: nothing to train on",
            where=f"data.sources: {label}",
            fix=f"set split: {re.sub(pattern, instead, split)}",
        )
    return _load_hub(hub, label, split, source.get("subset"), source.get("revision"), streaming)


def _load_hub(
    hub: str, label: str, split: str, subset: str | None, revision: str | None, streaming: bool
) -> Iterator[SourceRow]:
    """The one place that asks the hub for data. Lazy: nothing is fetched before the first row is asked for."""
    import datasets

    try:
        table = datasets.load_dataset(hub, name=subset, split=split, revision=revision, streaming=streaming)
        for number, row in enumerate(table, 1):
            yield SourceRow(number, row, f"{label} row {number:,}")
    except GemmaTuneError:
        raise
    except Exception as error:
        raise _explained(error, hub, label, revision) from error


def _explained(error: Exception, hub: str, label: str, revision: str | None) -> GemmaTuneError:
    """`datasets` reports a wrong split or subset as ValueError; all else is the hub's."""
    text = str(error).strip()
    where = f"data.sources: {label}"
    if isinstance(error, ValueError) and re.search(r"[Uu]nknown split|Bad split|Should be one of", text):
        return UserError(text.splitlines()[0], where=where, fix="set data.sources.split to one of these")
    if isinstance(error, ValueError) and ("BuilderConfig" in text or "Config name is missing" in text):
        return UserError(" ".join(text.split()), where=where, fix="set data.sources.subset to one of these")
    if type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError"):
        return UserError(f"{hub} holds no data files that can be read", where=where, fix="check the id and the subset")
    if isinstance(error, RuntimeError) and "scripts are no longer supported" in text:
        return UserError(
            f"{hub} is a dataset script; no code of the hub is run", where=where, fix="use a copy in Parquet, or a file"
        )
    from gemma_tune.plan.hub import explain

    if type(error).__name__ == "DatasetNotFoundError":
        error = _why_not_found(hub, revision) or error
    return explain(error, hub, repo_type="dataset", revision=revision)


def _why_not_found(hub: str, revision: str | None) -> Exception | None:
    """`datasets` calls a missing, a gated and a private set "not found", and hides the hub's answer: ask again."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(hub, revision=revision)
        HfApi().auth_check(hub, repo_type="dataset")
    except Exception as error:
        return error
    return None


# ------------------------------------------------------------------------------------------------- a function by path


def _called(function: UserFunction) -> Iterator[SourceRow]:
    path, name = function.path, function.name
    try:
        found = function.call()
        if isinstance(found, (str, bytes, Mapping, Conversation, Document, Preference, Judged)) or not hasattr(
            found, "__iter__"
        ):
            raise UserError(
                f"{name} returned {type(found).__name__}, not rows", where=str(path), fix="yield one dict per row"
            )
        for number, row in enumerate(found, 1):
            yield SourceRow(number, row, f"{path}:{name} row {number:,}")
    except GemmaTuneError:
        raise
    except Exception as error:
        raise UserError.of([failure(error, path)]) from error
