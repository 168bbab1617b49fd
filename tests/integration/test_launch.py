"""Started in the ways in which people start jobs, stopped in the ways in which jobs stop: one and the same run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gemma_tune.cli import main
from gemma_tune.launch.nodes import find_nodes
from gemma_tune.train import checkpoint
from tests.integration.test_resume import losses
from tests.integration.tiny_runs import document, write_recipe

BIN = Path(sys.executable).parent
STEPS, EVERY = 40, 5


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of forty quick steps, long enough to be stopped on the way."""
    folder = tmp_path_factory.mktemp("launch")
    write_recipe(
        folder,
        tiny("gemma3_text"),
        adapter={"dropout": 0.0},
        data={"max_length": 64},
        optim={"max_steps": STEPS, "epochs": 100},
        batch={"micro": 1},
        evaluation={"every": 1000},
        samples={"prompts": [], "held_out": 0},
        checkpoint={"every": EVERY},
    )
    for name, machines in (("one_node", 1), ("two_nodes", 2)):
        settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "mixed_precision": "no"}
        counts = {"num_machines": machines, "machine_rank": 0, "num_processes": 2, "use_cpu": True}
        (folder / f"{name}.yaml").write_text(json.dumps(settings | counts), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """The run that nobody stopped, under torchrun."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "gemma_tune"]
    with started([*command, "sft", "recipe.yaml", "output=straight"], folder) as process:
        printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert printed.count("held-out loss:") == 1
    return folder / "straight"


@contextlib.contextmanager
def started(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """`command` in a process group of its own, none of which is left behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | variables
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        family = [process.pid, *(child.pid for child in children(process.pid))]
        for pid in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(os.getpgid(pid), signal.SIGKILL)
        process.wait(timeout=30)


def children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def worker(pid: int, rank: int) -> psutil.Process:
    """The training process of `rank` below the launcher `pid`."""
    for child in children(pid):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if child.environ().get("RANK") == str(rank):
                return child
    raise AssertionError(f"no process of rank {rank}")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path.name} within two minutes"
        time.sleep(0.02)


def reached(run: Path) -> int:
    found = checkpoint.newest(run)
    assert found.found is not None and not found.skipped
    return found.found.step


def test_a_run_of_our_launcher_that_lost_a_process_goes_on_under_accelerate_and_ends_as_one_of_torchrun(
    straight: Path, folder: Path
) -> None:
    run = folder / "broken"
    ours = [str(BIN / "gemma-tune"), "sft", "recipe.yaml", "output=broken", "--accelerate", "one_node.yaml"]
    with started(ours, folder) as process:
        wait_for(run / f"checkpoint-{EVERY}", process)
        victim = worker(process.pid, 1)
        at = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=90)
        assert time.monotonic() - at < 60
    assert process.returncode == 4, error
    assert f"rank 1 on {socket.gethostname()}: killed by SIGKILL (process {victim.pid})" in error
    assert "Traceback" not in error and "torch/distributed" not in error
    assert not psutil.pid_exists(victim.pid)
    assert EVERY <= reached(run) < STEPS

    theirs = [str(BIN / "accelerate"), "launch", "--config_file", "one_node.yaml", "--main_process_port", "0"]
    words = ["-m", "gemma_tune", "sft", "recipe.yaml", "output=broken", "--resume", "auto"]
    with started([*theirs, *words], folder) as end:
        printed, error = end.communicate(timeout=120)
    assert end.returncode == 0, error
    assert printed.count("held-out loss:") == 1
    assert losses(run).keys() == losses(straight).keys() == set(range(1, STEPS + 1))
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)
    results = [document(one / "run.json")["results"] for one in (run, straight)]
    assert results[0]["tuned"]["loss"] == pytest.approx(results[1]["tuned"]["loss"], rel=1e-5)
    assert results[0]["tokens_seen"] == results[1]["tokens_seen"]
    assert len(document(run / "run.json")["segments"]) == 2


