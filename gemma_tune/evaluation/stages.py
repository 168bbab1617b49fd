"""What DPO, KTO and PPO measure of their held-out rows, by the stage's own trainer, which does not train here."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gemma_tune.errors import UserError
from gemma_tune.evaluation.held_out import Rows
from gemma_tune.evaluation.target import Opened, Target, Voice, start_of
from gemma_tune.models.reference import ModelSource
from gemma_tune.models.roles import TRAINED, belongs, speak_as, speaking_as
from gemma_tune.plan.types import Plan
from gemma_tune.train.checkpoint import Search
from gemma_tune.train.run import Materials, Run, stage_of
from gemma_tune.train.session import RunFolder
from gemma_tune.train.signals import Signals
from gemma_tune.train.trainer import Surroundings

STAGES = ("dpo", "kto", "ppo")
"""Their figures are about policy and reference together, and need what the stage itself computes with."""


def stage_figures(target: Target, opened: Opened, rows: Rows, voices: Sequence[Voice]) -> dict[Voice, dict[str, Any]]:
    """The stage's held-out figures before and after, as in run.json.

    Args:
        target: a run of one of `STAGES`.
        opened: its model, with what the training began with; it speaks as the policy.
        rows: of the run.
        voices: which of both are wanted.

    Raises:
        UserError: the adapter that the training began with, or a source of rewards, is not there any more.
    """
    assert target.plan is not None and target.saved is not None
    if opened.before is None:
        raise UserError(
            f"the figures of {target.plan.stage} are about the adapter that the training began with",
            where=str(start_of(target)),
            fix="put that adapter back, or measure --tasks",
        )
    with tempfile.TemporaryDirectory(prefix="gemma-tune-eval-") as folder:
        plan = on_this_machine(target.plan, folder)
        stage = stage_of(plan)
        for name, parameter in opened.model.named_parameters():
            parameter.requires_grad = belongs(name, TRAINED)  # an optimizer is made, and moves nothing
        source = ModelSource(target.saved.name, Path(folder), target.saved.revision)
        materials = Materials(opened.family, source, "", opened.tokenizer, opened.encoder, rows.data)
        quiet, signals = Console(quiet=True), Signals()
        place = RunFolder(folder, resume="never", writes=False)
        model = stage.wrap(opened.model, plan, opened.family)
        run = Run(plan, materials, model, place, {}, None, signals, quiet)
        place.open(recipe_text="", plan=plan, record={}, resumed=Search(None))
        around = Surroundings(folder=place, keep=1, identity={}, signals=signals, held_out=rows.rows)
        run.trainer = stage.trainer(run, around)
        if plan.stage != "ppo":
            speak_as(opened.model, [TRAINED])
        return {voice: _figures(run, opened, voice) for voice in voices}


def _figures(run: Run, opened: Opened, voice: Voice) -> dict[str, Any]:
    """Held-out figures of the trainer's model, and what the stage adds when it finishes."""
    assert opened.before is not None
    if run.plan.stage == "ppo":
        return _of_responses(run, voice)
    before = voice == "base"
    with speaking_as(opened.model, opened.before) if before else nullcontext():
        run.trainer.evaluate()
    found = dict(run.trainer.last_evaluation.to_json()) if run.trainer.last_evaluation else {}
    if not before:
        results: dict[str, Any] = {"base": {}, "tuned": found}
        run.stage.finish(run, results)  # DPO: the KL over answers that the policy draws
    return found


def _of_responses(run: Run, voice: Voice) -> dict[str, Any]:
    """PPO's, where a role is named by the actors."""
    actors, policy = run.model, list(run.model.policy)
    actors.policy = list(actors.reference) if voice == "base" else policy
    try:
        run.trainer.evaluate()
    finally:
        actors.policy = policy
        speak_as(actors.model, policy)
    return dict(run.trainer.last_evaluation.to_json()) if run.trainer.last_evaluation else {}


def on_this_machine(plan: Plan, folder: str) -> Plan:
    """`plan` for one process here that writes into `folder` alone, for a trainer that only scores.

    The reference of DPO is asked: the scores that the training kept are those of all training rows.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    why = "evaluation: one process that scores and does not train"
    session = plan.values("session")
    changed: Mapping[str, Any] = {
        "output": folder,
        "distributed": {**session["distributed"], "strategy": "single"},
        "adapter": {**(session.get("adapter") or {}), "mode": "continue"},  # what was stacked is saved as one
        "precompute_reference": False,
    }
    sections: dict[str, Any] = {
        "session": dict(plan.session)
        | {key: _set(plan.session[key], changed[key], why) for key in changed if key in plan.session},
        "trainer": {key: value for key, value in plan.trainer.items() if key not in ("fsdp", "fsdp_config")},
    }
    for key, value in {"output_dir": folder, "use_cpu": device == "cpu"}.items():
        sections["trainer"][key] = _set(sections["trainer"][key], value, why)
    machine = {**plan.machine, "device": device, "world_size": 1, "nodes": 1}
    return replace(plan, machine=machine, **sections)


def _set(choice: Any, value: Any, why: str) -> Any:
    return replace(choice, value=value, reason=why)
