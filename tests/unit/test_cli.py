"""The command line: parsing, exit codes, and that no failure shows a traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gemma_tune
from gemma_tune import cli, console
from gemma_tune.errors import Aborted, AccessError, GemmaTuneError, Stopped, TrainingError, UserError

Calls = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # main() sets variables; what it sets must not outlive the test.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    console.stdout.cache_clear()
    console.stderr.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Commands that only note how they were called, and return 0."""
    found: Calls = []

    def command(name: str) -> Any:
        def record(*arguments: Any) -> int:
            found.append((name, *arguments))
            return 0

        return SimpleNamespace(run=record, list_=record, copy=record, schema=record, sft=record, check=record)

    monkeypatch.setattr(cli, "_command", command)
    return found


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException | Callable[[], Any]) -> None:
    def run(*_: Any) -> int:
        if isinstance(error, BaseException):
            raise error
        return error()

    monkeypatch.setattr(cli, "_command", lambda name: SimpleNamespace(run=run))


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("sft r.yaml", ("train", "sft", "r.yaml", [], "never")),
        ("reward r.yaml a.b=c", ("train", "reward", "r.yaml", ["a.b=c"], "never")),
        ("dpo r.yaml --resume must", ("train", "dpo", "r.yaml", [], "must")),
        ("kto r.yaml kto.beta=1", ("train", "kto", "r.yaml", ["kto.beta=1"], "never")),
        ("sft r.yaml --resume auto", ("train", "sft", "r.yaml", [], "auto")),
        ("sft --resume=must r.yaml a.b=c", ("train", "sft", "r.yaml", ["a.b=c"], "must")),
        ("sft r.yaml a.b=c --d.e f --g.h=i", ("train", "sft", "r.yaml", ["a.b=c", "--d.e", "f", "--g.h=i"], "never")),
        ("sft r.yaml --learning-rate 2", ("train", "sft", "r.yaml", ["--learning-rate", "2"], "never")),
        ("sft r.yaml --lerning_rate 2", ("train", "sft", "r.yaml", ["--lerning_rate", "2"], "never")),
        ("sft r.yaml --num_epochs 2", ("train", "sft", "r.yaml", ["--num_epochs", "2"], "never")),
        ("sft --optim.epochs 2 r.yaml", ("train", "sft", "r.yaml", ["--optim.epochs", "2"], "never")),
        ("sft a.b=c r.yaml", ("train", "sft", "r.yaml", ["a.b=c"], "never")),
        ("sft r.yaml --optim.x -1e-4", ("train", "sft", "r.yaml", ["--optim.x", "-1e-4"], "never")),
        ("sft r.yaml --seed 3 --resume auto", ("train", "sft", "r.yaml", ["--seed", "3"], "auto")),
        ("sft dir/a=b.yaml", ("train", "sft", "dir/a=b.yaml", [], "never")),
        ("sft r.yaml other.yaml", ("train", "sft", "r.yaml", ["other.yaml"], "never")),
        ("sft r.yaml --a.b", ("train", "sft", "r.yaml", ["--a.b"], "never")),
        ("check r.yaml", ("check", "r.yaml", [], None, False, None)),
        ("check r.yaml --machine t4 --json a.b=c", ("check", "r.yaml", ["a.b=c"], "t4", True, None)),
        ("check r.yaml --accelerate ddp", ("check", "r.yaml", [], None, False, "ddp")),
        ("show r.yaml", ("show", "r.yaml", [], 3, False)),
        ("show r.yaml --rows 7 --json", ("show", "r.yaml", [], 7, True)),
        ("doctor", ("doctor", False)),
        ("doctor --json", ("doctor", True)),
        ("chat m", ("chat", "m", [], 256, None)),
        ("chat m --prompt a --prompt b --max-new-tokens 9 --system s", ("chat", "m", ["a", "b"], 9, "s")),
        ("tpu r.yaml", ("tpu", "r.yaml", [], None, "never")),
        ("tpu r.yaml --mesh tp=2 --resume auto a.b=c", ("tpu", "r.yaml", ["a.b=c"], "tp=2", "auto")),
        ("check r.yaml --machine v5e-8", ("tpu", "r.yaml", [], "v5e-8", None, False)),
        ("recipes list", ("recipes",)),
        ("recipes copy x", ("recipes", "x", None)),
        ("recipes copy x y", ("recipes", "x", "y")),
        ("recipes schema", ("recipes",)),
        ("--debug sft r.yaml", ("train", "sft", "r.yaml", [], "never")),
        ("sft r.yaml --debug", ("train", "sft", "r.yaml", [], "never")),
    ],
)
def test_commands_are_called_as_agreed(arguments: str, call: tuple[Any, ...], calls: Calls) -> None:
    assert cli.main(arguments.split()) == 0
    assert calls == [call]


