"""Tasks of lm-evaluation-harness by name: where they are, what of them may run, where their rows come from."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import AccessError, GemmaTuneError, UserError
from gemma_tune.plan.hub import explain, explained, is_offline, redact

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OWN = Path(__file__).parent / "tasks"
"""BOLD and WinoBias."""

CONSENT = "HF_ALLOW_CODE_EVAL"
"""Set to 1 by who agrees that code which a model wrote runs on this machine. Hugging Face's `code_eval` wants it."""

_DEFINED = re.compile(r"^(?:task|group): *[\"']?([^\s\"'#]+)", re.MULTILINE)


def find_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """An index that holds `names` and what they are made of.

    lm-eval indexes all of its 14,000 tasks, which takes 5 to 20 seconds. Here only the folders are read in which the
    names are defined; all of them only for a name that is defined in none (a tag), and to say what was meant.

    Args:
        names: tasks, groups or tags; of lm-eval, of ours, or of `include_path`, whose definitions win.
        include_path: the user's folder of YAML files, or None.

    Raises:
        UserError: a name is unknown, or `include_path` is no folder.
    """
    from lm_eval.tasks import TaskManager

    check_folder(include_path)
    last = [OWN, *([Path(include_path)] if include_path else [])]
    folders: list[Path] = []
    manager = TaskManager(include_path=[*folders, *last], include_defaults=False)
    while missing := unknown(manager, names):
        new = [folder for folder in folders_of(missing) if folder not in folders]
        if not new:
            manager = TaskManager(include_path=last)
            check_names(names, manager)
            return manager
        folders += new
        manager = TaskManager(include_path=[*folders, *last], include_defaults=False)
    return manager


def check_folder(include_path: str | None) -> None:
    """Refuse an `include_path` that is no folder, or that holds a YAML file which cannot be read.

    Raises:
        UserError: which.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError("no such folder", where=f"--include-path {include_path}", fix="name a folder of YAML files")
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        _check_yaml(file)


def _check_yaml(file: Path) -> None:
    """lm-eval leaves out what it cannot read, and the task is then unknown."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        load_yaml(file, resolve_func=False)
    except (yaml.YAMLError, OSError, ValueError) as exc:
        text = " ".join(str(exc).split())
        raise UserError(f"lm-eval cannot read it: {text}", where=str(file), fix="correct it, or move it away") from exc


def check_names(names: Iterable[str], manager: TaskManager) -> None:
    """Refuse what no task, group or tag is called.

    Raises:
        UserError: with the nearest names.
    """
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            raise UserError(
                f"there is no task '{name}'",
                where="--tasks",
                fix=f"did you mean {', '.join(near)}?" if near else "see `lm-eval ls tasks`",
            )


def unknown(manager: TaskManager, names: Iterable[str]) -> list[str]:
    """Those of `names`, and of what they are made of, that the index does not hold."""
    return [name for name, entry in parts(manager, names) if entry is None]


