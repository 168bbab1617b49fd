"""Signal handling, without a training."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from gemma_tune.errors import Aborted, Stopped
from gemma_tune.train.signals import Signals


def test_before_arming_the_first_signal_leaves_at_once() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), Signals():
        os.kill(os.getpid(), signal.SIGTERM)


def test_armed_the_first_one_only_sets_the_flag() -> None:
    with Signals() as signals:
        signals.arm()
        assert signals.requested is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == "SIGUSR1", "the first one counts"


def test_a_second_ctrl_c_aborts() -> None:
    with pytest.raises(Aborted), Signals() as signals:
        signals.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_disarmed_again_it_leaves_at_once() -> None:
    with pytest.raises(Stopped), Signals() as signals:
        signals.arm()
        signals.disarm()
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_nobody_saw_is_raised_when_disarmed() -> None:
    with pytest.raises(Stopped, match="SIGTERM") as error, Signals() as signals:
        signals.arm()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.disarm()
    assert "--resume auto" in error.value.problems[0].fix


def test_handlers_come_back_and_ignored_signals_stay_ignored() -> None:
    own = signal.getsignal(signal.SIGTERM)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested is None
            assert signal.getsignal(signal.SIGTERM) != own
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_the_handlers_stay() -> None:
    found: list[object] = []

    def work() -> None:
        with Signals():
            found.append(signal.getsignal(signal.SIGTERM))

    own = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [own]
