"""What a process is told when another one of its run is gone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistError

from gemma_tune.errors import LostProcess
from gemma_tune.train.signals import Signals

_GONE = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|remote process (exited|has terminated)|Socket (closed|Timeout)"
    r"|Timed out waiting|ncclRemoteError|ncclSystemError",
    re.IGNORECASE,
)
"""gloo's, the store's and NCCL's words (torch 2.13: gloo/transport/tcp/pair.cc, ProcessGroupNCCL.cpp)."""


@contextmanager
def missing(signals: Signals) -> Iterator[None]:
    """Say which failures are not this process's own, so that the message of the one that failed comes first.

    Raises:
        LostProcess: a collective operation failed since another process is not there any more.
        SystemExit: the same, and the launcher is ending this process for it: nothing is left to say.
    """
    try:
        yield
    except (RuntimeError, DistError) as exc:
        alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
        if alone or (not isinstance(exc, DistError) and not _GONE.search(str(exc))):
            raise
        if signals.requested:
            raise SystemExit(LostProcess.exit_code) from exc
        raise LostProcess(
            f"another process of this run is gone ({(str(exc).splitlines() or ['no reason'])[0][:160]})",
            where="distributed",
            fix="see what it or its launcher said; --resume auto goes on from the last checkpoint",
        ) from exc