def parts(manager: TaskManager, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """(name, entry of the index or None) of `names` and of all tasks in their groups and tags."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        entry = manager.task_index.get(name)
        yield name, entry
        if entry is None:
            continue
        members = entry.tags if entry.yaml_path is None else _members(entry.cfg or {})
        waiting += sorted(members) if isinstance(members, set) else members


def _members(config: Mapping[str, Any]) -> list[str]:
    """Names that a group's `task:` list refers to. What it defines in place needs no index."""
    listed = config.get("task")
    found = []
    for one in listed if isinstance(listed, list) else []:
        name = one.get("task") if isinstance(one, Mapping) else one
        found += [name] if isinstance(name, str) else _members(one) if isinstance(one, Mapping) else []
    return found


def folders_of(names: Iterable[str]) -> list[Path]:
    """Folders of lm-eval's tasks in whose YAML files one of `names` is defined."""
    known = definitions()
    return sorted({known[name] for name in names if name in known})


@functools.cache
def definitions() -> Mapping[str, Path]:
    """Name of a task or group of lm-eval -> the folder that defines it, read off its YAML files as text."""
    import lm_eval.tasks

    root = Path(str(lm_eval.tasks.__file__)).parent
    found: dict[str, Path] = {}
    for file in sorted(root.rglob("*.yaml")):
        for name in _DEFINED.findall(file.read_text(encoding="utf-8")):
            found.setdefault(name, root / file.relative_to(root).parts[0])
    return found


def check_consent(manager: TaskManager, names: Sequence[str]) -> bool:
    """Whether code of the model may run.

    Raises:
        UserError: one of the tasks runs it, and nobody has agreed.
    """
    allowed = os.environ.get(CONSENT) == "1"
    found = ((name, entry.cfg or {}) for name, entry in parts(manager, names) if entry is not None)
    unsafe = [name for name, config in found if config.get("unsafe_code")]
    if unsafe and not allowed:
        raise UserError(
            "this task runs code that the model writes, on this machine",
            where=unsafe[0],
            fix=f"run it where that can do no harm (a container without network), with {CONSENT}=1",
        )
    return allowed


def load_tasks(manager: TaskManager, names: Sequence[str], shots: int | None, include_path: str | None) -> list[Any]:
    """The tasks and groups that `names` mean, with their datasets; a tag means each of its tasks.

    Raises:
        UserError: rows or YAML of the user do not go together; or there are fewer rows than shots to show.
        AccessError: what a task loads while it is read cannot be had (a metric of `evaluate`).
    """
    asked = ", ".join(names)
    try:
        with explained(asked, repo_type="dataset"):
            built = manager.load(list(dict.fromkeys(names)))
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        if include_path is None:
            raise
        raise UserError(
            f"lm-eval cannot build the task from these rows: {type(exc).__name__}: {' '.join(str(exc).split())}",
            where=asked,
            fix="give the rows the splits and columns that its YAML file names; --debug shows where it stopped",
        ) from exc
    for name, task in built["tasks"].items():
        own = task.get_config("num_fewshot")
        wanted = own if shots is None or own == 0 else shots
        if wanted and len(list(task.fewshot_docs() or ())) < wanted:
            split = task.get_config("fewshot_split") or task.get_config("training_split")
            raise UserError(
                f"it has fewer than {wanted} rows to show as shots",
                where=name,
                fix=f"give it rows of the split '{split}', or fewer --shots",
            )
    top: dict[str, Any] = {}
    for name, entry in parts(manager, names):
        if name in names and name in built["groups"]:
            top[name] = built["groups"][name]
        elif name in built["tasks"] and (name in names or entry.tags & set(names)):
            top[name] = built["tasks"][name]
    return list(top.values())


@contextmanager
def local_datasets(include_path: str | None) -> Iterator[None]:
    """While it lasts, `datasets.load_dataset` looks into `include_path` first.

    `DIR/<owner>/<name>/<config>/` or `DIR/<owner>/<name>/`, with files that `datasets` can read (test.jsonl,
    validation.parquet, a whole clone of the repository), stands for the hub's set of that name. So each task of lm-eval
    runs on local rows in the hub's schema, without a change of its YAML.

    Raises:
        AccessError: the hub cannot be reached, or the set is not in the cache.
        UserError: the hub has no such set, or it is gated; or local rows cannot be read.
    """
    import datasets

    original: Callable[..., Any] = datasets.load_dataset

    def load(path: str, name: str | None = None, *arguments: Any, **keywords: Any) -> Any:
        local = _local(path, name, include_path)
        if local is not None:
            path, name = local
        try:
            found = original(path, name, *arguments, **keywords)
        except GemmaTuneError:
            raise
        except Exception as exc:
            raise _explained(exc, path, local is not None) from exc
        return Splits(found) if local is not None and isinstance(found, datasets.DatasetDict) else found

    class Splits(datasets.DatasetDict):
        """Local rows; a split that they lack is empty. lm-eval reads the training split even for no shots."""

        def __missing__(self, split: str) -> Any:
            return next(iter(self.values())).select([])

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _local(path: str, name: str | None, include_path: str | None) -> tuple[str, str | None] | None:
    """(folder, config) of the local copy of a hub set; None where there is none."""
    folder = Path(include_path or "") / path
    if include_path is None or Path(path).is_absolute() or not folder.is_dir():
        return None
    if (folder / "README.md").is_file():  # a clone, which says in its head which files are which config
        return str(folder.resolve()), name
    if name is not None and not any(file.is_file() for file in folder.iterdir()):
        return (str((folder / name).resolve()), None) if (folder / name).is_dir() else None
    return str(folder.resolve()), None


def _explained(exc: Exception, path: str, local: bool) -> GemmaTuneError:
    if local or Path(path).exists() or path in ("json", "csv", "parquet", "text", "arrow"):
        text = redact(" ".join(str(exc).split()))
        return UserError(f"these rows cannot be read: {text}", where=path, fix="correct the files")
    if is_offline():
        return AccessError(
            "offline mode is set, and this dataset is not in the cache",
            where=path,
            fix="unset HF_HUB_OFFLINE, or put its files into --include-path, under <owner>/<name>/",
        )
    return explain(exc, path, repo_type="dataset")
