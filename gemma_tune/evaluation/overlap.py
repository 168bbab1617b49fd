"""Whether a training has seen the rows that two models are to be compared on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from gemma_tune.data import mix
from gemma_tune.data.keys import group_of
from gemma_tune.data.policies import Policies
from gemma_tune.data.report import Tally
from gemma_tune.errors import AccessError, UserError
from gemma_tune.evaluation.held_out import Rows
from gemma_tune.evaluation.target import Target, find_target, start_of
from gemma_tune.gemma.conversation import Answered
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
from gemma_tune.plan.types import Plan
from gemma_tune.train.run import stage_of

_READ: dict[str, Callable[..., Iterable[mix.Kept[Any]]]] = {
    "sft": mix.read_examples,
    "reward": mix.read_preferences,
    "dpo": mix.read_preferences,
    "kto": mix.read_judged,
    "ppo": mix.read_prompts,
}


class Seen(UserError):
    """A training has seen some of the rows."""


def check_unseen(target: Target, rows: Rows, *, further: int = 8) -> str:
    """Refuse rows that `target` was trained on.

    Rows are the same where the first thing that the user says is the same, or the whole text of a document: it is what
    keeps rows on one side when a run splits its data.

    Args:
        further: how many trainings are gone back, each of which began with the one before it.

    Returns:
        `no`, or why it is not known whether it was trained on some of them.

    Raises:
        Seen: it was, or what its training began with was.
    """
    if not target.tuned:
        return "not known: what a published model was trained on is not recorded here"
    if target.plan is None:
        return "not known: there is no plan beside it that says what it was trained on"
    own, start = _own(target, rows), start_of(target)
    if start is None:
        return own
    try:
        before = check_unseen(find_target(start), rows, further=further - 1) if further else "not known: too far back"
    except Seen:
        raise
    except (UserError, AccessError) as exc:
        before = f"not known: it began with {start}, and {exc.problems[0].what}"
    return own if own != "no" else before


def _own(target: Target, rows: Rows) -> str:
    """`check_unseen` of the training that made the target, whatever that began with."""
    if (target.run.get("data") or {}).get("fingerprint") == rows.data.fingerprint:
        return "no"
    try:
        trained = trained_groups(target)
    except (UserError, AccessError) as exc:
        return f"not known: its data cannot be read again ({exc.problems[0].what})"
    if isinstance(trained, str):
        return f"not known: {trained}"
    asked = {_group(example) for example in rows.data.held_out_examples}
    if seen := len(asked & trained):
        raise Seen(
            f"it was trained on {seen:,} of the {len(asked):,} rows: figures on them say nothing",
            where=target.name,
            fix="name the runs the other way round, or say with --recipe FILE whose held-out rows neither has seen",
        )
    return "no"


def trained_groups(target: Target) -> set[bytes] | str:
    """The groups of all rows that its training read and did not hold out; or why they are not known.

    Raises:
        UserError, AccessError: its data cannot be read.
    """
    plan = target.plan
    assert plan is not None
    keywords = plan.values("data")
    if keywords.get("streaming"):
        return "its data are a stream, which is not read as a whole"
    family = FAMILIES[plan.family]
    model = plan.values("model")
    other = model.get("tokenizer")
    tokenizer = load_tokenizer(other or model["name"], None if other else model.get("revision"), family)
    data = stage_of(plan).prepare(family, GemmaEncoder(tokenizer, family), **keywords)
    if data.fingerprint != (target.run.get("data") or {}).get("fingerprint"):
        return "its data are not what they were when it was trained"
    read = Counter(_group(one.example) for one in _read(plan))
    read.subtract(_group(example) for example in data.held_out_examples)
    return {group for group, count in read.items() if count > 0}


def _read(plan: Plan) -> Iterable[mix.Kept[Any]]:
    """Every usable row of the plan's data, before it is tokenised."""
    keywords = plan.values("data")
    names = ("system_role", "fix_roles", "on_empty_turn", "on_overlong", "on_bad_row")
    chosen = {name: keywords[name] for name in ("deduplicate", "seed", "margins") if name in keywords}
    policies = Policies(*(keywords[name] for name in names))
    return _READ[plan.stage](keywords["sources"], FAMILIES[plan.family], policies, Tally(), **chosen)


def _group(example: Any) -> bytes:
    """By what is said: the groups that rows name are known to one data set alone."""
    return group_of(replace(example, group="") if isinstance(example, Answered) else example)
