"""Of two processes one tokenises; after `gemma-tune data prepare` none does. A bad row is told once and ends both."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_tune.cli import main
from tests.integration.test_resume import losses
from tests.integration.tiny_runs import document, write_recipe

OWN = """
import json, os
from pathlib import Path

HERE = Path(__file__).parent

def rows():
    with open(HERE / "pids", "a") as file:
        file.write(f"{os.getpid()}\\n")
    for line in (HERE / "rows.jsonl").read_text().splitlines():
        yield json.loads(line)

def bad():
    yield {"messages": "none"}
"""

WORKER = """
import json, os, sys
from types import SimpleNamespace
import torch.distributed
from rich.console import Console
from gemma_tune.data.build import build
from gemma_tune.plan.choices_data import data_choices
from gemma_tune.recipe.reader import read_recipe
from gemma_tune.train.parts import fetch, remove_shared

torch.distributed.init_process_group("gloo")
recipe, library, out = sys.argv[1:]
read = read_recipe(recipe, [])
sections = {
    "model": {"name": read.model.name},
    "data": {key: choice.value for key, choice in data_choices(read).items()},
    "session": {"distributed": {"timeout": 1}},
}
plan = SimpleNamespace(family="gemma3_text", machine={"world_size": 2}, values=lambda name: sections[name])
found = []
for root in ("nowhere", library):
    os.environ["GEMMA_TUNE_PREPARED"] = root
    parts = fetch(plan, build, Console())
    rows = parts.data.train
    mapped = all(os.path.exists(file["filename"]) for file in rows.cache_files) and bool(rows.cache_files)
    torch.distributed.barrier()
    remove_shared(parts.shared)
    assert parts.shared is None or not parts.shared.exists()
    found.append([parts.data.fingerprint, rows.to_list(), parts.data.report.to_json(), mapped, parts.encoder.sha256])
sections["data"]["streaming"] = True
streamed = fetch(plan, build, Console()).data.fingerprint
with open(f"{out}-{os.environ['RANK']}", "w") as file:
    json.dump([os.getpid(), found, streamed], file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def launch(*arguments: str, **environment: str) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and seconds of a program on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *arguments]
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    try:
        printed, error = process.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
    return process.returncode, printed, error, time.monotonic() - begun


@pytest.fixture
def recipe(tiny: Callable[..., Path], tmp_path: Path) -> str:
    """A recipe whose rows come from a function that leaves a line each time it is called."""
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    path = write_recipe(tmp_path, tiny("gemma3_text"))
    return str(write_recipe(tmp_path, tiny("gemma3_text"), data={"sources": [{"name": f"{path.parent}/mine.py:rows"}]}))


def calls(folder: Path) -> list[str]:
    return (folder / "pids").read_text(encoding="utf-8").splitlines()


def test_a_run_finds_what_was_prepared_and_is_the_same(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GEMMA_TUNE_PREPARED", raising=False)
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    assert main(["sft", recipe, f"output={tmp_path / 'plain'}"]) == 0
    assert len(calls(tmp_path)) == 1 and not (tmp_path / "cache").exists()
    capsys.readouterr()
    assert main(["data", "prepare", recipe]) == 0
    out, error = capsys.readouterr()
    assert "52 documents in" in out and f"gemma-tune sft {recipe}" in out
    assert "prepare again when what it reads has changed" in error
    (folder,) = (tmp_path / "cache" / "prepared").iterdir()
    assert main(["sft", recipe]) == 0
    assert f"read from {folder}" in capsys.readouterr().out
    assert len(calls(tmp_path)) == 2
    plain, prepared = (document(tmp_path / name / "run.json") for name in ("plain", "run"))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert prepared["data"] == plain["data"] and prepared["identity"] == plain["identity"]

    # Another length is other data; damaged data are said and not used.
    assert main(["sft", recipe, f"output={tmp_path / 'longer'}", "data.max_length=130", "optim.max_steps=1"]) == 0
    assert len(calls(tmp_path)) == 3
    capsys.readouterr()
    (folder / "train.jsonl").write_text("altered", encoding="utf-8")
    assert main(["sft", recipe, f"output={tmp_path / 'damaged'}", "optim.max_steps=1"]) == 0
    assert "is not used, and all is read again: train.jsonl has 7 bytes" in capsys.readouterr().out
    assert len(calls(tmp_path)) == 4
    assert main(["data", "list"]) == 0
    assert f"{folder}  " in capsys.readouterr().out


def test_one_of_two_processes_tokenises_and_none_where_it_was_prepared(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    library, scratch = tmp_path / "library", tmp_path / "scratch"
    scratch.mkdir()
    assert main(["data", "prepare", recipe, "--out", str(library)]) == 0
    assert calls(tmp_path) == [str(os.getpid())]
    arguments = [recipe, str(library), str(tmp_path / "found")]
    code, _, error, _ = launch(str(tmp_path / "worker.py"), *arguments, TMPDIR=str(scratch))
    assert code == 0, error
    read = [json.loads((tmp_path / f"found-{rank}").read_text()) for rank in (0, 1)]
    (first, found, streamed), (second, others, _) = read
    assert calls(tmp_path)[:2] == [str(os.getpid()), str(first)]
    assert found == others, "both processes hold the same"
    unprepared, prepared = found
    assert unprepared == prepared and prepared[3], "mapped from a file each time"
    assert calls(tmp_path)[2:] == [str(first), str(second)], "a stream is read by everybody"
    assert read[1][2] == streamed
    assert not list(scratch.glob("gemma-tune-data-*")), "the shared folder goes with the process that made it"


def test_a_bad_row_of_the_first_process_is_told_once_and_ends_the_job(recipe: str, tmp_path: Path) -> None:
    source = f"data.sources.0.name={tmp_path}/mine.py:bad"
    code, _, error, seconds = launch("-m", "gemma_tune", "sft", recipe, source)
    assert code != 0 and error.count("error: ") == 1, error
    assert "mine.py:bad row 1: messages is text ('none'), not a list" in error
    assert seconds < 120, "not the half hour that it would wait for the data"
    assert not (tmp_path / "run").exists()
