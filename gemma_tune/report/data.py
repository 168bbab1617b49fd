"""The data of a run: where it came from, what was dropped, what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.report.head import chosen
from gemma_tune.report.read import RunFiles
from gemma_tune.report.words import count, cut, is_number, share, value

SHOWN = 60
"""Sources, and kinds of drops, that are listed at most."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of the recipe: its name, rows that were read, and what else the recipe says of it."""

    name: str
    rows: str
    licence: str
    about: str


@dataclass(frozen=True, slots=True)
class Event:
    """Rows that were dropped, repaired or noted, why, and where the first one is."""

    kind: str
    name: str
    rows: str
    first: str


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a bar: `width` in percent; `kind` is its class."""

    name: str
    text: str
    width: float
    kind: str


@dataclass(frozen=True, slots=True)
class Data:
    """What a report says of the data."""

    sources: tuple[Source, ...]
    events: tuple[Event, ...]
    rows: tuple[Share, ...]
    tokens: tuple[Share, ...]
    facts: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]
    left_out: int


def make_data(files: RunFiles) -> Data:
    """From run.json's data report and the plan's sources; empty parts where a run has none."""
    data = files.record.get("data") or {}
    report = data.get("report") or {}
    sources = chosen(files.plan, "data").get("sources") or []
    read = report.get("read") or {}
    listed = [_source(one, read) for one in sources if isinstance(one, Mapping)]
    named = {str(one.get("name")) for one in sources if isinstance(one, Mapping)}
    listed += [Source(name, count(rows), "", "") for name, rows in read.items() if not _named(name, named)]
    events = [
        Event(kind, name, count(rows), cut((report.get("first") or {}).get(name, ""), 120))
        for kind in ("dropped", "repaired", "noted")
        for name, rows in sorted((report.get(kind) or {}).items(), key=lambda pair: -pair[1])
    ]
    return Data(
        sources=tuple(listed[:SHOWN]),
        events=tuple(events[:SHOWN]),
        rows=tuple(_row_shares(report)),
        tokens=tuple(_token_shares(report, str(files.record.get("stage")))),
        facts=tuple(_facts(files, data, report)),
        remarks=tuple(map(str, (report.get("remarks") or ())[:SHOWN])),
        left_out=max(0, len(listed) - SHOWN) + max(0, len(events) - SHOWN),
    )


def _named(label: str, names: set[str]) -> bool:
    """A label of the report begins with the source's name, and may tell parts of it apart."""
    return any(label == name or label.startswith(name) for name in names)


def _source(one: Mapping[str, Any], read: Mapping[str, Any]) -> Source:
    name = str(one.get("name"))
    rows = [number for label, number in read.items() if _named(label, {name}) and is_number(number)]
    told = {key: item for key, item in one.items() if item and key not in ("name", "licence", "license")}
    told = {key: item for key, item in told.items() if (key, item) not in (("format", "auto"), ("weight", 1.0))}
    licence = str(one.get("licence") or one.get("license") or "")
    about = ", ".join(f"{key} {value(item)}" for key, item in told.items())
    return Source(cut(name, 160), count(sum(rows)) if rows else "–", licence, cut(about, 200))


def _row_shares(report: Mapping[str, Any]) -> list[Share]:
    total = sum(number for number in (report.get("read") or {}).values() if is_number(number))
    dropped = sum(number for number in (report.get("dropped") or {}).values() if is_number(number))
    held, trained = report.get("held_out"), report.get("documents") or report.get("rows")
    if not total or not is_number(trained) or not is_number(held):
        return []
    parts = [("trained", trained, "tuned"), ("held out", held, "held"), ("dropped", dropped, "bad")]
    whole = sum(number for _, number, _ in parts) or 1
    return [
        Share(name, f"{count(number)} {name}", 100 * number / whole, kind) for name, number, kind in parts if number
    ]


def _token_shares(report: Mapping[str, Any], stage: str) -> list[Share]:
    """Of a reward model the answers: its loss is read at their last token alone."""
    tokens, trained = report.get("tokens"), report.get("trained_tokens")
    if not is_number(tokens) or not is_number(trained) or not tokens:
        return []
    names = ("in answers", "in prompts") if stage == "reward" else ("carry loss", "are read only")
    parts = [(names[0], trained, "tuned"), (names[1], tokens - trained, "rest")]
    return [
        Share(name, f"{count(number)} {name} ({share(number / tokens)})", 100 * number / tokens, kind)
        for name, number, kind in parts
        if number
    ]


def _facts(files: RunFiles, data: Mapping[str, Any], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs, judged, prompts = (report.get(name) or {} for name in ("pairs", "judged", "prompts"))
    chosen_data = chosen(files.plan, "data")
    found = [
        ("Training rows", count(report.get("rows"))),
        ("Rows are full to", share(report.get("fill")) if is_number(report.get("fill")) else "–"),
        ("Longest row", f"{count(chosen_data.get('max_length'))} tokens"),
        ("Chosen answers", f"{pairs['chosen_tokens']:.1f} tokens" if is_number(pairs.get("chosen_tokens")) else "–"),
        (
            "Rejected answers",
            f"{pairs['rejected_tokens']:.1f} tokens" if is_number(pairs.get("rejected_tokens")) else "–",
        ),
        ("Chosen is the longer one", share(pairs.get("chosen_longer"))),
        ("Good answers", count(judged.get("good"))),
        ("Bad answers", count(judged.get("bad"))),
        ("Tokens of a prompt", f"{prompts['tokens']:.1f} on average" if is_number(prompts.get("tokens")) else "–"),
        ("Longest prompt", f"{count(prompts.get('longest'))} tokens"),
        ("Fingerprint", str(data.get("fingerprint") or "–")),
    ]
    canaries = data.get("canaries")
    if isinstance(canaries, Mapping):
        repeats = ", ".join(map(count, canaries.get("repeats") or ()))
        text = f"{count(canaries.get('rows'))} rows: {count(canaries.get('count'))} secrets each, {repeats} times"
        found.insert(-1, ("Planted canaries", text))
    return [(name, text) for name, text in found if not text.startswith("–")]
