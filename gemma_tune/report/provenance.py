"""Where a run comes from: versions, code, machine, data, and the parts that it was made in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gemma_tune.report.read import RunFiles, mapping
from gemma_tune.report.words import count, cut, duration, moment, size, when

SEGMENTS = 50
"""Parts of a run that are listed; the first and the newest of more."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a run: from one start to its end."""

    steps: str
    started: str
    took: str
    status: str


def facts(files: RunFiles) -> list[tuple[str, str]]:
    """(name, value), what a reader needs to make the run again."""
    record = files.record
    model, template, git = (mapping(record.get(name)) for name in ("model", "template", "git"))
    machine = mapping(record.get("machine"))
    found = [
        ("Command", shlex.join(map(str, record.get("command") or ()))),
        ("Model", str(model.get("name") or "")),
        ("Revision", str(model.get("revision") or "")),
        ("Licence of the model", str(model.get("licence") or "")),
        ("Chat template", " ".join(str(template[key]) for key in ("file", "revision") if template.get(key))),
        ("Template sha256", str(template.get("sha256") or "")),
        ("Data fingerprint", str(mapping(record.get("data")).get("fingerprint") or "")),
        ("Seed", str(record.get("seed", ""))),
        ("Machine", _machine(machine)),
        ("Code", f"{git.get('commit')}{', with changes' if git.get('dirty') else ''}" if git.get("commit") else ""),
    ]
    return [(name, cut(text, 400)) for name, text in found if text]


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return ""
    parts = [str(machine.get("name")), f"{size(machine.get('memory_bytes'))} a device"]
    if (machine.get("world_size") or 1) > 1:
        parts.append(f"{machine['world_size']} processes")
    if (machine.get("nodes") or 1) > 1:
        parts.append(f"{machine['nodes']} nodes")
    return ", ".join(parts)


def versions(files: RunFiles) -> list[tuple[str, str]]:
    """(package, version)."""
    return [(str(name), str(version)) for name, version in mapping(files.record.get("versions")).items()]


def segments(files: RunFiles) -> tuple[list[Segment], int]:
    """The parts of the run, and how many of them are not listed."""
    every = [one for one in files.record.get("segments") or () if isinstance(one, Mapping)]
    listed = every if len(every) <= SEGMENTS else [every[0], *every[1 - SEGMENTS :]]
    return [_segment(one) for one in listed], len(every) - len(listed)


def _segment(one: Mapping[str, Any]) -> Segment:
    begin, end = moment(one.get("started")), moment(one.get("finished"))
    took = duration((end - begin).total_seconds()) if begin and end else "–"
    steps = f"{count(one.get('from_step'))} to {count(one.get('to_step'))}"
    return Segment(steps, when(one.get("started")), took, str(one.get("status") or "no end written"))


def resumed(files: RunFiles) -> list[int]:
    """Steps after which the run was resumed."""
    every = [one for one in files.record.get("segments") or () if isinstance(one, Mapping)]
    return sorted({int(one["from_step"]) for one in every[1:] if one.get("from_step")})


def weights(files: RunFiles) -> list[tuple[str, str, str]]:
    """(file, size, sha256) of the result."""
    written = mapping(mapping(files.record.get("results")).get("weights"))
    return [
        (f"{written.get('folder')}/{name}", size(mapping(one).get("size")), str(mapping(one).get("sha256") or ""))
        for name, one in list(mapping(written.get("files")).items())[:SEGMENTS]
    ]
