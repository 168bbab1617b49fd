"""Benchmarks: EleutherAI's lm-evaluation-harness, in this process, on a model that is open, with our prompts.

A base reads a prompt as plain text behind one BOS. With `chat` the prompt is a conversation in the template of its
generation: shots are turns of it, as `lm_eval --apply_chat_template` has them by default, a task's description is the
system text, and an answer is scored as what the model says.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import AccessError
from gemma_tune.gemma.families import Family

if TYPE_CHECKING:
    from gemma_tune.evaluation.harness_model import GemmaLM

RESERVED = ("harness", "rows")
"""Keys of what `run_tasks` returns that are no task."""

_EXTRA = "pip install 'gemma-tune[eval]'"

_RESAMPLES = 1000
"""Bootstrap rounds for the standard error of metrics that have no formula."""


def run_tasks(
    model: Any,
    tokenizer: Any,
    family: Family,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool,
) -> dict[str, Any]:
    """Run tasks of lm-eval, of ours (`bold`, `winobias`) or of the user.

    Args:
        model, tokenizer, family: as `models.saved.load_run` gives them.
        tasks: names of tasks, groups or tags.
        include_path: a folder with YAML tasks of the user, and with `<owner>/<name>/` for datasets that are not to come
            from the hub (`harness_tasks.local_datasets`).
        shots: examples in the prompt; None for the task's own number. A task whose YAML says 0 keeps 0.
        limit: the first items of each task only; of each part of a group.
        batch_size: rows in a forward pass.
        chat: whether prompts are conversations (a tuned or instruction model) or plain text (a base).

    Returns:
        For each name `{"metrics", "shots", "items", "of", "chat", "version", "card": None}`. `items` were asked, of as
        many as `of` that the task has. `metrics` has lm-eval's names, `<metric>_stderr` beside each, and
        `<metric>,<filter>` where a task has a filter of its own. A group also has
        `parts`, and a task of ours `groups`. Under `harness` stands how it was run. Under `rows`, for
        evaluation.rows.jsonl and to be taken out before the rest is written: `{"part": "task", "task", "item",
        "metric", "correct", "shots", "chat", "version"}`, one for each item of a task that has a metric from 0 to 1;
        `correct` is that metric.

    Raises:
        AccessError: lm-eval or another package is missing; a dataset cannot be had.
        UserError: an unknown name, or a task that runs the model's code, which needs HF_ALLOW_CODE_EVAL=1.
    """
    lm = open_lm(model, tokenizer, family, batch_size=batch_size)
    found = evaluate(lm, tasks, include_path=include_path, shots=shots, limit=limit, chat=chat)
    return {**found, "harness": facts(lm, limit=limit)}


def open_lm(model: Any, tokenizer: Any, family: Family, *, batch_size: int) -> GemmaLM:
    """The model as lm-eval wants it.

    Raises:
        AccessError: lm-eval is not installed.
    """
    with needed_packages(), quiet():
        from gemma_tune.evaluation.harness_model import GemmaLM

        return GemmaLM(model, tokenizer, family, batch_size=batch_size)


def evaluate(
    lm: GemmaLM, names: Sequence[str], *, include_path: str | None, shots: int | None, limit: int | None, chat: bool
) -> dict[str, Any]:
    """`run_tasks` without `harness`, on a model that is wrapped already."""
    from lm_eval import simple_evaluate

    from gemma_tune.evaluation.harness_tasks import check_consent, find_tasks, load_tasks, local_datasets

    with quiet(), unheard(), needed_packages():
        manager = find_tasks(names, include_path)
        allowed = check_consent(manager, names)
        with local_datasets(include_path):
            results = simple_evaluate(
                model=lm,
                tasks=load_tasks(manager, names, shots, include_path),
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=allowed,
            )
    return shaped(results, names, chat)


def facts(lm: GemmaLM, *, limit: int | None) -> dict[str, Any]:
    """How it was run."""
    return {
        "lm_eval": version("lm_eval"),
        "batch_size": int(lm.batch_size),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "log_probabilities": "float32",
        "limit": limit,
        "truncated": lm.truncated,
    }


# --- what lm-eval returns, as evaluation.json has it


def shaped(results: Mapping[str, Any], names: Sequence[str], chat: bool) -> dict[str, Any]:
    """The entries of `names`, and `rows`. A tag has an entry for each of its tasks."""
    children: Mapping[str, list[str]] = results.get("group_subtasks", {})
    within = {child for group in children for child in leaves(group, children)}
    of_tags = [name for name in results["results"] if name not in {*within, *children, *names}]
    asked = [name for name in dict.fromkeys(names) if name in children or name in results["results"]] + of_tags
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for name in asked:
        members = leaves(name, children)
        entry = described(results, name, members, chat)
        if members != [name]:
            entry["parts"] = {member: described(results, member, [member], chat) for member in members}
        found[name] = entry
        for member in members:
            how = {"shots": results["n-shot"].get(member), "chat": chat, "version": results["versions"].get(member)}
            rows += [row | how for row in items(member, results["samples"][member])]
    return {**found, "rows": rows}


def leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, through groups in groups; of a task itself."""
    return [leaf for child in children[name] for leaf in leaves(child, children)] if name in children else [name]


