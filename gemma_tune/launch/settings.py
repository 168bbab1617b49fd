"""What an accelerate file says about the processes: how many, on which machines, on what."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.errors import UserError
from gemma_tune.plan.accelerate_files import AccelerateFile
from gemma_tune.plan.machine import is_true

_ID = re.compile(r"[\w/.:-]+")  # a number, or the UUID of a GPU or of a part of one


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of an accelerate file that says how many processes there are to be. accelerate reads the rest itself.

    Attributes:
        path: the file.
        kind: its distributed_type.
        processes: num_processes: of all machines together; None where the file leaves it out.
        machines: num_machines.
        machine_rank: machine_rank.
        address: main_process_ip.
        port: main_process_port.
        use_cpu: whether it is for CPUs.
        gpu_ids: which GPUs of a machine it is for; None for all.
    """

    path: Path
    kind: str
    processes: int | None = None
    machines: int = 1
    machine_rank: int = 0
    address: str | None = None
    port: int | None = None
    use_cpu: bool = False
    gpu_ids: str | None = None


def settings_of(file: AccelerateFile) -> Settings:
    """The settings in `file`.

    Raises:
        UserError: a number is none, or gpu_ids does not name GPUs in one text.
    """
    return Settings(
        file.path,
        file.kind,
        file.number("num_processes"),
        file.number("num_machines") or 1,
        file.number("machine_rank") or 0,
        file.text("main_process_ip") or None,
        file.number("main_process_port"),
        is_true(file.text("use_cpu")),
        _gpu_ids(file),
    )


def _gpu_ids(file: AccelerateFile) -> str | None:
    """As CUDA_VISIBLE_DEVICES takes them; None for all."""
    value = file.values.get("gpu_ids")
    ids = [one.strip() for one in str(value).split(",")]
    if value is None or ids == ["all"]:
        return None
    plain = isinstance(value, str | int) and not isinstance(value, bool) and all(map(_ID.fullmatch, ids))
    if not plain or len(set(ids)) < len(ids):
        raise UserError(
            f"gpu_ids names no GPUs: {value!r}", where=file.where("gpu_ids"), fix='write e.g. gpu_ids: "0,1", or all'
        )
    return ",".join(ids)
