"""How many processes train together: what is asked for, and the check in each of them that as many came.

A launcher that starts fewer processes than it was asked for says nothing, and the run is then slow, or several runs
write to one folder. `check_world` is called by every process of a training, whoever started it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_tune.errors import AccessError, UserError
from gemma_tune.launch.nodes import Nodes, checked, find_nodes, whole_number
from gemma_tune.launch.settings import Settings

ASKED = "GEMMA_TUNE_WORLD_SIZE"
"""Environment variable in which our launcher tells its processes how many there are to be."""

_MPI = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says about the processes; None where it says nothing. Names are accelerate's."""

    num_processes: int | None = None
    num_machines: int | None = None
    machine_rank: int | None = None
    main_process_ip: str | None = None
    main_process_port: int | None = None

    def given(self) -> list[str]:
        """The options that were given, as they are written."""
        return ["--" + name.replace("_", "-") for name in self.__slots__ if getattr(self, name) is not None]


@dataclass(frozen=True, slots=True)
class World:
    """The processes of one run: `a_node` on each of `nodes.count` machines."""

    nodes: Nodes
    a_node: int

    @property
    def size(self) -> int:
        return self.nodes.count * self.a_node


def is_worker(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several that torchrun, accelerate or Ray started together."""
    return "RANK" in environment and "LOCAL_RANK" in environment


def nodes_of(settings: Settings, options: Options, environment: Mapping[str, str]) -> Nodes:
    """The machines of a run: options come first, then the scheduler's variables, then the accelerate file.

    Raises:
        UserError: facts are missing or contradict each other.
    """
    if options.num_machines == 1:
        return Nodes(source="--num-machines")
    found = Nodes() if options.num_machines is not None else find_nodes(environment)
    if options.num_machines is None and found == Nodes() and settings.machines > 1:
        found = Nodes(
            settings.machines, settings.machine_rank, settings.address, settings.port, source=str(settings.path)
        )
    changes = {
        "count": options.num_machines,
        "rank": options.machine_rank,
        "address": options.main_process_ip,
        "port": options.main_process_port,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    if not given:
        return found
    if options.num_machines is not None:
        given["source"] = "--num-machines"
        if options.machine_rank is None:
            raise UserError(
                f"{options.num_machines} machines, and this one is not told which it is",
                where="command line",
                fix="--machine-rank 0 on the first, 1 on the second and so on",
            )
    return checked(replace(found, **given))  # type: ignore[arg-type]


def world_of(settings: Settings, options: Options, nodes: Nodes, gpus: int) -> World:
    """How many processes to start on each machine: as asked, else as many as there are GPUs.

    Args:
        settings: the accelerate file.
        options: the command line.
        nodes: the machines.
        gpus: of this machine.

    Raises:
        UserError: the number does not fit the machines or the file, or nothing says it.
        AccessError: there are not as many GPUs here.
    """
    if settings.gpu_ids and not settings.use_cpu:
        named = settings.gpu_ids.count(",") + 1
        if named > gpus:
            raise AccessError(
                f"{named} GPUs are named, and this machine has {gpus} that torch can use",
                where=f"{settings.path}: gpu_ids",
                fix="correct gpu_ids, or CUDA_VISIBLE_DEVICES",
            )
        gpus = named
    total, where = options.num_processes, "--num-processes"
    if total is None and nodes.processes is not None and not settings.use_cpu:
        total, where = nodes.processes * nodes.count, nodes.source
    # The file counts all machines together, so its number is one of a job only if it means the same machines.
    elif total is None and settings.processes is not None and settings.machines == nodes.count:
        total, where = settings.processes, f"{settings.path}: num_processes"
    if total is None and settings.kind == "NO":
        total = nodes.count
    if total is None and settings.use_cpu:
        raise UserError(
            "nothing says how many processes are to share the CPU", where=str(settings.path), fix="--num-processes 2"
        )
    total = gpus * nodes.count if total is None else total
    if total == 0:
        raise AccessError(
            "this machine has no GPU that torch can use",
            where=str(settings.path),
            fix="a file with `use_cpu: true` and --num-processes 2 starts on the CPU; see gemma-tune doctor",
        )
    if total < 1 or total % nodes.count:
        raise UserError(
            f"{total} processes cannot be shared evenly by {nodes.count} nodes", where=where, fix="it counts all nodes"
        )
    if settings.kind == "NO" and total > 1:
        raise UserError(
            f"{total} processes, and this file is for one alone: its distributed_type is NO",
            where=str(settings.path),
            fix="take a file whose distributed_type is MULTI_GPU or FSDP",
        )
    world = World(nodes, total // nodes.count)
    if not settings.use_cpu and settings.kind != "NO" and world.a_node > gpus:
        raise AccessError(
            f"{world.a_node} processes on this machine, which has {gpus} GPU{'s' * (gpus != 1)}",
            where=where,
            fix=f"--num-processes {max(gpus, 1) * nodes.count}",
        )
    return world


def check_world(environment: Mapping[str, str]) -> None:
    """Refuse to train in another company than was asked for. Every process of a training calls this first.

    Raises:
        AccessError: fewer or more processes came than our launcher asked for.
        UserError: several processes were started that do not know each other, or a number in the environment is none.
    """
    size = 1
    if is_worker(environment):
        for name in ("RANK", "LOCAL_RANK"):
            whole_number(environment, name)
        size = whole_number(environment, "WORLD_SIZE", default=1)
    asked = whole_number(environment, ASKED, default=size)
    if size != asked:
        raise AccessError(
            f"{asked} processes were asked for, and {size} came",
            where="WORLD_SIZE",
            fix="start the same command again on all nodes; if it repeats, report it: this is a bug",
        )
    if is_worker(environment):
        return
    # accelerate's launcher of one process sets no RANK; MASTER_ADDR only where it was asked for more than one.
    if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment and ASKED not in environment:
        raise UserError(
            "accelerate was asked for several processes and started one",
            where="accelerate launch",
            fix="in its file write `distributed_type: MULTI_GPU`, on a CPU with `use_cpu: true`; MULTI_CPU starts one",
        )
    for name in ("SLURM_STEP_NUM_TASKS", *_MPI):
        tasks = environment.get(name, "")
        if tasks.isdecimal() and int(tasks) > 1 and ASKED not in environment:
            raise UserError(
                f"{tasks} processes were started that do not know each other: each would be a run of its own",
                where=name,
                fix="start one on each node, with --accelerate ddp: it starts a process for each GPU",
            )


def check_option(settings: Settings, options: Options, environment: Mapping[str, str]) -> None:
    """What `--accelerate` means where somebody else has started the processes already: only a check.

    Raises:
        UserError: the file or the numbers say something else than what is there.
    """
    size = whole_number(environment, "WORLD_SIZE", default=1)
    if options.num_processes is not None and options.num_processes != size:
        raise UserError(
            f"{options.num_processes} processes are asked for, and {size} were started",
            where="--num-processes",
            fix="leave it to whoever starts the processes, or let gemma-tune start them",
        )
    if settings.kind == "FSDP" and environment.get("ACCELERATE_USE_FSDP") != "true":
        raise UserError(
            "this file asks for FSDP, and the processes were started without it",
            where=str(settings.path),
            fix=f"accelerate launch --config_file {settings.path} -m gemma_tune ..., "
            "or leave --accelerate out and set distributed.strategy: fsdp2",
        )