SRUN = """\
#!{python}
# As srun(1) does: one task a node with its number, signals handed on, the highest exit code.
import os, signal, subprocess, sys
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")][:3]
assert options[0] == "--ntasks-per-node=1" and options[2] == "--kill-on-bad-exit=1", options
tasks = []
for number in signal.SIGUSR1, signal.SIGTERM:
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
for node in range(2):
    facts = {{"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": str(node),
             "SLURM_STEP_NODELIST": "127.0.0.[1-2]"}}
    log = open(f"node{{node}}.log", "a")
    tasks.append(subprocess.Popen(words[3:], env={{**os.environ, **facts}}, stdout=log, stderr=log))
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> requeued\n'


def program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def free_job() -> str:
    """A job number whose port is free."""
    for job in range(os.getpid(), os.getpid() + 1000):
        facts = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "a,b", "SLURM_JOB_ID": str(job)}
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", find_nodes(facts).port or 0))
            return str(job)
    raise AssertionError("no free port")


def test_a_slurm_job_of_two_nodes_is_warned_requeued_and_ends_as_one_run(
    straight: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    order = ["launch", "--template", "slurm", "recipe.yaml", "output=slurm", "--nodes", "2", "--gpus-per-node", "1"]
    assert main([*order, "--accelerate", "two_nodes.yaml", "--out", "job.sh"]) == 0
    tools = folder / "tools"
    tools.mkdir()
    program(tools / "srun", SRUN.format(python=sys.executable))
    program(tools / "scontrol", SCONTROL)
    path = f"{tools}:{BIN}:{os.environ['PATH']}"
    job = free_job()
    run, shell = folder / "slurm", [shutil.which("bash") or "bash", "job.sh"]

    with started(shell, folder, PATH=path, SLURM_JOB_ID=job) as process:
        wait_for(run / f"checkpoint-{EVERY}", process)
        process.send_signal(signal.SIGUSR1)  # the batch shell alone, as --signal=B: does
        printed, error = process.communicate(timeout=90)
    logs = [(folder / f"node{node}.log").read_text(encoding="utf-8") for node in range(2)]
    assert process.returncode == 75, (printed, error, logs)
    assert (folder / "requeued").read_text(encoding="utf-8") == f"requeue {job}\n"
    assert "back into the queue" in printed
    assert all("stopped by SIGUSR1" in log for log in logs)
    assert EVERY <= reached(run) < STEPS

    with started(shell, folder, PATH=path, SLURM_JOB_ID=job, SLURM_RESTART_COUNT="1") as process:
        printed, error = process.communicate(timeout=120)
    logs = [(folder / f"node{node}.log").read_text(encoding="utf-8") for node in range(2)]
    assert process.returncode == 0, (printed, error, logs)
    assert (folder / "requeued").read_text(encoding="utf-8").count("requeue") == 1
    assert [log.count("held-out loss:") for log in logs] == [1, 0], "only the first node speaks"
    assert logs[0].count("2 processes: 1 on each of 2 machines") == 2
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)
    assert sorted(path.name for path in folder.glob("slurm*")) == ["slurm"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (run / f"checkpoint-{STEPS}").iterdir()}


def test_accelerate_itself_starts_one_process_for_multi_cpu_and_that_is_refused(folder: Path) -> None:
    """The fault behind the refusal in our launcher: accelerate 1.15, commands/launch.py."""
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "mixed_precision": "no"}
    file = folder / "multi_cpu.yaml"
    file.write_text(json.dumps(settings | {"num_machines": 1, "num_processes": 2, "use_cpu": True}), encoding="utf-8")
    command = [str(BIN / "accelerate"), "launch", "--config_file", str(file), "-m", "gemma_tune"]
    with started([*command, "sft", "recipe.yaml", "output=alone"], folder) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "accelerate was asked for several processes and started one" in error
    assert not (folder / "alone").exists()
