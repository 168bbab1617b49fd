"""Weights & Biases: only where the recipe asks for it, never a login prompt, and never the reason that a run fails."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma_tune.train.callbacks import metrics_line

_HOST = "https://api.wandb.ai"


def has_key() -> bool:
    """Whether a W&B key can be found without asking for one: in the environment, or in .netrc after `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or _HOST).hostname or ""
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def mode_of_run() -> str:
    """`online` only with a key, otherwise `offline`: online without one, wandb would ask. WANDB_MODE may say less."""
    wanted = os.environ.get("WANDB_MODE") or "online"
    return "offline" if wanted == "online" and not has_key() else wanted


class WandbTracking(TrainerCallback):
    """Sends what metrics.jsonl gets. Neither code, git remote, console nor system statistics are sent.

    Args:
        folder: the run folder; W&B's files go to `wandb/` in it.
        project, name: of the W&B run.
        run_id: of the W&B run that a resumed run continues; None for a new one.
        config: what W&B shows as configuration: the plan's values.
        counters: tokens seen and speed.
        console: for the one line that says where the run is, or why there is none.
        started: called with `{"id", "mode", "url"}` for run.json.
    """

    def __init__(
        self,
        *,
        folder: Path,
        project: str,
        name: str,
        run_id: str | None,
        config: Mapping[str, Any],
        counters: Callable[[], Mapping[str, Any]],
        console: Console,
        started: Callable[[dict[str, Any]], None],
    ) -> None:
        self._folder = folder
        self._project = project
        self._name = name
        self._id = run_id
        self._config = config
        self._counters = counters
        self._console = console
        self._started = started
        self._run: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self._run is None:
            self._run = self._init(mode_of_run())

    def _init(self, mode: str) -> Any:
        import wandb

        # No key and a terminal: wandb would ask for one. Its own switch is the environment variable.
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            init_timeout=30,
        )
        try:
            run = wandb.init(
                project=self._project,
                name=self._name,
                id=self._id,
                resume="allow" if self._id else None,
                dir=str(self._folder),
                mode=cast(Any, mode),
                config=dict(self._config),
                settings=settings,
            )
        except Exception as exc:  # a tracker must not cost a training
            if mode == "offline":
                self._console.print(f"W&B is off: {type(exc).__name__}: {exc}", highlight=False)
                return None
            self._console.print(
                f"W&B cannot be reached ({type(exc).__name__}); the run is kept offline", highlight=False
            )
            return self._init("offline")
        self._started({"id": run.id, "mode": mode, "url": run.url or None})
        where = run.url or f"{self._folder / 'wandb'} (wandb sync sends it)"
        self._console.print(f"W&B: {where}", highlight=False)
        return run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._run is not None and logs and (line := metrics_line(logs)):
            self._run.log({**line, **self._counters()}, step=state.global_step)

    def close(self, results: Mapping[str, Any] | None = None) -> None:
        """End the W&B run, with its final figures where there are any."""
        if self._run is None:
            return
        if results:
            self._run.summary.update(dict(results))
        self._run.finish(exit_code=0 if results else 1)
        self._run = None
