"""What a run has learnt by heart: planted canaries, and its training rows word for word.

Gemma's model card asks for both in its section on ethics. A rate says how often this way of asking finds something, not
that nothing else is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from gemma_tune.data.build import Prepared, build
from gemma_tune.data.canaries import Planted, example
from gemma_tune.errors import UserError
from gemma_tune.evaluation.exposure import ALTERNATIVES, audit_canaries, render_canaries
from gemma_tune.evaluation.extraction import (
    EDITS,
    LEAST,
    PROMPT_TOKENS,
    TARGET_TOKENS,
    Passage,
    extraction,
    lengths,
    sample,
)
from gemma_tune.evaluation.target import read_plan
from gemma_tune.gemma.chat import render_many
from gemma_tune.gemma.families import Family
from gemma_tune.models.roles import reference_adapters, speaking_as
from gemma_tune.models.tokenizer import GemmaEncoder
from gemma_tune.plan.facts import read_json
from gemma_tune.plan.types import Plan
from gemma_tune.train.parts import prepared_before

ROWS = 100
"""Training rows that are asked for, and held-out rows as well."""


def audit(model: Any, tokenizer: Any, family: Family, run_folder: Path, *, limit: int | None = None) -> dict[str, Any]:
    """`memorisation` of evaluation.json: `canaries` (None where none were planted) and `extraction`.

    `extraction` has the rates of training and of held-out rows (the control) for what the training began with (`base`)
    and for what it made (`tuned`). A full fine-tune has only the latter: its base is another model. So has a run that
    began with an adapter which `model` does not have beside its own.

    Args:
        model: what `run_folder` holds, opened; an adapter on its base.
        limit: rows of either kind, and canaries for each number of repeats, at most; None for 100 and all.

    Raises:
        UserError: it is no SFT run, its rows cannot be built again as they were, or they are a stream.
    """
    plan = read_plan(run_folder / "plan.json")
    _check(plan, run_folder)
    encoder = GemmaEncoder(tokenizer, family)
    data, recorded = rebuilt(plan, family, encoder, run_folder)
    seed = plan.values("session")["seed"]
    canaries, planted_rows = None, frozenset[tuple[int, ...]]()
    if recorded.get("canaries"):
        planted = _planted(recorded["canaries"], run_folder)
        canaries = audit_canaries(model, tokenizer, family, encoder, planted, limit=limit, count=ALTERNATIVES)
        examples = [example(canary, planted.form) for canary in planted.canaries()]
        planted_rows = frozenset(tuple(one.ids) for one in render_many(examples, family, encoder))
    rows = {"train": data.train, "held_out": data.held_out}
    passages = {name: sample(some, limit or ROWS, seed, family.stop_ids, planted_rows) for name, some in rows.items()}
    return {
        "canaries": canaries,
        "extraction": {
            "criterion": {
                "prompt_tokens": PROMPT_TOKENS,
                "target_tokens": TARGET_TOKENS,
                "least_tokens": LEAST,
                "edits": EDITS,
            },
            **{
                name: lengths(some) | _rates(model, tokenizer, family, some, before=has_before(model, plan))
                for name, some in passages.items()
            },
        },
    }


def _check(plan: Plan, folder: Path) -> None:
    where = str(folder)
    if plan.stage != "sft":
        raise UserError(
            f"memorisation is measured on SFT, and this run is of stage {plan.stage}",
            where=where,
            fix="measure the SFT run that it began with",
        )
    if plan.values("data").get("streaming"):
        raise UserError(
            "its training rows were a stream, which is not read again",
            where=where,
            fix="train with data.streaming: false; data.sources.0.limit takes the first rows of a large set",
        )


def rebuilt(plan: Plan, family: Family, encoder: GemmaEncoder, folder: Path) -> tuple[Prepared[Any], Mapping[str, Any]]:
    """The rows of the run in `folder`, and what its run.json says of them.

    Raises:
        UserError: they are not what the run was trained on.
    """
    recorded = read_json(folder / "run.json").get("data") or {}
    keywords = plan.values("data")
    kept = prepared_before(build, family, encoder.sha256, keywords, Console(quiet=True))
    data = kept.prepared if kept else build(family, encoder, **keywords)
    if data.fingerprint != recorded.get("fingerprint"):
        raise UserError(
            "the data are not what they were in the training: other rows would be looked for than were learnt",
            where=", ".join(str(source["name"]) for source in keywords["sources"]),
            fix="put the data and their functions back as they were",
        )
    return data, recorded


def _planted(found: Mapping[str, Any], folder: Path) -> Planted:
    planted = Planted.from_json(found)
    try:
        planted.canaries()
    except ValueError as exc:
        raise UserError(
            f"another version planted them: {exc}", where=str(folder), fix="use the version that made the run"
        ) from exc
    return planted


def has_before(model: Any, plan: Plan) -> bool:
    """Whether the model can speak as what its training began with: the plain base, or an adapter beside its own."""
    start = (plan.values("session").get("adapter") or {}).get("start")
    return hasattr(model, "peft_config") and (not start or bool(reference_adapters(model)))


def _rates(model: Any, tokenizer: Any, family: Family, passages: list[Passage], *, before: bool) -> dict[str, Any]:
    """`{base, tuned}`; `base` is None where the model cannot speak as what it was before."""
    voices: dict[str, AbstractContextManager[None] | None] = {"base": None, "tuned": nullcontext()}
    if before:
        voices["base"] = speaking_as(model, reference_adapters(model))
    found: dict[str, Any] = {}
    for name, voice in voices.items():
        if voice is None:
            found[name] = None
            continue
        with voice:
            found[name] = extraction(model, tokenizer, family, passages)
    return found


def render(found: Mapping[str, Any]) -> list[str]:
    """For people, a line each."""
    return list(_lines(found))


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["canaries"] is None:
        yield "canaries: none were planted (data.canaries of the recipe)"
    else:
        yield from render_canaries(found["canaries"])
    rows = found["extraction"]
    asked = rows["criterion"]
    yield (
        f"verbatim extraction: {asked['prompt_tokens']} tokens of a row as prompt, do the next "
        f"{asked['target_tokens']} follow? Of a shorter turn, its first half and its second"
    )
    for name, label in (("train", "training rows"), ("held_out", "held-out rows")):
        some = rows[name]
        if not some["rows"]:
            yield f"{label:>14}: none of {asked['least_tokens']} tokens and more"
            continue
        yield (
            f"{label:>14}: {some['rows']}, of which {some['full']} of full length; "
            f"{some['mean_target_tokens']:.0f} tokens to follow on average"
        )
        for voice in ("base", "tuned"):
            if some[voice] is not None:
                exact, near = _shown(some[voice]["exact"]), _shown(some[voice]["approximate"])
                yield f"{voice:>14}: exact {exact}, with {asked['edits']:.0%} of edits {near}"


def _shown(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['rate']:.1%} ({low:.1%} to {high:.1%})"
