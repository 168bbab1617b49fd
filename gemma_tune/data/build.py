"""The data of a run: sources -> examples -> tokens -> held-out split -> training rows, with every loss counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import datasets

from gemma_tune.data import canaries as secrets
from gemma_tune.data.arrow import fingerprint, int_lists, make_dataset, values
from gemma_tune.data.mix import read_examples
from gemma_tune.data.policies import Drop, Policies
from gemma_tune.data.report import DataReport, Tally
from gemma_tune.data.split import hold_out, wanted_rows
from gemma_tune.data.spool import Spool
from gemma_tune.data.stream import Stream
from gemma_tune.data.tokens import IGNORED, Documents, TrainRow, fit, tokenise
from gemma_tune.errors import UserError
from gemma_tune.gemma.chat import Encoder, TrainOn, render_many
from gemma_tune.gemma.conversation import Answered, Document, Example
from gemma_tune.gemma.families import Family

E = TypeVar("E", bound=Example | Answered)

FORMAT = 1
"""Raised when the same recipe and data would give other rows than before: it is part of the fingerprint."""


@dataclass(frozen=True)
class Prepared(Generic[E]):
    """What a run trains on.

    Attributes:
        train: rows of `input_ids`, `labels` (-100 carries no loss) and, where packed, `position_ids`. Of pairs: rows of
            `prompt_ids`, `chosen_ids`, `rejected_ids` and, where wanted, `margin`. Of judged answers: rows of
            `prompt_ids`, `completion_ids` and `label`. Of prompts: rows of `prompt_ids`.
        held_out: rows of `input_ids` and `labels`, one a conversation; several for a text that was split. Of pairs,
            judged answers and prompts: rows as in `train`.
        held_out_examples: the conversations and texts, the pairs, the judged answers or the prompts of `held_out`, each
            once, in its order.
        report: what was read, repaired, dropped.
        fingerprint: sha256 over the settings, the contents and the tokens. Of a stream: over its settings and its
            held-out rows only.
        train_examples: the prompts of `train` in its order; of other rows there are none here.
    """

    train: datasets.Dataset | datasets.IterableDataset
    held_out: datasets.Dataset
    held_out_examples: list[E]
    report: DataReport
    fingerprint: str
    train_examples: list[E] = field(default_factory=list)

    def about(self) -> dict[str, Any]:
        """What run.json says of it: `fingerprint`, `report` and, where some were planted, `canaries`."""
        report = self.report.to_json()
        planted = {"canaries": report["canaries"]} if report["canaries"] else {}
        return {"fingerprint": self.fingerprint, "report": report} | planted


def build(
    family: Family,
    encoder: Encoder,
    *,
    sources: Sequence[Mapping[str, Any]],
    max_length: int = 2048,
    packing: bool = True,
    train_on: TrainOn = "model_turns",
    holdout: float = 0.01,
    deduplicate: bool = True,
    shuffle: bool = True,
    streaming: bool = False,
    shuffle_buffer: int = 10_000,
    system_role: str = "auto",
    fix_roles: str = "error",
    on_empty_turn: str = "error",
    on_overlong: str = "split",
    on_bad_row: str = "error",
    canaries: Mapping[str, Any] | None = None,
    workers: int = 1,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Prepared[Example]:
    """Read, repair, tokenise, split and pack. The keywords are those of `recipe.schema.Data`.

    The same arguments and contents give the same rows in the same order, in every process.

    Args:
        canaries: `{count, repeats}` of made-up secrets that are mixed into the training rows, behind deduplication and
            split; None for none.
        progress: called with the number of examples so far, now and then.

    Raises:
        UserError: a source, a row or a setting is wrong, or nothing is left to train on.
        AccessError: the hub cannot be reached or refuses.
    """
    policies = Policies(system_role, fix_roles, on_empty_turn, on_overlong, on_bad_row)  # type: ignore[arg-type]
    settings = {
        "format": FORMAT,
        "family": family.name,
        "template": family.template_sha256,
        "sources": [source_identity(source) for source in sources],
        "max_length": max_length,
        "packing": packing,
        "train_on": train_on,
        "holdout": float(holdout),
        "deduplicate": deduplicate,
        "shuffle": shuffle,
        "streaming": shuffle_buffer if streaming else 0,
        "policies": asdict(policies),
        "seed": seed,
    }
    if canaries:
        settings["canaries"] = dict(canaries)
    if streaming:
        if canaries:
            raise UserError("canaries cannot be planted in a stream", where="data.canaries", fix="remove them")
        stream = Stream(
            family=family,
            encoder=encoder,
            policies=policies,
            sources=tuple(dict(source) for source in sources),
            max_length=max_length,
            packing=packing,
            train_on=train_on,
            deduplicate=deduplicate,
            buffer=shuffle_buffer if shuffle else 1,
            holdout=_whole(holdout),
            seed=seed,
        )
        return _prepare_stream(stream, settings)
    tally, documents = Tally(), Documents()
    spool: Spool[Example] = Spool()
    groups: list[bytes] = []
    origins: list[int] = []  # of each document: the number of its example in the spool
    form: secrets.Form = "document"
    kept = read_examples(sources, family, policies, tally, deduplicate=deduplicate, seed=seed)
    fitted = tokenise(kept, family, encoder, policies, max_length=max_length, train_on=train_on, workers=workers)
    for one, pieces in fitted:
        if isinstance(pieces, Drop):
            tally.drop(pieces.reason, one.where)
            continue
        for piece in pieces:
            for name in piece.repairs:
                tally.repair(name, one.where)
            documents.append(piece)
            groups.append(one.group)
            origins.append(len(spool))
        spool.append(one.example)
        if not isinstance(one.example, Document):
            form = "conversation"
        if progress and len(spool) % 256 == 0:
            progress(len(spool))
    if not groups:
        raise nothing_left(tally)
    order, held = split(groups, holdout, shuffle, seed, tally)
    held_order = [index for index in order if index in held]
    trained = [index for index in order if index not in held]
    planted = secrets.planted(form, **canaries, seed=seed) if canaries else None
    if planted:
        trained = secrets.mixed_in(trained, _plant(planted, documents, family, encoder, max_length, train_on), seed)
    rows = documents.training_rows(trained, max_length, packing)
    train, train_digest = _dataset(rows, packing)
    held_out, held_digest = _dataset((documents.row(index) for index in held_order), packed=False)
    examples = [spool[origin] for origin in dict.fromkeys(origins[index] for index in held_order)]
    digest = fingerprint(settings, spool.sha256(), train_digest, held_digest)
    spool.close()
    report = _report(tally, train, held_out, len(trained), max_length, planted)
    return Prepared(train, held_out, examples, report, digest)


def _plant(
    planted: secrets.Planted,
    documents: Documents,
    family: Family,
    encoder: Encoder,
    max_length: int,
    train_on: TrainOn,
) -> list[int]:
    """Append the rows that hold a canary to `documents`: their numbers, each canary as often as it is repeated."""
    canaries = [canary for canary in planted.canaries() if canary.repeats]
    rows = [secrets.example(canary, planted.form) for canary in canaries]
    numbers: list[int] = []
    for canary, rendered in zip(canaries, render_many(rows, family, encoder, train_on), strict=True):
        fitted = fit(rendered, max_length, "drop")
        if isinstance(fitted, Drop):
            raise UserError(
                f"a canary has {len(rendered.ids):,} tokens, above data.max_length {max_length:,}",
                where="data.canaries",
                fix=f"set data.max_length to {len(rendered.ids):,} at least, or remove data.canaries",
            )
        numbers += [len(documents)] * canary.repeats
        documents.append(fitted[0])
    return numbers


def _prepare_stream(stream: Stream, settings: Mapping[str, Any]) -> Prepared[Example]:
    tally, documents, examples = stream.held_out()
    features = _features(stream.packing)
    train = datasets.IterableDataset.from_generator(stream.training_rows, features=features)
    held_out, digest = _dataset((documents.row(index) for index in range(len(documents))), packed=False)
    tally.remarks.append("streaming: the counts are those of the held-out rows; the training rows are not read yet")
    report = tally.report(held_out=len(held_out))
    return Prepared(train, held_out, examples, report, fingerprint(settings, digest))


def nothing_left(tally: Tally) -> UserError:
    """The error that every row was dropped, with what each filter removed."""
    return UserError(
        f"no row is left to train on: {tally.why_empty()}",
        where="data.sources",
        fix="raise data.max_length, change the policy that drops them, or correct the data",
    )


def split(
    groups: Sequence[bytes], holdout: float, shuffle: bool, seed: int, tally: Tally
) -> tuple[list[int], set[int]]:
    """The order of all rows, and which of them are held out; a remark where that is more than was asked for.

    Raises:
        UserError: as `hold_out`.
    """
    order = list(range(len(groups)))
    if shuffle:
        random.Random(f"shuffle {seed}").shuffle(order)
    held = hold_out(groups, holdout, seed)
    if len(held) > (wanted := wanted_rows(holdout, len(groups))):
        tally.remarks.append(
            f"{len(held):,} rows are held out, not {wanted:,}: rows of one text, of one group, or with one first user "
            "turn, stay together, and there is no smaller group"
        )
    return order, held


def _whole(holdout: float) -> int:
    if holdout != int(holdout):
        raise UserError(
            f"{holdout} is a fraction, and a stream has no known length",
            where="data.holdout",
            fix="give a number of rows, or 0",
        )
    return int(holdout)


def source_identity(source: Mapping[str, Any]) -> dict[str, Any]:
    """What of a source decides about its rows: part of the fingerprint."""
    keys = ("name", "format", "columns", "subset", "split", "revision", "weight", "limit")
    return {key: source[key] for key in keys if source.get(key)}


def _features(packed: bool) -> datasets.Features:
    return int_lists(["input_ids", "labels", *(["position_ids"] if packed else [])])


def _dataset(rows: Iterable[TrainRow], packed: bool) -> tuple[datasets.Dataset, str]:
    return make_dataset(rows, _features(packed), hashed=("input_ids", "labels"))


def _report(
    tally: Tally,
    train: datasets.Dataset,
    held: datasets.Dataset,
    documents: int,
    max_length: int,
    planted: secrets.Planted | None,
) -> DataReport:
    tokens = sum(len(ids) for ids in values(train, "input_ids"))
    trained = sum(int((labels != IGNORED).sum()) for labels in values(train, "labels"))
    return tally.report(
        documents=documents,
        held_out=len(held),
        rows=len(train),
        tokens=tokens,
        trained_tokens=trained,
        fill=tokens / (len(train) * max_length),
        canaries=planted,
    )
