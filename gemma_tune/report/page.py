"""The page: what the other modules found, in one HTML file that asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gemma_tune import __version__, console
from gemma_tune.report import answers, chart, curves, data, evaluation, head, mask, plan, provenance
from gemma_tune.report.curves import Chart
from gemma_tune.report.read import RunFiles
from gemma_tune.report.words import count, cut, when

TEMPLATES = Path(__file__).parent / "templates"
LARGEST = 1_400_000
"""Bytes of a page. One that is larger is made again with less in it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of what can be long is shown: prompts, steps between the first and the last, characters of a text."""

    prompts: int = 40
    between: int = 8
    characters: int = 1200
    rows: int = 3

    def halved(self) -> Limits:
        return replace(
            self,
            prompts=self.prompts // 2,
            between=self.between // 2,
            characters=max(100, self.characters // 2),
            rows=self.rows // 2,
        )


def render(files: RunFiles) -> str:
    """The whole page, at most `LARGEST` bytes.

    Texts of data and models are escaped twice over: Jinja escapes what HTML would act on, and characters that reorder
    or hide text become their numbers, wherever they stand. Should that have a hole, the page's policy lets no script
    run but ours, which is named by its hash.
    """
    limits = Limits()
    while True:
        page = console.printable(_render(files, limits))
        if len(page.encode("utf-8")) <= LARGEST or not limits.prompts:
            return page
        limits = limits.halved()


def _render(files: RunFiles, limits: Limits) -> str:
    return _environment().get_template("page.html").render(_content(files, limits))


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content(files: RunFiles, limits: Limits) -> dict[str, Any]:
    """Every name that the template has."""
    script, style = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("script.js", "style.css"))
    kind, status = head.status(files)
    stage = str(files.record.get("stage", ""))
    resumed = provenance.resumed(files)
    room = (files.plan.get("machine") or {}).get("memory_bytes")
    charts = curves.make_charts(stage, files.metrics, estimate=plan.estimated(files.plan), room=room, resumed=resumed)
    segments, segments_left_out = provenance.segments(files)
    groups = plan.groups(files.plan)
    found = {
        "version": __version__,
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        "style": Markup(style),
        "folder": str(files.folder),
        "quoted_folder": head.quoted(files),
        "title": head.title(files),
        "subtitle": head.subtitle(files),
        "status_kind": kind,
        "status": status,
        "finished": kind == "finished",
        "dated": when(files.record.get("finished") or files.record.get("started")),
        "machine": str((files.record.get("machine") or {}).get("name") or ""),
        "figures": head.figures(files),
        "cost": head.cost(files),
        "commands": head.commands(files),
        "gaps": files.gaps,
        "charts": [_chart(one) for one in charts],
        "curves_lead": _curves_lead(bool(resumed)),
        "history": evaluation.history(files),
        "unused": ", ".join(curves.unused_keys(stage, files.metrics)[:40]),
        "answers": answers.make_answers(
            files.samples,
            files.record,
            prompts=limits.prompts,
            between=limits.between,
            characters=limits.characters,
        ),
        "data": data.make_data(files),
        "rows": mask.rows(files.record)[: limits.rows],
        "mask_lead": _MASK_LEADS.get(stage, "The first rows of the training, token by token."),
        "groups": groups,
        "keyword_count": plan.keyword_count(groups),
        "notes": plan.notes(files.plan),
        "recipe": cut(files.recipe, 20_000),
        "memory": plan.make_memory(files),
        "evaluation": evaluation.tables(files.evaluation),
        "evaluation_about": evaluation.about(files.evaluation) if files.evaluation else "",
        "held_out": evaluation.held_out_table(files),
        "facts": provenance.facts(files),
        "segments": segments,
        "segments_left_out": segments_left_out,
        "versions": provenance.versions(files),
        "weights": provenance.weights(files),
    }
    return found | {"sections": _sections(found)}


def _sections(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(id, name) of the sections that the page has."""
    there = {
        "curves": ("Curves", found["charts"]),
        "answers": ("Answers", found["answers"].prompts),
        "data": ("Data", True),
        "mask": ("Loss mask", True),
        "plan": ("Plan", found["groups"]),
        "memory": ("Memory", found["memory"]),
        "evaluation": ("Evaluation", True),
        "provenance": ("Provenance", True),
    }
    return [(name, text) for name, (text, shown) in there.items() if shown]


_MASK_LEADS = {
    "reward": "The first pairs of the training. The reward is read at the last token of an answer.",
    "dpo": "The first pairs of the training, token by token.",
    "kto": "The first judged answers of the training, token by token.",
    "ppo": "The first prompts of the training. They are given; what the model answers is trained.",
}


def _curves_lead(resumed: bool) -> str:
    text = "Grey is training, smoothed where it is noisy; blue is held out. Point at a chart, or use the arrow keys."
    return f"{text} Dotted upright lines: the run was resumed there." if resumed else text


def _chart(one: Chart) -> dict[str, Any]:
    sheet = one.sheet
    missing = [
        f"{count(series.missing_count)} {'step has' if series.missing_count == 1 else 'steps have'} no finite value "
        f"({series.name}): {', '.join(map(count, series.missing))}"
        f"{' and more' if series.missing_count > len(series.missing) else ''}"
        for series in one.series
        if series.missing_count
    ]
    return {
        "title": sheet.title,
        "unit": sheet.unit,
        "about": sheet.about,
        "wide": sheet.wide,
        "drawings": chart.drawings(one),
        "data": chart.data(one),
        "missing": "; ".join(missing),
        "last": [
            {
                "name": series.name,
                "named": chart.named(one, series),
                "role": series.role,
                "text": chart.shown(sheet, series.last[1]),
            }
            for series in one.series
        ],
    }