@pytest.mark.parametrize(
    ("arguments", "said", "fix"),
    [
        ("sft", "Missing argument 'RECIPE'", "gemma-tune sft --help"),
        ("sft --a.b c", "no recipe is named", "gemma-tune sft RECIPE.yaml"),
        ("sft a.b=c", "no recipe is named", "gemma-tune sft RECIPE.yaml"),
        ("sft r.yaml --resume maybe", "'maybe'", "gemma-tune sft --help"),
        ("sft r.yaml --resum auto", "no such option: --resum", "did you mean --resume?"),
        ("check r.yaml --machin t4", "no such option: --machin", "did you mean --machine?"),
        ("check --verbose r.yaml", "no such option: --verbose", "gemma-tune check --help"),
        ("check r.yaml --verbose", "no such option: --verbose", "gemma-tune check --help"),
        ("check -v r.yaml", "no such option: -v", "gemma-tune check --help"),
        ("show r.yaml -n 3", "no such option: -n", "gemma-tune show --help"),
        ("show r.yaml --rows 0", "--rows", "gemma-tune show --help"),
        ("show r.yaml --rows x", "--rows", "gemma-tune show --help"),
        ("doctor --foo", "--foo", "gemma-tune doctor --help"),
        ("sftt", "No such command 'sftt'", "gemma-tune --help"),
        ("x/y.yaml", "No such command 'x/y.yaml'", "gemma-tune sft x/y.yaml"),
        ("recipes", "Missing command", "gemma-tune recipes --help"),
        ("recipes lst", "No such command 'lst'", "gemma-tune recipes --help"),
    ],
)
def test_usage_errors(arguments: str, said: str, fix: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    assert calls == []
    text = capsys.readouterr().err
    assert text.startswith("error: command line: ") and said in text
    assert f"  fix: {fix}" in text or f"  fix: see: {fix}" in text
    assert "Traceback" not in text and "pydantic" not in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (GemmaTuneError("x"), 1),
        (UserError("x"), 2),
        (AccessError("x"), 3),
        (TrainingError("x"), 4),
        (Stopped("x"), 75),
        (Aborted("x"), 130),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/locked"), 3),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300), 2),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), 2),
        (RuntimeError("Could not determine home directory."), 2),
        (RuntimeError("surprise"), 1),
        (MemoryError(), 3),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone"), 1),
        (ValueError("surprise"), 1),
        (EOFError(), 1),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_exit_codes_and_tracebacks(
    error: BaseException, code: int, debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, error)
    assert cli.main(["doctor", *["--debug"] * debug]) == code
    text = capsys.readouterr().err
    assert ("Traceback" in text) == debug
    assert "error: " in text or isinstance(error, KeyboardInterrupt)


def test_a_bug_of_ours_asks_for_a_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, ValueError("first line\nsecond line"))
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == (
        "error: internal error: ValueError: first line\n"
        "  fix: run the same command with --debug and report what it prints: this is a bug\n"
    )


