"""Rhythm, clock, metric names and the progress display, without a model."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from gemma_tune.train import callbacks
from gemma_tune.train.callbacks import Clock, ProgressDisplay, Rhythm, clock_time, every_tenth, is_due, metrics_line
from gemma_tune.train.signals import Signals


@pytest.fixture
def arguments(tmp_path: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def rhythm(log: list[int], **changes: Any) -> Rhythm:
    settings: dict[str, Any] = {
        "evaluate_every": 2,
        "save_every": 3,
        "sample_every": 2,
        "sample": log.append,
        "before": lambda: None,
        "signals": Signals(),
        "agree": lambda flag: flag,
    }
    return Rhythm(**{**settings, **changes})


def after(rule: Rhythm, arguments: TrainingArguments, step: int, last: int = 7) -> TrainerControl:
    state = TrainerState(global_step=step, max_steps=last)
    return rule.on_step_end(arguments, state, TrainerControl())


def test_evaluation_checkpoint_and_samples_come_when_due_and_at_the_end(arguments: TrainingArguments) -> None:
    sampled: list[int] = []
    rule = rhythm(sampled)
    found = [after(rule, arguments, step) for step in range(1, 8)]
    assert [step for step, control in enumerate(found, 1) if control.should_evaluate] == [2, 4, 6, 7]
    assert [step for step, control in enumerate(found, 1) if control.should_save] == [3, 6, 7]
    assert sampled == [2, 4, 6], "the last samples come after the last checkpoint"
    assert not any(control.should_training_stop for control in found)


def test_a_signal_saves_and_stops_and_skips_the_rest(arguments: TrainingArguments) -> None:
    sampled: list[int] = []
    signals = Signals()
    signals.requested = "SIGTERM"
    rule = rhythm(sampled, signals=signals)
    control = after(rule, arguments, 2)
    assert control.should_save and control.should_training_stop and not control.should_evaluate
    assert rule.stopping and sampled == []


def test_one_process_with_a_signal_stops_all(arguments: TrainingArguments) -> None:
    rule = rhythm([], agree=lambda flag: True)
    assert after(rule, arguments, 1).should_training_stop and rule.stopping


def test_due() -> None:
    assert [step for step in range(1, 10) if is_due(step, 4, 9)] == [4, 8, 9]
    assert [step for step in range(1, 10) if is_due(step, None, 9)] == [9]
    assert (every_tenth(None, 100), every_tenth(None, 5), every_tenth(7, 100)) == (10, 1, 7)


def test_the_clock_does_not_count_pauses_and_goes_on_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    clock = Clock(100.0)
    now[0] = 5
    assert clock.seconds == 100
    clock.start()
    now[0] = 8
    with clock.paused():
        now[0] = 50
        with clock.paused():
            now[0] = 60
    now[0] = 61
    assert clock.seconds == 104
    clock.stop()
    now[0] = 99
    assert clock.seconds == 104
    with clock.paused():
        pass
    now[0] = 200
    assert clock.seconds == 104, "a pause does not start a clock that stood"


def test_names_in_metrics() -> None:
    logs = {"loss": 1.0, "mean_token_accuracy": 0.5, "num_tokens": 3, "epoch": 0.1}
    assert metrics_line(logs) == {"loss": 1.0, "token_accuracy": 0.5, "epoch": 0.1}
    assert metrics_line({"train_runtime": 1.0, "train_loss": 2.0}) == {}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3723, "1:02:03")])
def test_time_left(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text


def run_display(console: Console, arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    display = ProgressDisplay(console, lambda: {"tokens_per_second": 1234.0})
    state = TrainerState(max_steps=40, is_world_process_zero=True)
    control = TrainerControl()
    display.on_train_begin(arguments, state, control)
    for step in range(1, 41):
        now[0] += 1.0
        state.global_step = step
        display.on_step_end(arguments, state, control)
        display.on_log(arguments, state, control, {"loss": 2.5})
    display.on_train_end(arguments, state, control)


def test_elsewhere_a_line_now_and_then_with_loss_speed_and_time_left(
    arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    run_display(Console(file=stream, width=120), arguments, monkeypatch)
    assert stream.getvalue().splitlines() == [
        "step 10 of 40: loss 2.5000, 1,234 tokens/s, 0:30 left",
        "step 20 of 40: loss 2.5000, 1,234 tokens/s, 0:20 left",
        "step 30 of 40: loss 2.5000, 1,234 tokens/s, 0:10 left",
        "step 40 of 40: loss 2.5000, 1,234 tokens/s, 0:00 left",
    ]


def test_on_a_terminal_a_bar(arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    run_display(Console(file=stream, width=120, force_terminal=True), arguments, monkeypatch)
    printed = stream.getvalue()
    assert "40/40" in printed and "1,234 tokens/s" in printed and "loss 2.5000" in printed


def test_each_line_of_metrics_has_the_peak_memory(arguments: TrainingArguments) -> None:
    class Folder:
        rows: list[dict[str, Any]] = []  # noqa: RUF012 - one folder, one test

        def append(self, name: str, rows: list[dict[str, Any]]) -> None:
            assert name == "metrics.jsonl"
            self.rows += rows

    folder = Folder()
    file = callbacks.MetricsFile(folder, lambda: {"tokens_seen": 9})  # type: ignore[arg-type]
    file.on_log(arguments, TrainerState(global_step=3), TrainerControl(), {"loss": 1.0})
    (row,) = folder.rows
    assert row["step"] == 3 and row["loss"] == 1.0 and row["tokens_seen"] == 9
    assert row["peak_rss"] > 50 * 2**20, "bytes of this process"
