"""How many processes, machines and GPUs a file of accelerate is for, and whether these numbers agree."""

from __future__ import annotations

from collections.abc import Iterator

from gemma_tune.errors import Problem
from gemma_tune.plan.accelerate_files import AccelerateFile
from gemma_tune.plan.machine import Machine, is_true


def count_problems(file: AccelerateFile, named: Machine | None = None) -> Iterator[Problem]:
    """Numbers of processes, machines and GPUs that contradict each other. Options of a launch may overrule them.

    Args:
        file: as `read_accelerate_file` gives it.
        named: the machine that the plan is for, where it was named; its `nodes` must be the file's.

    Raises:
        UserError: a number is none.
    """
    nodes, processes, rank = (file.number(key) for key in ("num_machines", "num_processes", "machine_rank"))
    nodes, rank = nodes or 1, rank or 0
    if named is not None and named.nodes != nodes:
        yield Problem(
            f"is for {nodes} {'machine' if nodes == 1 else 'machines'}, and {named.name} is {named.nodes}",
            file.where("num_machines"),
            f"set num_machines: {named.nodes}, or name as many with --machine, such as 2x8xh100",
        )
    if rank >= nodes:
        yield Problem(
            f"machine_rank {rank} of {nodes} {'machine' if nodes == 1 else 'machines'}: they are counted from 0",
            file.where("machine_rank"),
            f"a number from 0 to {nodes - 1}" if nodes > 1 else "write `machine_rank: 0`",
        )
    if file.kind == "NO":
        return
    if file.values.get("num_processes") == 0:
        yield Problem("0 processes train nothing", file.where("num_processes"), "write how many, or remove the line")
    elif processes is None and is_true(file.text("use_cpu")):
        yield Problem(
            "says not how many processes share the CPU: there are no GPUs to count",
            file.where("use_cpu"),
            "write num_processes",
        )
    if processes is None:
        return
    if processes % nodes:
        yield Problem(
            f"{processes} processes cannot be the same number on each of {nodes} machines",
            file.where("num_processes"),
            f"set num_processes: {-(-processes // nodes) * nodes}",
        )
    elif file.kind == "MULTI_GPU" and processes == 1:
        yield Problem(
            "accelerate launch stops: MULTI_GPU needs two processes at least",
            file.where("num_processes"),
            "write `distributed_type: 'NO'`, or more processes",
        )
    ids = [part for part in file.text("gpu_ids", "all").split(",") if part.strip()]
    if ids != ["all"] and len(ids) < processes // nodes and not is_true(file.text("use_cpu")):
        yield Problem(
            f"gpu_ids names {len(ids)}, for {processes // nodes} processes a machine",
            file.where("gpu_ids"),
            "name as many, or write `gpu_ids: all`",
        )
