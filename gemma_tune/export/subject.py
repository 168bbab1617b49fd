"""What is to leave: a base and the adapters on it, as they lie on the disk, and whether they belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune import console
from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family, family_of, text_only
from gemma_tune.gemma.licences import last_name
from gemma_tune.models.lora import CONFIG, WEIGHTS
from gemma_tune.models.reference import ModelSource, resolve
from gemma_tune.models.saved import find_saved
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.starts import is_reward_model
from gemma_tune.train.provenance import fingerprint


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A saved LoRA adapter.

    Attributes:
        folder: holds adapter_config.json and adapter_model.safetensors.
        weight: its share in a combination; 1.0 for a single one.
    """

    folder: Path
    weight: float


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to leave.

    Attributes:
        target: as the user named it.
        source: the base's name, folder and revision.
        adapters: none for a plain model.
        family: the generation and class that the base's config.json names.
        trained: what was trained: the text-only class of `family` where the run had `model.text_only`.
        plan, run: plan.json and run.json of the run; empty where there is none.
        run_folder: the run's, None where there is none.
    """

    target: str
    source: ModelSource
    adapters: tuple[SavedAdapter, ...]
    family: Family
    trained: Family
    plan: Mapping[str, Any]
    run: Mapping[str, Any]
    run_folder: Path | None

    def planned(self, section: str) -> dict[str, Any]:
        """Bare values of a section of plan.json; empty without a plan."""
        return {key: choice["value"] for key, choice in self.plan.get(section, {}).items()}

    @property
    def name(self) -> str:
        """What files and served models are called: as the run, or else as the model; letters, digits, `.`, `_`, `-`."""
        place = self.run_folder.absolute() if self.run_folder else self.source.name.split(":")[-1]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", last_name(str(place))).strip("-.") or "gemma"

    @property
    def measured(self) -> bool:
        """Whether the run's figures are those of what leaves: its one final result, neither scaled nor combined."""
        if self.run_folder is None:
            return False
        if not self.adapters:
            return self.source.path.resolve() == (self.run_folder / "model").resolve()
        final = (self.run_folder / "adapter").resolve()
        return len(self.adapters) == 1 and self.adapters[0].weight == 1.0 and self.adapters[0].folder.resolve() == final

    def hub_revision(self) -> str | None:
        """The base's commit; None for a folder and for packaged weights, which have no revision to ask for."""
        revision = self.source.revision
        return None if revision is None or revision.startswith("sha256:") else revision


def find_subject(
    targets: Sequence[str],
    *,
    shares: Sequence[float] = (),
    adapter: str | None = None,
    base: str | None = None,
) -> Subject:
    """Find base and adapters of `targets`, and refuse what does not belong together.

    Args:
        targets: run folder, adapter folder, model folder, hub id or packaged weights; several are a combination of
            adapters of one base, and run and plan are those of the first.
        shares: the weight of each adapter in a combination; 1.0 each if empty.
        adapter: a folder inside the target that holds the adapter, e.g. `checkpoint-40`, or an adapter of that name.
        base: where the base lies now, if it is no longer where the adapter says.

    Raises:
        UserError: nothing there, a reward model, adapters of different bases, or a base that has changed.
        AccessError: the base cannot be fetched.
    """
    if shares and len(shares) != len(targets):
        raise UserError(
            f"{len(targets)} adapters and {len(shares)} weights", where="--weights", fix="give one weight for each"
        )
    found = [_locate(target, adapter) for target in targets]
    saved = [find_saved(one) for one in found]
    if len(saved) > 1 and any(one.adapter is None for one in saved):
        plain = next(str(path) for path, one in zip(found, saved, strict=True) if one.adapter is None)
        raise UserError("this is no adapter", where=plain, fix="only adapters of one base can be combined")
    names = sorted({one.name for one in saved})
    if len(names) > 1:
        raise UserError(
            f"these adapters have different bases: {', '.join(names)}", where=", ".join(targets), fix="combine others"
        )
    first = saved[0]
    only_text = {bool(one.section("model", "text_only").get("text_only")) for one in saved}
    if len(only_text) > 1:
        raise UserError(
            "some of these adapters are for the text model alone (model.text_only), others are not",
            where=", ".join(targets),
            fix="combine adapters that were trained alike",
        )
    run_folder = _run_of(found[0])
    run = _read(run_folder, "run.json")
    source = resolve(base or first.name, None if base else first.revision, need="everything")
    family = family_of(read_json(source.path / "config.json"), where=source.name)
    for one, place in zip(saved, found, strict=True):
        if one.adapter is not None:
            _check_adapter(one.adapter)
            _check_base(_read(_run_of(place), "run.json"), read_json(one.adapter / CONFIG), source, str(one.adapter))
    adapters = tuple(
        SavedAdapter(one.adapter, share)
        for one, share in zip(saved, shares or [1.0] * len(saved), strict=True)
        if one.adapter is not None
    )
    trained = text_only(family) if only_text == {True} else family
    return Subject(" ".join(targets), source, adapters, family, trained, first.plan, run, run_folder)