def test_a_full_disk_names_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/full/x"))
    cli.main(["doctor"])
    assert "error: /full/x: No space left on device" in capsys.readouterr().err


def test_a_token_is_masked_even_in_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token = "hf_" + "aB3" * 11 + "x"
    failing(monkeypatch, ValueError(f"bad {token}"))
    cli.main(["doctor", "--debug"])
    text = capsys.readouterr().err
    assert token not in text and "hf_***" in text


def test_a_job_without_a_result_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda: None)
    assert cli.main(["doctor"]) == 0
    failing(monkeypatch, lambda: 75)
    assert cli.main(["doctor"]) == 75


def test_a_bad_recipe_through_the_real_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: google/gemma-3-1b-it}\nlerning_rate: 1\n")
    assert cli.main(["check", str(path)]) == 2
    text = capsys.readouterr().err
    assert f"error: {path}:2: lerning_rate: unknown key; did you mean 'optim.learning_rate'?" in text
    assert f"error: {path}:1: data: is missing" in text


@pytest.mark.parametrize("name", ["~nobody-has-this-name/model", "a" * 300])
def test_a_path_that_cannot_be_is_the_users(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"model: {{name: {name}}}\ndata: {{sources: [{{name: x.jsonl}}]}}\noutput: runs/x\n")
    assert cli.main(["check", str(path)]) == 2
    assert "internal error" not in capsys.readouterr().err


def test_the_help_of_check_names_every_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_tune.plan.machine import MACHINES

    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["check", "--help"]) == 0
    assert f"{', '.join(MACHINES)}. Default: this one." in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemma-tune {gemma_tune.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    for command in ("sft", "reward", "dpo", "kto", "ppo", "check", "show", "doctor", "chat", "recipes"):
        assert f"\n  {command}" in text
    assert "..." not in text.partition("Commands:")[2].partition("\n\n")[0], "a command's summary is cut"


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma_tune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_as_a_module() -> None:
    assert run("--version").stdout.startswith("gemma-tune ")
    assert run("sftt").returncode == 2


def test_a_reader_that_goes_away_is_no_error() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "gemma_tune", "recipes", "schema"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(write_end)
    assert done.returncode == cli.BROKEN_PIPE
    assert done.stderr == ""


def test_closed_streams_are_no_error() -> None:
    command = f"'{sys.executable}' -m gemma_tune recipes schema >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", command], timeout=60).returncode == 0


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("check", str(tmp_path / "café.yaml"), env=environment)
    assert done.returncode == 2
    assert "caf\\xe9.yaml: no such file" in done.stderr


def test_typed_bytes_that_are_no_utf8_are_replaced() -> None:
    code = "import sys; from gemma_tune import cli; cli.main(['--version']); assert input() == 'caf\ufffd'"
    done = subprocess.run([sys.executable, "-c", code], input=b"caf\xe9\n", capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "seconds"), [(["--help"], 0.3), (["check", "recipes/ultrachat_qlora.yaml", "--machine", "a100"], 0.6)]
)
def test_help_and_check_answer_at_once(arguments: list[str], seconds: float) -> None:
    # The bars are for an idle machine. The best of five keeps a busy machine out of it.
    import time

    def once() -> float:
        start = time.perf_counter()
        assert run(*arguments, cwd=Path(gemma_tune.__file__).parents[1]).returncode == 0
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < seconds


def test_telemetry_is_off_before_a_command_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def look() -> int:
        seen.update(os.environ)
        return 0

    monkeypatch.delitem(os.environ, "HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.delitem(os.environ, "DO_NOT_TRACK", raising=False)
    monkeypatch.delitem(os.environ, "DISABLE_TELEMETRY", raising=False)
    failing(monkeypatch, look)
    assert cli.main(["doctor"]) == 0
    assert seen["HF_HUB_DISABLE_TELEMETRY"] == "1"
