"""Stop politely: a signal sets a flag, the training saves at the next safe point, the command exits with 75.

A scheduler that sends SIGTERM requeues a job that exits with 75 (EX_TEMPFAIL), and would take exit 0 for the end.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from gemma_tune.errors import Aborted, Stopped

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")


class Signals:
    """Context manager that owns the handlers of SIGINT, SIGTERM, SIGUSR1 and SIGHUP.

    Before `arm()` there is nothing to save: the first signal raises `Stopped` at once. After it, the first signal only
    sets `requested`; a second Ctrl-C raises `Aborted`. A signal that the parent ignores (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._armed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Signals:
        # Python allows handlers in the main thread only; elsewhere (a notebook's worker) the host's own stay.
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def arm(self) -> None:
        """From here on there is something to save."""
        self._armed = True

    def disarm(self) -> None:
        """The last checkpoint is written: a signal has nothing to wait for any more, nor has one that came before.

        Raises:
            Stopped: a signal came.
        """
        self._armed = False
        if self.requested:
            raise self._stopped(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and number == signal.SIGINT:
            raise Aborted("stopped by a second Ctrl-C", fix="--resume auto continues from the last checkpoint")
        self.requested = self.requested or name
        if not self._armed:
            raise self._stopped(name)

    def _stopped(self, name: str) -> Stopped:
        # Without --resume the command would be refused where the run folder exists already; with it both cases work.
        return Stopped(f"stopped by {name}", fix="the same command with --resume auto starts or continues the run")