def _locate(target: str, adapter: str | None) -> str:
    if adapter is None:
        return target
    places = (Path(target).expanduser() / adapter, Path(target).expanduser() / "adapter" / adapter)
    place = next((one for one in places if (one / CONFIG).is_file()), None)
    if place is None:
        raise UserError(f"there is no adapter '{adapter}'", where=target, fix=f"there are: {_adapters_in(target)}")
    return str(place)


def _adapters_in(target: str) -> str:
    folder = Path(target).expanduser()
    return ", ".join(sorted(str(file.parent.relative_to(folder)) for file in folder.glob(f"**/{CONFIG}"))) or "none"


def _run_of(target: str) -> Path | None:
    """The run that a target is or lies in: a run's own folder, or an adapter or a model inside of one."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        return None  # a hub id, which is no path below the working directory
    inside = 2 if (folder / CONFIG).is_file() else 1 if folder.absolute().name == "model" else 0
    near = (folder, *folder.absolute().parents[:inside])
    return next((one for one in near if (one / "run.json").is_file() or (one / "plan.json").is_file()), None)


def _read(folder: Path | None, name: str) -> Mapping[str, Any]:
    return read_json(folder / name) if folder is not None and (folder / name).is_file() else {}


def _check_adapter(folder: Path) -> None:
    if is_reward_model(folder):
        raise UserError(
            "this is a reward model: its adapter rates answers and gives none, and its head is no part of a Gemma",
            where=str(folder),
            fix="merge and export the run of an SFT, DPO, KTO or PPO",
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{WEIGHTS} is missing", where=str(folder), fix="an adapter in pickle form is refused")


def recorded_model(run: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """`model` of run.json, with a name, and a revision that is text or None; empty where it is not recorded.

    Raises:
        UserError: it is something else.
    """
    model = run.get("model")
    if model is None:
        return {}
    fine = isinstance(model, Mapping) and isinstance(model.get("name"), str) and model["name"]
    if not fine or not isinstance(model.get("revision"), str | None):
        raise UserError("run.json does not say what was trained", where=where, fix="use the version that made the run")
    return dict(model)


def _check_base(run: Mapping[str, Any], config: Mapping[str, Any], source: ModelSource, where: str) -> None:
    """The base is the one that was trained on, as far as its run tells: by commit, package hash or content."""
    recorded = recorded_model(run, where).get("revision") or config.get("revision")
    if not isinstance(recorded, str):
        return
    by_content = recorded.startswith("content-")
    now = fingerprint(source.path) if by_content else source.revision
    if now is None:
        console.note(f"{source.name} cannot be compared with the base of the training, which was {recorded}")
    elif now != recorded:
        raise UserError(
            f"the base has changed since the training: it is {now}, and the adapter was trained on {recorded}",
            where=f"{where} on {source.name}",
            fix="name the base as it was with --base-path, or train again",
        )
