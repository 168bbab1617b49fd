"""The handlers around accelerate's launcher, and the command line that it is given. The launcher itself runs in
tests/integration/test_launch.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.errors import AccessError, Problem, Stopped, UserError
from gemma_tune.launch import start
from gemma_tune.launch.failure import Failure
from gemma_tune.launch.nodes import Nodes
from gemma_tune.launch.settings import Settings
from gemma_tune.launch.world import ASKED, World
from gemma_tune.plan.accelerate_files import shipped_files

SETTINGS = Settings(Path("f.yaml"), "MULTI_GPU")


@pytest.mark.parametrize("nodes", [Nodes(), Nodes(2, 1, "host", 4000)])
def test_accelerate_understands_what_it_is_given(nodes: Nodes) -> None:
    from accelerate.commands.launch import launch_command_parser

    words = ["sft", "my recipe.yaml", "a.b=c", "--resume", "auto"]
    settings = Settings(shipped_files()["ddp"], "MULTI_GPU")
    arguments = launch_command_parser().parse_args(start.arguments_of(settings, World(nodes, 4), words))
    assert arguments.module and arguments.training_script == "gemma_tune"
    assert arguments.training_script_args == words
    assert (arguments.num_processes, arguments.num_machines, arguments.machine_rank) == (
        4 * nodes.count,
        nodes.count,
        nodes.rank,
    )
    assert arguments.main_process_ip == nodes.address and arguments.main_process_port == (nodes.port or 0)
    assert arguments.max_restarts == 0


def test_what_accelerate_hands_on_to_torchrun_by_name_is_there() -> None:
    """signals_to_handle, shutdown_timeout, log_dir, standalone, local_addr: set on accelerate's arguments by name."""
    from torch.distributed.run import get_args_parser

    known = vars(get_args_parser().parse_args(["x"]))
    assert {"signals_to_handle", "shutdown_timeout", "log_dir", "standalone", "local_addr"} <= known.keys()


def test_the_environment_of_the_processes_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with start.environment_of(Settings(Path("f"), "MULTI_GPU", use_cpu=True), World(Nodes(), 2)):
        assert os.environ[ASKED] == "2" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert ASKED not in os.environ and os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    with start.environment_of(Settings(Path("f"), "MULTI_GPU", gpu_ids="0,2"), World(Nodes(), 2)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"


def test_the_first_signal_ends_the_watch_and_a_second_ctrl_c_goes_to_the_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException

    sent: list[int] = []
    monkeypatch.setattr(start, "signal_processes", sent.append)
    before = signal.getsignal(signal.SIGTERM)
    with start.Handlers() as handlers:
        with pytest.raises(SignalException) as caught:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert caught.value.sigval == signal.SIGUSR1 and handlers.asked == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)  # the wait for the checkpoint goes on
        os.kill(os.getpid(), signal.SIGINT)
    assert sent == [signal.SIGINT] and handlers.asked == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with start.Handlers():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_only_processes_with_a_session_of_their_own_are_signalled() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    own = subprocess.Popen(command, start_new_session=True)
    other = subprocess.Popen(command)
    try:
        start.signal_processes(signal.SIGKILL)
        assert own.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for process in (own, other):
            process.kill()
            process.wait()


def at(when: float) -> start.Handlers:
    handlers = start.Handlers()
    handlers.asked, handlers.when = "SIGTERM", when
    return handlers


def test_a_signal_means_75_unless_something_had_failed_before(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = Failure(0, 75, 101.0, (Problem("stopped by SIGTERM"),))
    late, early = (Failure(1, 4, when, (Problem("lost its neighbour"),)) for when in (101.0, 99.0))
    assert isinstance(start._stopped(at(100.0), [stopped], "h"), Stopped)
    assert isinstance(start._stopped(at(100.0), [], "h"), Stopped)
    assert isinstance(start._stopped(at(100.0), [stopped, late], "h"), Stopped)
    assert "rank 1 on h did not stop well: lost its neighbour" in capsys.readouterr().err
    assert start._stopped(at(100.0), [stopped, early], "h").exit_code == 4
    assert start._stopped(at(100.0), [stopped, Failure(1, 130, 102.0, (Problem("again"),))], "h").exit_code == 130


@pytest.mark.parametrize(
    ("raised", "error", "what"),
    [
        (ConnectionError("port 4000 is used"), AccessError, "the 2 nodes did not find each other: port 4000 is used"),
        (ValueError("no such key"), UserError, "accelerate: no such key"),
    ],
)
def test_what_stops_the_launcher_itself_is_said(
    raised: Exception, error: type[Exception], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch

    def fail(arguments: object) -> None:
        raise raised

    monkeypatch.setattr(launch, "launch_command", fail)
    with pytest.raises(error, match=what):
        start.launch(SETTINGS, World(Nodes(2, 1, "host", 4000), 1), ["sft", "r.yaml"])
