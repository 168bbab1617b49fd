"""What a process does when its launcher is killed: nobody is left then to end it.

SIGKILL, or the want of memory, leaves the launcher no time to end what it has started. The kernel can tell the
processes (prctl(2), PR_SET_PDEATHSIG): they get SIGTERM, on which they save and leave with 75. The signal comes when
the thread ends that started the process; torch's agent (2.13) starts all of them from the thread that it runs in, which
is the launcher's main one.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

from gemma_tune.errors import Stopped

LAUNCHER = "GEMMA_TUNE_LAUNCHER"
"""Environment variable in which our launcher tells its processes its own process id."""

_PR_SET_PDEATHSIG = 1


def follow_launcher(environment: Mapping[str, str]) -> None:
    """Let SIGTERM come to this process when our launcher, its parent, dies. Linux only; nothing for other parents.

    Raises:
        Stopped: it has died already.
    """
    told = environment.get(LAUNCHER, "")
    if sys.platform != "linux" or not told.isdecimal() or int(told) == os.getpid():
        return
    # Where the kernel refuses, everything stays as it was without it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(told):  # it died before the kernel knew
        raise Stopped(
            "the launcher of this process is gone", fix="the same command with --resume auto starts or continues it"
        )
