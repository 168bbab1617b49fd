"""A process outlives no launcher of ours, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from gemma_tune.errors import Stopped
from gemma_tune.launch.parent import LAUNCHER, follow_launcher

CHILD = """
import os, signal, sys, time
from gemma_tune.launch.parent import follow_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
follow_launcher(os.environ)
print(os.getpid(), flush=True)
time.sleep(30)
"""
PARENT = f"""
import os, subprocess, sys, time
environment = {{**os.environ, {LAUNCHER!r}: str(os.getpid())}}
subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=environment, start_new_session=True)
time.sleep(30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_launcher_takes_its_processes_along() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        parent.kill()
        assert parent.stdout.read() == "saved\n"  # ends with the child, which holds the pipe
        parent.wait()
    finally:
        if child.is_running():
            child.kill()


def test_a_launcher_that_was_killed_earlier_is_noticed() -> None:
    code = f"from gemma_tune.launch.parent import *; follow_launcher({{{LAUNCHER!r}: '999999999'}})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1 and Stopped.__name__ in ended.stderr and "is gone" in ended.stderr


def test_other_parents_are_left_alone() -> None:
    follow_launcher({})
    follow_launcher({LAUNCHER: str(os.getpid())})  # a launcher that trains itself, in one process
