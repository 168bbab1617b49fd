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
from gemma_tune.export.subject import SavedAdapter, Subject
from gemma_tune.gemma import licences
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.card import CARD
from gemma_tune.models.reference import ModelSource
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.starts import is_reward_model
from gemma_tune.train.provenance import redact

Kind = Literal["adapter", "merged", "gguf", "lora-gguf", "ollama"]

PAPERS = (CARD, licences.NOTICE_FILE, licences.LICENCE_FILE)

# A path that begins at the root or at a drive. In quotes it may hold blanks; a URL's slashes follow a word or a colon.
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<path>(?:/|[A-Za-z]:\\)[^"'\n]+)(?P=quote)""")
_BARE = re.compile(
    r"(?<![\w.:/~<*-])(?:/|[A-Za-z]:\\)(?:[^\s/\\,;'\"`(){}\[\]|<>]+[/\\])+(?P<last>[^\s/\\,;'\"`(){}\[\]|<>]*)"
)


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
    rates = any(is_reward_model(one.folder) for one in subject.adapters)
    change = change_of(subject)
    texts = licences.make_papers(subject.family.licence, change)
    texts[CARD] = make_card(
        subject, kind=kind, facts=facts, change=change, recipe=_recipe_of(subject.run_folder), rates=rates
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
    name = run.get("model", {}).get("name")
    if family is None or not isinstance(name, str):
        raise UserError("run.json does not say what was trained", where=where, fix="use the version that made the run")
    adapters = (SavedAdapter(result, 1.0),) if result.name == "adapter" else ()
    source = ModelSource(name, result, run["model"].get("revision"))
    return Subject(where, source, adapters, family, family, plan, run, run_folder)


def base_of(subject: Subject) -> str:
    """The model that was changed, as the user named it; after a full fine-tune the subject's source is the result."""
    return str(subject.run.get("model", {}).get("name") or subject.source.name)


def change_of(subject: Subject) -> str:
    """What was done to the base and when, e.g. `modified from google/gemma-3-1b-it by fine-tuning with gemma-tune on
    2026-04-01`.

    The date is that of the training where a run tells it, and today's, said to be that of the export, where none does.
    """
    base = licences.shown_base(base_of(subject))
    today = datetime.now(UTC).date().isoformat()
    if trained_on := date_of(subject.run):
        return f"modified from {base} by fine-tuning with gemma-tune on {trained_on}"
    if subject.adapters:
        return f"modified from {base} by fine-tuning; these files were written with gemma-tune on {today}"
    return f"converted from {base} with gemma-tune on {today}"


def date_of(run: Mapping[str, Any]) -> str | None:
    """The day on which a training ended, from its run.json; None where it does not say."""
    segments = run.get("segments") or [{}]
    ended = run.get("finished") or segments[-1].get("finished")
    return str(ended)[:10] if ended else None


def presentable(text: str) -> str:
    """`text` without secrets, and with every path of this machine cut to its last name."""
    text = _QUOTED.sub(lambda found: f"{found['quote']}{_cut(found['path'])}{found['quote']}", redact(text))
    return _BARE.sub(lambda found: f".../{found['last']}", text)


def _cut(path: str) -> str:
    return f".../{licences.last_name(path)}"


def _recipe_of(run_folder: Path | None) -> str:
    file = run_folder / "recipe.yaml" if run_folder is not None else None
    return file.read_text(encoding="utf-8", errors="replace") if file is not None and file.is_file() else ""
