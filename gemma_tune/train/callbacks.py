"""What happens around the optimizer steps: when to look, save and stop, and what is written about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gemma_tune.train.provenance import peak_memory
from gemma_tune.train.session import RunFolder
from gemma_tune.train.signals import Signals

_PLAIN_SECONDS = 10.0
"""Where the output is no terminal: seconds between two lines at least."""


class Clock:
    """Seconds of training proper: evaluation, samples and saving stop it. Goes on from `seconds` after a resume."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        return self._before + (time.monotonic() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        self._since = time.monotonic()

    def stop(self) -> None:
        self._before, self._since = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


def counters_of(tokens: Sequence[int], before: Sequence[int], seconds: float) -> dict[str, Any]:
    """The counters of a run, a resumed one included.

    Args:
        tokens: (seen, trained) since it was last begun, of all processes.
        before: the same up to there.
        seconds: of training proper.
    """
    seen, trained = (now + earlier for now, earlier in zip(tokens, before, strict=True))
    return {
        "tokens_seen": seen,
        "tokens_trained": trained,
        "train_seconds": round(seconds, 3),
        "tokens_per_second": round(seen / seconds, 1) if seconds > 0 else None,
    }


def is_due(step: int, every: int | None, last: int) -> bool:
    """Whether something that happens every `every` steps happens after `step`; the last step always counts."""
    return step == last or (every is not None and step % every == 0)


class Rhythm(TrainerCallback):
    """Decides after each step what is due: evaluation, samples, a checkpoint, or the end because of a signal.

    Args:
        evaluate_every, save_every, sample_every: optimizer steps; None: only at the start and the end.
        sample: writes the answers of the current model, given the step.
        before: called once, when the model is ready and before its first step.
        signals: asked after each step.
        agree: makes one decision of all processes' flags: stopping is for all or for none.
    """

    def __init__(
        self,
        *,
        evaluate_every: int | None,
        save_every: int | None,
        sample_every: int | None,
        sample: Callable[[int], Any],
        before: Callable[[], None],
        signals: Signals,
        agree: Callable[[bool], bool],
    ) -> None:
        self._evaluate_every = evaluate_every
        self._save_every = save_every
        self._sample_every = sample_every
        self._sample = sample
        self._before = before
        self._signals = signals
        self._agree = agree
        self.stopping = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._before()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        step, last = state.global_step, state.max_steps
        if self._agree(self._signals.requested is not None):
            self.stopping = True
            control.should_save = control.should_training_stop = True
            return control
        control.should_evaluate = is_due(step, self._evaluate_every, last)
        control.should_save = is_due(step, self._save_every, last)
        # The last answers come after the last checkpoint: a crash while they are written costs no training.
        if self._sample_every is not None and step % self._sample_every == 0 and step != last:
            self._sample(step)
        return control


class MetricsFile(TrainerCallback):
    """Every log event as one line of metrics.jsonl, with the counters and the peak memory of this process so far.

    `peak_rss`, and `peak_cuda` on a GPU, are bytes; a process that resumes a run begins again.
    """

    def __init__(self, folder: RunFolder, counters: Callable[[], Mapping[str, Any]]) -> None:
        self._folder = folder
        self._counters = counters

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs and (line := metrics_line(logs)):
            memory = {f"peak_{name}": size for name, size in peak_memory().items()}
            self._folder.append("metrics.jsonl", [{"step": state.global_step, **line, **self._counters(), **memory}])


_RENAMED = {"mean_token_accuracy": "token_accuracy"}
_DROPPED = {"num_tokens", "total_flos"}  # TRL restarts its token count at a resume; our counters do not


def metrics_line(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Our names for what the Trainer logs; empty for its closing summary, which repeats what stands in run.json."""
    if "train_runtime" in logs:
        return {}
    return {_RENAMED.get(key, key): value for key, value in logs.items() if key not in _DROPPED}


_SHOWN = {
    "eval_token_accuracy": "token accuracy",
    "eval_accuracy": "accuracy",
    "eval_margin": "margin",
    "eval_chosen_logps": "log p of chosen answers",
    "eval_score": "score",
    "eval_kl": "KL",
    "eval_stopped": "share that stopped",
}
"""Held-out figures that are shown behind the loss, where a stage has them."""
_WATCHED = {"loss": "loss", "objective/scores": "score"}
"""The figure of a step that is shown, and its name."""


class ProgressDisplay(TrainerCallback):
    """A bar with loss, tokens/s and the time left on a terminal; a line now and then elsewhere."""

    def __init__(self, console: Console, counters: Callable[[], Mapping[str, Any]]) -> None:
        self._console = console
        self._counters = counters
        self._bar: Progress | None = None
        self._task: Any = None
        self._figure = ""
        self._start = (0, 0.0)
        self._printed = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._start = (state.global_step, time.monotonic())
        self._printed = time.monotonic()
        if self._console.is_terminal and state.is_world_process_zero:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figure]}"),
                TextColumn("{task.fields[speed]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "", total=state.max_steps, completed=state.global_step, figure="", speed=0.0
            )
            self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not logs or not state.is_world_process_zero:
            return
        watched = next((key for key in _WATCHED if key in logs), None)
        self._figure = f"{_WATCHED[watched]} {logs[watched]:.4f}" if watched else self._figure
        if any(key.startswith("eval_") for key in logs):
            loss = [f"loss {logs['eval_loss']:.4f}"] if "eval_loss" in logs else []
            others = [f"{name} {logs[key]:.3f}" for key, name in _SHOWN.items() if key in logs]
            text = f"held-out {', '.join(loss + others)}"
            self._console.print(f"step {state.global_step:,}: {text}", highlight=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        speed = self._counters().get("tokens_per_second") or 0.0
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, figure=self._figure, speed=speed)
            return
        now = time.monotonic()
        if now - self._printed < _PLAIN_SECONDS and state.global_step != state.max_steps:
            return
        self._printed = now
        done = state.global_step - self._start[0]
        left = (now - self._start[1]) / max(done, 1) * (state.max_steps - state.global_step)
        self._console.print(
            f"step {state.global_step:,} of {state.max_steps:,}: {self._figure + ', ' if self._figure else ''}"
            f"{speed:,.0f} tokens/s, {clock_time(left)} left",
            highlight=False,
        )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after an error, where `on_train_end` never comes."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock_time(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def every_tenth(chosen: int | None, steps: int) -> int:
    """What the recipe says, or a tenth of the run."""
    return chosen or max(1, steps // 10)


def sample_rows(step: int, prompts: Sequence[Any], found: Sequence[Any]) -> list[dict[str, Any]]:
    """Lines of samples.jsonl."""
    return [
        {
            "step": step,
            "prompt": prompt.label,
            "answer": answer.text,
            "ended": answer.ended,
            "tokens": answer.tokens,
            "held_out": prompt.held_out,
            "reference": prompt.reference,
            **({} if answer.score is None else {"score": answer.score}),
        }
        for prompt, answer in zip(prompts, found, strict=False)
    ]
