"""accelerate's launcher, in this process: it starts the training processes, watches them and tells how they ended.

accelerate reads its file and hands over to torch's agent (torchrun's engine), which both run in this process. What is
ours is around it: who is asked to stop how, and which exit code comes of it.

- The agent gives 1 for every failure. The processes leave their own code and message in its files (`failure.py`).
- The agent hears SIGTERM, SIGINT, SIGHUP and SIGQUIT, and lets a second signal break off the wait for the checkpoint;
  TORCHELASTIC_SIGNALS_TO_HANDLE is overwritten by launch_agent (torch 2.13, distributed/launcher/api.py). Our handlers
  stand in their place: the first signal reaches all processes, a second Ctrl-C ends them, others change nothing.
- The agent kills after 30 seconds what has not stopped. A checkpoint may take longer: `PATIENCE`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gemma_tune import console
from gemma_tune.errors import Aborted, AccessError, GemmaTuneError, Stopped, UserError
from gemma_tune.launch.failure import Failure, as_error, first, read_failure, read_folder
from gemma_tune.launch.nodes import whole_number
from gemma_tune.launch.parent import LAUNCHER
from gemma_tune.launch.settings import Settings
from gemma_tune.launch.world import ASKED, World

PATIENCE = 150
"""Seconds between a signal and SIGKILL, for the last checkpoint; TORCH_ELASTIC_SHUTDOWN_TIMEOUT replaces it."""

HEARD = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def gpus_here() -> int:
    """GPUs that torch can use on this machine. Imports torch."""
    import torch

    return int(torch.cuda.device_count())


def launch(settings: Settings, world: World, words: Sequence[str]) -> None:
    """Run `python -m gemma_tune WORDS` in the processes of `world` that belong to this machine, and wait for them.

    Raises:
        GemmaTuneError: of the process that failed first, with its exit code.
        Stopped: a signal came, and the run can be resumed.
        AccessError: the machines did not find each other.
        UserError: accelerate refuses its file.
    """
    folder = Path(tempfile.mkdtemp(prefix="gemma-tune-launch-"))
    try:
        with environment_of(settings, world), Handlers() as handlers:
            _launch(settings, world, words, folder, handlers)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def environment_of(settings: Settings, world: World) -> Iterator[None]:
    """The variables that the processes find, besides those of accelerate and torch; gone afterwards."""
    changes = {ASKED: str(world.size), LAUNCHER: str(os.getpid())}
    if settings.use_cpu:
        changes["CUDA_VISIBLE_DEVICES"] = ""  # use_cpu reaches no process of several: accelerate 1.15 sets it for one
    elif settings.gpu_ids:
        changes["CUDA_VISIBLE_DEVICES"] = settings.gpu_ids
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Handlers:
    """Context manager that owns the handlers of `HEARD` while processes run.

    The first signal ends the agent's watch, and it passes the signal on and waits. A second Ctrl-C goes to the
    processes directly, which then leave at once; any other later signal changes nothing. A signal that the parent
    ignores (nohup) stays ignored.

    Attributes:
        asked: name of the first signal; None until one came.
        when: seconds since the epoch at which it came.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.when = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Handlers:
        if threading.current_thread() is threading.main_thread():
            for name in HEARD:
                number = getattr(signal, name)
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if self.asked is None:
            self.asked, self.when = signal.Signals(number).name, time.time()
            raise SignalException(f"stopped by {self.asked}", signal.Signals(number))
        if number == signal.SIGINT:
            signal_processes(signal.SIGINT)


def signal_processes(number: signal.Signals) -> None:
    """Send a signal to the processes that the agent has started here, each with those that it started itself."""
    import psutil  # accelerate needs it

    for child in psutil.Process().children():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(child.pid) == child.pid:  # the agent gives each a session of its own
                os.killpg(child.pid, number)


def _launch(settings: Settings, world: World, words: Sequence[str], folder: Path, handlers: Handlers) -> None:
    # torch reads it too, when it is imported.
    patience = whole_number(os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", default=PATIENCE)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    _quieten()
    base = world.nodes.rank * world.a_node
    host = socket.gethostname()
    arguments = launch_command_parser().parse_args(arguments_of(settings, world, words))
    # Options of torchrun that accelerate's parser does not know; it hands them on by their names.
    arguments.signals_to_handle = "SIGQUIT"  # the others are ours
    arguments.shutdown_timeout = patience
    arguments.log_dir = str(folder)
    if world.nodes.count == 1:
        arguments.standalone = True  # a free port of its own, found by the one who binds it
        arguments.local_addr = "127.0.0.1"  # a laptop's own name often leads nowhere
    try:
        launch_command(arguments)
    except SignalException:
        raise _stopped(handlers, read_folder(folder, base), host) from None
    except ChildFailedError as error:
        failures = [
            read_failure(rank, left.error_file_data, code=left.exitcode, when=left.timestamp, pid=left.pid)
            for rank, left in error.failures.items()
        ]
        raise as_error(first(failures), host) from None
    except (DistError, RendezvousError, ConnectionError) as error:
        raise AccessError(
            f"the {world.nodes.count} nodes did not find each other: {str(error).splitlines()[0]}",
            where=f"{world.nodes.address or host}:{world.nodes.port or ''}",
            fix="the address and the port must be reachable from all nodes; --main-process-ip and --main-process-port",
        ) from None
    except ValueError as error:
        raise UserError(f"accelerate: {error}", where=str(settings.path), fix="correct the file") from None
    finally:
        # A signal in the moment between two starts leaves a process that the agent has not noted yet.
        signal_processes(signal.SIGKILL)


def arguments_of(settings: Settings, world: World, words: Sequence[str]) -> list[str]:
    """The command line of `accelerate launch` for these processes."""
    nodes = world.nodes
    arguments = ["--config_file", str(settings.path), "--num_processes", str(world.size)]
    arguments += ["--num_machines", str(nodes.count), "--machine_rank", str(nodes.rank)]
    if nodes.count > 1:
        # The static rendezvous: ranks follow the nodes' numbers, so that rank 0, which writes, is on the first one.
        arguments += ["--main_process_ip", str(nodes.address), "--main_process_port", str(nodes.port)]
        arguments += ["--rdzv_backend", "static"]
    else:
        arguments += ["--main_process_port", "0"]
    return [*arguments, "--max_restarts", "0", "-m", "gemma_tune", *words]


def _stopped(handlers: Handlers, failures: Sequence[Failure], host: str) -> GemmaTuneError:
    """What a signal led to: 75, unless a process had failed before it came, or Ctrl-C was pressed twice."""
    earlier = [failure for failure in failures if failure.when < handlers.when and failure.code != Stopped.exit_code]
    aborted = [failure for failure in failures if failure.code == Aborted.exit_code]
    if earlier or aborted:
        return as_error(first(earlier or aborted), host)
    for failure in failures:
        if failure.code != Stopped.exit_code and failure.problems:
            console.note(f"rank {failure.rank} on {host} did not stop well: {failure.problems[0].what}")
    return Stopped(
        f"stopped by {handlers.asked}", fix="the same command with --resume auto starts or continues the run"
    )


def _quieten() -> None:
    """Keep the agent's account of signals and exit codes out of the output: we give one. LOGLEVEL asks for it."""
    import torch.distributed.run  # noqa: F401 - the agent's modules set the levels of their loggers on import

    if "LOGLEVEL" in os.environ:
        return
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
