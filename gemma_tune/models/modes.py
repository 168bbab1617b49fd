"""Modes of written files: safetensors leaves 0600, so that a group on a cluster could not read the result."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

WITHOUT_MODES = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""How mounted storage says that it has no modes: gcsfuse#2645. Nothing is lost by that."""


def follow_umask(files: Iterable[Path]) -> None:
    """Give each file the mode that the umask allows, where the file system has modes."""
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        try:
            file.chmod(0o666 & ~mask)
        except OSError as error:
            if error.errno not in WITHOUT_MODES:
                raise
