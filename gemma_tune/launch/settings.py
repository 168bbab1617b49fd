"""What an accelerate file says about the processes: how many, on which machines, on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemma_tune.plan.accelerate_files import AccelerateFile
from gemma_tune.plan.machine import is_true


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
        UserError: a number is none.
    """
    gpu_ids = file.text("gpu_ids", "all")
    return Settings(
        file.path,
        file.kind,
        file.number("num_processes"),
        file.number("num_machines") or 1,
        file.number("machine_rank") or 0,
        file.text("main_process_ip") or None,
        file.number("main_process_port"),
        is_true(file.text("use_cpu")),
        None if gpu_ids == "all" else gpu_ids,
    )