def described(results: Mapping[str, Any], name: str, members: Sequence[str], chat: bool) -> dict[str, Any]:
    """One entry: see `run_tasks`."""
    from gemma_tune.evaluation.tasks import by_group

    shots = {results["n-shot"].get(member) for member in members}
    entry = {
        "metrics": metrics(results["results"].get(name, {})),
        "shots": shots.pop() if len(shots) == 1 else None,
        "items": sum(results["n-samples"][member]["effective"] for member in members),
        "of": sum(results["n-samples"][member]["original"] for member in members),
        "chat": chat,
        "version": results["versions"].get(name),
        "card": None,
    }
    groups = by_group(name, results["samples"].get(name, []))
    return entry | ({"groups": groups} if groups else {})


def metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """`acc,none` is `acc`; a filter that a task defines stays behind its comma. What is no number is left out."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }


def items(task: str, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each item, by the first of the task's metrics that is from 0 to 1 for all; of its first filter.

    One metric for all items: a difference of likelihoods (crows_pairs) is from 0 to 1 for some of them only.
    """
    own = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metric = next((name for name in (own[0]["metrics"] if own else ()) if all(_is_share(one, name) for one in own)), "")
    if not metric:
        return []
    about = {"part": "task", "task": task, "metric": metric}
    rows = [{**about, "item": int(one["doc_id"]), "correct": float(one[metric])} for one in own]
    return sorted(rows, key=lambda row: row["item"])


def _is_share(sample: Mapping[str, Any], metric: str) -> bool:
    score = sample.get(metric)
    return isinstance(score, bool | int | float) and 0 <= score <= 1


# --- lines


def render(found: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: a task, its shots and items, and each metric with its standard error."""
    lines = []
    for name, entry in found.items():
        if name in RESERVED:
            continue
        shots = "shots differ" if entry["shots"] is None else f"{entry['shots']}-shot"
        lines.append(f"{name}: {shots}, {entry['items']:,} items, {'chat' if entry['chat'] else 'plain text'}")
        values = entry["metrics"]
        for metric, value in values.items():
            if not _is_error(metric):
                lines.append(f"  {metric:<28} {value:.4f}{_error_of(metric, values)}")
        for group, figures in entry.get("groups", {}).items():
            lines.append(f"  {group}: " + ", ".join(f"{key} {value:g}" for key, value in figures.items()))
    truncated = found.get("harness", {}).get("truncated")
    if truncated:
        lines.append(f"{truncated:,} prompts were longer than the model reads; their beginning was left out")
    return lines


def _is_error(metric: str) -> bool:
    return metric.split(",")[0].endswith("_stderr")


def _error_of(metric: str, values: Mapping[str, float]) -> str:
    name, comma, own = metric.partition(",")
    error = values.get(f"{name}_stderr{comma}{own}")
    return "" if error is None else f" ± {error:.4f}"


# --- the library


@contextmanager
def needed_packages() -> Iterator[None]:
    """Say what to install where the body lacks a package.

    Raises:
        AccessError: instead of the ImportError.
    """
    try:
        yield
    except ImportError as exc:
        missing = (exc.name or "").split(".")[0]
        text = " ".join(str(exc).split())
        if missing == "lm_eval":
            what, fix = "lm-evaluation-harness is not installed", _EXTRA
        elif "lm-eval[math]" in text or missing in ("math_verify", "sympy", "antlr4"):
            what, fix = "this task needs packages of lm-eval's extra `math`", "pip install 'lm-eval[math]'"
        elif missing:
            own = missing == "vaderSentiment"
            what, fix = f"this task needs the package {missing}", _EXTRA if own else f"pip install {missing}"
        else:
            what, fix = f"this task needs a package: {text}", "install what it names"
        raise AccessError(what, where="--tasks", fix=fix) from exc


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's notes and bars of `datasets` are left out; what is printed goes to stderr, as stdout is for results."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def unheard() -> Iterator[None]:
    """lm-eval without its bars where nobody watches them, and without git, which it asks for the caller's commit."""
    import lm_eval.api.task as building
    import lm_eval.evaluator as running

    bar, commit = building.tqdm, running.get_git_commit_hash
    building.tqdm = partial(bar, disable=None)  # None: where stderr is no terminal
    running.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        building.tqdm, running.get_git_commit_hash = bar, commit
