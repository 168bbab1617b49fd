"""The papers of a folder that can be given away: notice, licence pointer and model card.

Only what is known is written: what a run recorded, what the export measured. Nothing of the user's machine is: secrets
are masked and paths are cut to their last name. What the base's licence asks for is in `gemma.licences`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from gemma_tune.errors import UserError
from gemma_tune.export.card import make_card
from gemma_tune.export.subject import SavedAdapter, Subject, recorded_model
from gemma_tune.gemma import licences
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.card import CARD
from gemma_tune.models.reference import ModelSource
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.starts import is_reward_model
from gemma_tune.train.provenance import redact

Kind = Literal["adapter", "merged", "gguf", "lora-gguf", "ollama"]

PAPERS = (CARD, licences.NOTICE_FILE, licences.LICENCE_FILE)

# Where a path of a machine begins: a file's address, a drive, a share, the home folder, a folder above, or the root.
# The slashes of other addresses follow a word or a colon and come in twos.
_BEGINS = (
    r"(?:file:/+|[A-Za-z]:[/\\]+|(?<![^\s\"'`=:,(\[{|])\\{2,}(?=[A-Za-z0-9][\w.$-]*\\)|~\w*/+"
    r"|(?:[\w.-]+/)*\.\./+|(?<!:)/+|(?<=:)/(?!/))"
)
_PART = r"[^\s/\\,;'\"`(){}\[\]|<>]"
# In quotes a path may hold blanks, and so it may as a whole value of YAML or a whole cell of a table.
_QUOTED = re.compile(rf"""(?P<quote>["'`])(?P<key>[\w.]+=)?(?P<path>{_BEGINS}[^"'`\n]+)(?P=quote)""")
_VALUE = re.compile(
    rf"(?P<before>(?:^|[{{,])[ \t]*(?:- +)*[\w.-]+: +|^[ \t]*(?:- +)+|\| )"
    rf"(?P<path>{_BEGINS}(?:{_PART}|[/\\])+(?: +(?!#)(?:{_PART}|[/\\])+)+)(?=[ \t]*(?:[,}}\]|]| #|$))",
    re.MULTILINE,
)
_BARE = re.compile(rf"(?<![\w./~<*-]){_BEGINS}(?:{_PART}+[/\\]+)+(?P<last>{_PART}*)")


def write_papers(folder: Path, subject: Subject, *, kind: Kind, facts: Mapping[str, Any]) -> None:
    """Write README.md, NOTICE and LICENSE.txt into `folder`.

    Args:
        folder: what is to be given away; it exists.
        subject: what it was made from.
        kind: what it holds. `merged` is any whole model in safetensors, also one that was trained as a whole.
        facts: what the export knows: scalars, and tables of figures under a name, e.g. `{"format": "q8_0",
            "proof": {"largest_logit_difference": 1e-5}}`.
    """
    for name, text in make_papers(subject, kind=kind, facts=facts).items():
        (folder / name).write_text(text, encoding="utf-8")


def make_papers(subject: Subject, *, kind: Kind, facts: Mapping[str, Any]) -> dict[str, str]:
    """File name -> text, as `write_papers` writes them. The recipe is read from the run folder."""
    origin = origin_of(subject)
    rates = any(is_reward_model(one.folder) for one in subject.adapters)
    change = change_of(subject)
    texts = licences.make_papers(subject.family.licence, change)
    texts[CARD] = make_card(
        subject,
        kind=kind,
        facts=facts,
        origin=origin,
        change=change,
        recipe=_recipe_of(subject.run_folder),
        rates=rates,
    )
    return {name: presentable(text) for name, text in texts.items()}


def recorded_subject(run_folder: Path) -> Subject:
    """What a run made, as far as its run.json and plan.json tell. The base is not looked for: papers do not need it.

    Raises:
        UserError: the run is not finished, or holds no result.
    """
    run = read_json(run_folder / "run.json")
    plan = read_json(run_folder / "plan.json") if (run_folder / "plan.json").is_file() else {}
    where = str(run_folder)
    result = next((one for one in (run_folder / "adapter", run_folder / "model") if one.is_dir()), None)
    if run.get("status") != "finished" or result is None:
        raise UserError(
            f"this run is not finished: its status is {run.get('status')}", where=where, fix="let it finish"
        )
    family = FAMILIES.get(str(run.get("family")))
    model = recorded_model(run, where)
    if family is None or not model:
        raise UserError("run.json does not say what was trained", where=where, fix="use the version that made the run")
    adapters = (SavedAdapter(result, 1.0),) if result.name == "adapter" else ()
    source = ModelSource(model["name"], result, model.get("revision"))
    return Subject(where, source, adapters, family, family, plan, run, run_folder)


def origin_of(subject: Subject) -> licences.Origin:
    """The model that was changed, as its run recorded it, or else as it was found."""
    model = recorded_model(subject.run, str(subject.run_folder or subject.target))
    if model:
        return licences.Origin(model["name"], model.get("revision"))
    return licences.Origin(subject.source.name, subject.source.revision)


def change_of(subject: Subject) -> str:
    """What was done to the base and when, e.g. `modified from google/gemma-3-1b-it by fine-tuning with gemma-tune on
    2026-04-01`.

    The date is that of the training where this is what a run ended with, and else today's, said to be that of the
    export: when a checkpoint or a combination was made is not recorded.
    """
    base = origin_of(subject).shown
    today = datetime.now(UTC).date().isoformat()
    if subject.measured and (trained_on := date_of(subject.run)):
        return f"modified from {base} by fine-tuning with gemma-tune on {trained_on}"
    if subject.adapters or subject.run:
        return f"modified from {base} by fine-tuning; these files were written with gemma-tune on {today}"
    return f"converted from {base} with gemma-tune on {today}"


def date_of(run: Mapping[str, Any]) -> str | None:
    """The day on which a training ended, from its run.json; None where it does not say."""
    segments = run.get("segments") or [{}]
    ended = run.get("finished") or segments[-1].get("finished")
    return str(ended)[:10] if ended else None


def presentable(text: str) -> str:
    """`text` without secrets, and with every path of this machine cut to its last name."""
    text = _QUOTED.sub(
        lambda found: f"{found['quote']}{found['key'] or ''}{_cut(found['path'])}{found['quote']}", redact(text)
    )
    text = _VALUE.sub(lambda found: f"{found['before']}{_cut(found['path'])}", text)
    return _BARE.sub(lambda found: f".../{found['last']}", text)


def _cut(path: str) -> str:
    return f".../{licences.last_name(path)}"


def _recipe_of(run_folder: Path | None) -> str:
    file = run_folder / "recipe.yaml" if run_folder is not None else None
    return file.read_text(encoding="utf-8", errors="replace") if file is not None and file.is_file() else ""
