"""The run folder: what a run leaves behind, written so that a crash never leaves half a file.

    run/recipe.yaml     the recipe as its user wrote it
    run/plan.json       the plan with its reasons
    run/run.json        what ran, on what, from what, and its results
    run/metrics.jsonl   one line a log event      run/samples.jsonl   one line an answer
    run/checkpoint-N/   see `train.checkpoint`    run/adapter/ or run/model/   the result
    run/.lock           held while a process works here

Nothing is written before the data and the model are ready: a run that fails early leaves no folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from gemma_tune.errors import AccessError, TrainingError, UserError
from gemma_tune.plan.types import Plan
from gemma_tune.train import checkpoint
from gemma_tune.train.identity import differences
from gemma_tune.train.provenance import redact

Resume = Literal["never", "auto", "must"]
FILES = ("recipe.yaml", "plan.json", "run.json", "metrics.jsonl", "samples.jsonl")


class RunFolder:
    """One run folder. `check()` reads, `open()` makes and locks it, the rest writes.

    Args:
        path: the folder; relative to the working directory.
        resume: `never` wants a new folder; `auto` continues from a checkpoint if there is one; `must` insists on one.
        writes: whether this process is the one that writes; of several, only the first is. The others read.
    """

    def __init__(self, path: str | Path, *, resume: Resume, writes: bool = True) -> None:
        self.path = Path(path)
        self.resume = resume
        self.writes = writes
        self.record: dict[str, Any] = {}
        self._lock: IO[str] | None = None

    # --- before the run ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a folder that this run may not use. Writes nothing.

        Raises:
            UserError: the folder holds another run or foreign files, or there is nothing to resume.
            AccessError: another process is working in it, or it cannot be written.
        """
        if not self.writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError("is a file, not a folder", where=str(self.path), fix="set `output` to a folder")
        held = sorted(path.name for path in self.path.iterdir()) if self.path.is_dir() else []
        if held:
            self._refuse_locked()
        # A process that died before it wrote run.json left a lock or half of one of these files, and no run.
        held = [name for name in held if name not in (".lock", *(f".{own}.new" for own in FILES))]
        if held and not (self.path / "run.json").is_file():
            raise UserError(
                f"the output folder is not empty and holds no run of gemma-tune ({', '.join(held[:3])}, ...)",
                where=str(self.path),
                fix="set `output` to another folder",
            )
        if held and self.resume == "never":
            raise UserError(
                "the output folder already holds a run",
                where=str(self.path),
                fix="set `output` to another folder, or continue that run with --resume auto",
            )
        if self.resume == "must" and not checkpoint.checkpoints(self.path):
            raise UserError(
                "there is no checkpoint to resume from", where=str(self.path), fix="start the run without --resume"
            )
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise AccessError("cannot be written", where=str(parent), fix="set `output` to a folder that you may write")

    def saved_record(self) -> dict[str, Any]:
        """run.json of the run that is here; empty where there is none or it cannot be read."""
        try:
            record = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def find_checkpoint(self, identity: Mapping[str, Any]) -> checkpoint.Search:
        """The newest verified checkpoint that this run may continue from.

        Raises:
            UserError: the folder belongs to a run of another recipe, plan or data; the text lists what differs.
            TrainingError: there are checkpoints and every one is damaged. Starting over would hide that.
        """
        if self.resume == "never":
            return checkpoint.Search(None)
        search = checkpoint.newest(self.path)
        saved = search.found.identity if search.found else self.saved_record().get("identity")
        changed = differences(saved, identity) if saved is not None else []
        if changed:
            raise UserError(
                "the run in the output folder was made of something else; resuming would mix the two:\n    "
                + "\n    ".join(changed),
                where=str(self.path),
                fix="undo the change, or set `output` to another folder",
            )
        if search.found is None and search.skipped:
            reasons = "\n    ".join(f"{folder.name}: {reason}" for folder, reason in search.skipped)
            raise TrainingError(
                f"every checkpoint is damaged:\n    {reasons}",
                where=str(self.path),
                fix="start again in another folder, or remove the damaged checkpoints first",
            )
        return search

    # --- the run ----------------------------------------------------------------------------------------------------

    def open(self, *, recipe_text: str, plan: Plan, record: Mapping[str, Any], resumed: checkpoint.Search) -> None:
        """Make the folder, lock it, sweep what a crash left, and write recipe.yaml, plan.json and run.json.

        Args:
            recipe_text: the recipe as written.
            plan: the plan of this run.
            record: content of run.json; results of the earlier part of a resumed run are kept.
            resumed: what `find_checkpoint` found.
        """
        if not self.writes:
            self.record = {**record, "results": {}}
            return
        with checkpoint.disk_errors(self.path, AccessError):
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            checkpoint.sweep(self.path)
            earlier = self.saved_record() if resumed.found else {}
            done = resumed.found.step if resumed.found else -1  # a checkpoint of step 0 holds the base's figures
            checkpoint.set_aside_after(self.path, done)
            for name in ("metrics.jsonl", "samples.jsonl"):
                keep_lines_until(self.path / name, done)
            self.record = dict(record)
            self.record["segments"] = [*earlier.get("segments", []), {"from_step": max(done, 0), "started": now()}]
            self.record["started"] = earlier.get("started") or now()
            self.record["results"] = earlier.get("results", {})
            if "wandb" in earlier:
                self.record["wandb"] = earlier["wandb"]
            self.record["status"] = "running"
            self.write_record()  # first: it is what makes the folder ours
            checkpoint.write_atomically(self.path / "recipe.yaml", redact(recipe_text))
            checkpoint.write_atomically(self.path / "plan.json", dump(plan.to_json()))

    def write_record(self, **changes: Any) -> None:
        """Merge `changes` into run.json and replace it in one rename."""
        self.record |= changes
        if self.writes:
            checkpoint.write_atomically(self.path / "run.json", dump(self.record))

    def close(self, status: str, *, step: int, **changes: Any) -> None:
        """Write how this part of the run ended (`finished`, `stopped`, `failed`) and release the lock."""
        if not self.record or not self.writes:
            return
        segment = self.record["segments"][-1]
        segment |= {"finished": now(), "to_step": step, "status": status}
        try:
            self.write_record(status=status, finished=now(), **changes)
        finally:
            self.unlock()

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to a .jsonl file of the run."""
        if not self.writes:
            return
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows)

    # --- the lock ---------------------------------------------------------------------------------------------------

    def _take_lock(self) -> None:
        lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            lock.close()
            if isinstance(exc, BlockingIOError):
                raise self._locked() from None
            raise
        lock.truncate(0)
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now()}))
        lock.flush()
        self._lock = lock

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()  # closing releases it; the file stays, since removing it would race with the next owner
            self._lock = None

    def _refuse_locked(self) -> None:
        try:
            with open(self.path / ".lock", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._locked() from None
        except OSError:
            return  # no lock file, or it cannot be read: opening the run will say so

    def _locked(self) -> AccessError:
        try:
            owner = json.loads((self.path / ".lock").read_text(encoding="utf-8"))
            who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process"
        return AccessError(
            f"{who} is working in this folder", where=str(self.path), fix="wait for it, or set another `output`"
        )


def is_first_process() -> bool:
    """Whether this process is the first of those that torchrun or accelerate started together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl file after `step`, which a resumed run writes again, and a last line that was cut.

    -1, without a checkpoint, drops them all.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("step", 0) <= step:
            kept.append(line + "\n")
    checkpoint.write_atomically(path, "".join(kept))


def dump(value: Any) -> str:
    """JSON as it stands in the run folder: indented, secrets masked."""
    return redact(json.dumps(finite(value), indent=2, ensure_ascii=False, default=str)) + "\n"


def finite(value: Any) -> Any:
    """`value` with null for each NaN and infinity: JSON has neither, and strict readers refuse them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
