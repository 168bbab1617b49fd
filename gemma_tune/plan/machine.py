"""What a machine can do: the facts that decide about types, attention and memory.

`MACHINES` holds machines that can be planned for without owning one; `probe` looks at this one with torch,
`glance` looks at it without torch (for commands that must answer at once).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gemma_tune.errors import AccessError, UserError

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine, as a plan needs to know it.

    Attributes:
        name: how it is called: a key of `MACHINES`, or what the driver calls the device.
        device: `cpu` or `cuda`.
        gpus: devices that this process can see; 0 on a CPU.
        memory_bytes: memory of ONE device (a GPU's memory, or what this process may use of the CPU's).
        bf16: bfloat16 matrix products run natively. Elsewhere they are emulated, correct but slow.
        compute_capability: CUDA compute capability, None on a CPU.
        flash_attention: FlashAttention 2 can run: Ampere or newer (its README names Ampere, Ada and Hopper).
        world_size: processes that train together, one a device.
        nodes: such machines that work together; `gpus` are those of one.
    """

    name: str
    device: Literal["cpu", "cuda"]
    gpus: int
    memory_bytes: int
    bf16: bool
    compute_capability: tuple[int, int] | None = None
    flash_attention: bool = False
    world_size: int = 1
    nodes: int = 1

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts for `Plan.machine`."""
        return {
            "name": self.name,
            "device": self.device,
            "gpus": self.gpus,
            "memory_bytes": self.memory_bytes,
            "bf16": self.bf16,
            "compute_capability": list(self.compute_capability) if self.compute_capability else None,
            "flash_attention": self.flash_attention,
            "world_size": self.world_size,
            "nodes": self.nodes,
        }


def _gpu(name: str, mebibytes: int, capability: tuple[int, int], count: int = 1) -> Machine:
    """A CUDA machine. bf16 and FlashAttention 2 both begin with compute capability 8.0 (Ampere)."""
    ampere = capability >= (8, 0)
    return Machine(name, "cuda", count, mebibytes * MIB, ampere, capability, ampere, world_size=count)


# Memory is what nvidia-smi reports, which is what a driver hands out; it is below the number on the box where ECC
# takes its share. T4, L4, A100 and H100: list in modal-labs/modal-client pull request 2797; RTX 4090: 24,564 MiB.
# Compute capabilities: developer.nvidia.com/cuda-gpus.
MACHINES: dict[str, Machine] = {
    # A laptop: 16 GiB, and no AVX512-BF16 or AMX, which few laptops have.
    "cpu": Machine("cpu", "cpu", 0, 16 * GIB, bf16=False),
    "t4": _gpu("t4", 15_360, (7, 5)),
    "l4": _gpu("l4", 23_034, (8, 9)),
    "rtx4090": _gpu("rtx4090", 24_564, (8, 9)),
    "a100": _gpu("a100", 40_960, (8, 0)),
    "a100-80gb": _gpu("a100-80gb", 81_920, (8, 0)),
    "h100": _gpu("h100", 81_559, (9, 0)),
    "8xh100": _gpu("8xh100", 81_559, (9, 0), count=8),
}


MOST_GPUS = 100_000
"""Of a named machine, all nodes together."""

_SEVERAL = re.compile(r"(?:([1-9][0-9]*)x)?([1-9][0-9]*)x(.+)")


def named_machine(name: str) -> Machine:
    """A machine of the table, or several of them: `8xh100` has eight GPUs, `2x8xh100` is two such nodes.

    Raises:
        UserError: the table has no such machine, or there would be more than MOST_GPUS.
    """
    if name in MACHINES:
        return MACHINES[name]
    found = _SEVERAL.fullmatch(name)
    one = MACHINES.get(found[3]) if found else None
    if found is None or one is None or one.gpus != 1:
        hint = f"one of: {', '.join(MACHINES)}; several GPUs: 4xl4, several nodes: 2x8xh100"
        small = name.lower()
        again = _SEVERAL.fullmatch(small)
        if small != name and (small in MACHINES or (again and again[3] in MACHINES)):
            hint = f"did you mean '{small}'?"
        raise UserError(f"unknown machine '{name}'", where="--machine", fix=hint)
    # Up to nine digits each: Python refuses to read thousands of them.
    nodes, gpus = (int(text[:9]) for text in (found[1] or "1", found[2]))
    if nodes * gpus > MOST_GPUS:
        raise UserError("more GPUs than any plan is for", where="--machine", fix=f"up to {MOST_GPUS:,} in all")
    return replace(one, name=name, gpus=gpus, world_size=nodes * gpus, nodes=nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What a launcher says: how many processes there are, and how they are to share the work.

    Attributes:
        world_size: processes that train together.
        nodes: machines that they run on.
        fsdp: version of FSDP that it asks for; None where it asks for none.
        replicas, shards: sizes of its parallelism config (HSDP): groups, and processes in one; None where it has none.
        checkpoint: `full` or `sharded`, of an FSDP configuration; None where it does not say.
        offload, reshard_after_forward: of an FSDP configuration; None where it does not say.
        started: whether there is a launcher at all; it can start one process, too.
        other: what it asks for beside that and cannot have here, such as `DeepSpeed`; empty where there is nothing.
    """

    world_size: int = 1
    nodes: int = 1
    fsdp: int | None = None
    replicas: int | None = None
    shards: int | None = None
    checkpoint: Literal["full", "sharded"] | None = None
    offload: bool | None = None
    reshard_after_forward: bool | None = None
    started: bool = True
    other: str = ""

    @property
    def processes_per_node(self) -> int:
        return max(1, self.world_size // self.nodes)


def launch_of(environment: Mapping[str, str]) -> Launch:
    """What torchrun or accelerate launch told this process through its environment; one process without either.

    torchrun sets WORLD_SIZE, LOCAL_WORLD_SIZE and GROUP_WORLD_SIZE; accelerate 1.15 (utils/launch.py) starts through it
    and adds ACCELERATE_USE_FSDP, FSDP_* and, for HSDP, PARALLELISM_CONFIG_*.

    Raises:
        AccessError: a number of processes is none.
    """
    world_size = world_size_of(environment)
    here = _number(environment, "LOCAL_WORLD_SIZE", world_size)
    nodes = _number(environment, "GROUP_WORLD_SIZE", -(-world_size // here))
    sharded = is_true(environment.get("ACCELERATE_USE_FSDP"))
    mesh = is_true(environment.get("ACCELERATE_USE_PARALLELISM_CONFIG"))
    sizes = {
        name: _number(environment, f"PARALLELISM_CONFIG_{name}_SIZE", 1)
        for name in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    }
    kind = environment.get("FSDP_STATE_DICT_TYPE", "").upper()
    other = [f"{name} parallelism" for name in ("TP", "CP", "SP") if mesh and sizes[name] > 1]
    if is_true(environment.get("ACCELERATE_USE_DEEPSPEED")):
        other.append("DeepSpeed")
    if is_true(environment.get("ACCELERATE_USE_MEGATRON_LM")):
        other.append("Megatron-LM")
    return Launch(
        world_size=world_size,
        nodes=nodes,
        fsdp=_number(environment, "FSDP_VERSION", 1) if sharded else None,
        replicas=sizes["DP_REPLICATE"] if mesh else None,
        shards=sizes["DP_SHARD"] if mesh else None,
        checkpoint=STATE_DICTS.get(kind) if sharded else None,
        offload=is_true(environment.get("FSDP_OFFLOAD_PARAMS")) if sharded else None,
        reshard_after_forward=is_true(environment.get("FSDP_RESHARD_AFTER_FORWARD", "true")) if sharded else None,
        started="WORLD_SIZE" in environment,
        other=", ".join(other),
    )


def overruled(environment: Mapping[str, str]) -> list[str]:
    """Variables of a launcher that `launch_of` has read, and that the libraries would follow whatever the plan says.

    accelerate 1.15 takes FSDP, its groups and torch.compile from them wherever a keyword leaves something open.
    """
    beginnings = (
        "FSDP_",
        "PARALLELISM_CONFIG_",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_PARALLELISM",
        "ACCELERATE_DYNAMO_",
    )
    return [name for name in environment if name.startswith(beginnings)]


STATE_DICTS: dict[str, Literal["full", "sharded"]] = {"FULL_STATE_DICT": "full", "SHARDED_STATE_DICT": "sharded"}


def is_true(text: str | None) -> bool:
    """As accelerate's `str_to_bool` reads it."""
    return (text or "").lower() in ("y", "yes", "t", "true", "on", "1")


def is_false(text: str) -> bool:
    """Likewise; what is neither is an error of accelerate."""
    return text.lower() in ("n", "no", "f", "false", "off", "0")


def world_size_of(environment: Mapping[str, str]) -> int:
    """Processes of this launch: `WORLD_SIZE`, as torchrun and accelerate set it; 1 without a launcher.

    Raises:
        AccessError: the variable is set and is not a positive number.
    """
    return _number(environment, "WORLD_SIZE", 1)


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """A positive number that a launcher sets.

    Raises:
        AccessError: the variable is set and is none.
    """
    text = environment.get(name, str(default))
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise AccessError(
            f"the environment variable {name} is {text!r}, which is no number of processes",
            fix="unset it, or start with torchrun or accelerate launch",
        )
    return int(text)


def probe(world_size: int = 1, nodes: int = 1) -> Machine:
    """This machine, asked through torch. Imports torch.

    Args:
        world_size: processes of this launch (`launch_of(os.environ)`).
        nodes: machines that they run on.
    """
    import torch

    if not torch.cuda.is_available():
        return cpu_machine(world_size=world_size, nodes=nodes)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    return Machine(
        name=properties.name,
        device="cuda",
        gpus=torch.cuda.device_count(),
        memory_bytes=properties.total_memory,
        bf16=capability >= (8, 0),
        compute_capability=capability,
        flash_attention=capability >= (8, 0),
        world_size=world_size,
        nodes=nodes,
    )


def glance(environment: Mapping[str, str], world_size: int = 1, nodes: int = 1) -> Machine:
    """This machine without torch: nvidia-smi where there is one, otherwise the CPU's own files.

    Honours `CUDA_VISIBLE_DEVICES` where it lists indices. The run asks `probe`, whose answer counts.
    """
    gpus = visible_gpus(_ask_nvidia_smi(), environment.get("CUDA_VISIBLE_DEVICES"))
    if not gpus:
        return cpu_machine(world_size=world_size, nodes=nodes)
    # The first visible device is the one a single process trains on.
    return replace(gpus[0], gpus=len(gpus), world_size=world_size, nodes=nodes)


def _ask_nvidia_smi() -> str:
    """The driver's list of devices, empty where there is no driver that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    query = [program, "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def visible_gpus(table: str, visible: str | None) -> list[Machine]:
    """GPUs in nvidia-smi's answer that a process may use.

    Args:
        table: lines of `name, memory in MiB, compute capability`.
        visible: value of CUDA_VISIBLE_DEVICES: None for all, "" or "-1" for none, else indices (UUIDs are taken as
            "as many as are named", since their order is not in the table).
    """
    gpus = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.rsplit(",", 2)]
        capability = re.fullmatch(r"(\d+)\.(\d+)", fields[-1])
        if len(fields) == 3 and fields[1].isdigit() and capability:
            gpus.append(_gpu(fields[0], int(fields[1]), (int(capability[1]), int(capability[2]))))
    if visible is None:
        return gpus
    chosen: list[Machine] = []
    for number, entry in enumerate(part.strip() for part in visible.split(",") if part.strip()):
        index = int(entry) if re.fullmatch(r"-?\d+", entry) else number
        if not 0 <= index < len(gpus):  # CUDA ignores everything from the first invalid entry on
            break
        chosen.append(gpus[index])
    return chosen


def cpu_machine(world_size: int = 1, root: Path = Path("/"), nodes: int = 1) -> Machine:
    """This computer's CPU: memory from /proc/meminfo, lowered by any cgroup limit; bf16 from /proc/cpuinfo.

    Args:
        world_size, nodes: processes that train together, and computers that they run on.
        root: where `proc` and `sys` are mounted, for tests.
    """
    information = _read(root / "proc/cpuinfo")
    # A dedicated instruction (AVX512-BF16, AMX, or Arm's BF16) decides whether bf16 is faster than fp32. x86 lists
    # its features under "flags", Arm under "Features".
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", information, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    model = re.search(r"^model name\s*:\s*(.+)$", information, re.MULTILINE)
    name = f"cpu ({model[1].strip()})" if model else "cpu"
    # Processes on one computer share its memory.
    memory = cpu_memory(root) // -(-world_size // nodes)
    return Machine(name, "cpu", 0, memory, bf16=bf16, world_size=world_size, nodes=nodes)


def cpu_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use: total memory or the tightest cgroup limit (version 1 or 2) above it.

    Raises:
        AccessError: neither /proc/meminfo nor the system's own answer tells the size of the memory.
    """
    sizes = _cgroup_limits(root)
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if match:
        sizes.append(int(match[1]) * 1024)
    else:  # macOS has no /proc
        import os

        try:
            sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (ValueError, OSError, AttributeError):
            if not sizes:
                raise AccessError(
                    "this system does not tell how much memory it has", fix="plan for a named machine: --machine cpu"
                ) from None
    return min(sizes)


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of this process's control group and of the groups above it.

    The limit of a group binds all groups below it. Inside a container the group's own path often is not mounted, and
    its limit stands at the root of the mount instead; so each folder from the path up to the root is asked.
    """
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            mount, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = mount / path.lstrip("/")
        for candidate in (folder, *folder.parents):
            text = _read(candidate / file).strip()
            # "max" (version 2) and a number near 2**63 (version 1) mean no limit.
            if text.isdigit() and int(text) < 2**60:
                limits.append(int(text))
            if candidate == mount:
                break
    return limits


def _read(path: Path) -> str:
    """A small system file, empty where it does not exist or may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
