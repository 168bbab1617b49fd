"""Which machines train together, as the scheduler says it in environment variables. Pure.

Each scheduler has its own names for four facts: how many nodes, which one is this, where the first is, and on which
port they meet. Sources: SLURM's srun(1), "output environment variables"; SkyPilot's guide to distributed jobs; torchrun
(`PET_` and the name of an option, torch/distributed/argparse_util.py), which is what Kubeflow Trainer sets
(pkg/runtime/framework/plugins/torch/torch.go); Kubernetes' Job API for JOB_COMPLETION_INDEX.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma_tune.errors import UserError

PORT = 29500
"""Where nodes meet if nobody says otherwise: torchrun's own default."""

_SLURM_PORTS = range(20_000, 30_000)
"""One of these by job number, so that two jobs on a node do not meet: above the services, below the ephemeral ports."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The machines of one job, seen from one of them.

    Attributes:
        count: machines.
        rank: of this one, from 0.
        address: host name or address of the first; None where there is only one machine.
        port: where they meet; None where there is only one.
        processes: processes a node, where the scheduler says so.
        source: who said it.
    """

    count: int = 1
    rank: int = 0
    address: str | None = None
    port: int | None = None
    processes: int | None = None
    source: str = "this machine"


def find_nodes(environment: Mapping[str, str]) -> Nodes:
    """The machines that `environment` describes; one, if it describes none.

    torchrun's own variables come first, then SkyPilot's, then the plain ones that people set by hand, then SLURM's.
    MASTER_ADDR and MASTER_PORT replace what SLURM's node list and job number would give.

    Raises:
        UserError: a value is no number, facts are missing, or several tasks of SLURM share a node.
    """
    for find in (_torchrun, _skypilot, _plain, _slurm):
        found = find(environment)
        if found is not None:
            return checked(found)
    return Nodes()


def checked(nodes: Nodes) -> Nodes:
    """`nodes` if they can meet.

    Raises:
        UserError: the rank is outside of the count, or nobody says where the first node is.
    """
    if nodes.count < 1 or not 0 <= nodes.rank < nodes.count:
        raise UserError(
            f"node {nodes.rank} of {nodes.count} cannot be", where=nodes.source, fix="nodes are counted from 0"
        )
    if nodes.count == 1:
        return replace(nodes, address=None, port=None)
    if not nodes.address:
        raise UserError(
            f"{nodes.count} nodes, and nobody says where the first one is",
            where=nodes.source,
            fix="--main-process-ip HOST, or set MASTER_ADDR",
        )
    return replace(nodes, port=nodes.port or PORT)


def _torchrun(environment: Mapping[str, str]) -> Nodes | None:
    if "PET_NNODES" not in environment:
        return None
    if ":" in environment["PET_NNODES"]:
        raise UserError(
            f"PET_NNODES={environment['PET_NNODES']} asks for a number of nodes that changes",
            where="environment",
            fix="one number: a run that lost a node is started again and goes on with --resume auto",
        )
    a_node = environment.get("PET_NPROC_PER_NODE", "auto")
    return Nodes(
        whole_number(environment, "PET_NNODES"),
        whole_number(
            environment, "PET_NODE_RANK", default=whole_number(environment, "JOB_COMPLETION_INDEX", default=0)
        ),
        environment.get("PET_MASTER_ADDR"),
        whole_number(environment, "PET_MASTER_PORT", default=PORT),
        int(a_node) if a_node.isdecimal() else None,  # else auto, gpu: what is here
        "PET_NNODES",
    )


def _skypilot(environment: Mapping[str, str]) -> Nodes | None:
    if "SKYPILOT_NUM_NODES" not in environment:
        return None
    addresses = environment.get("SKYPILOT_NODE_IPS", "").split()
    return Nodes(
        whole_number(environment, "SKYPILOT_NUM_NODES"),
        whole_number(environment, "SKYPILOT_NODE_RANK"),
        environment.get("MASTER_ADDR") or (addresses[0] if addresses else None),
        whole_number(environment, "MASTER_PORT", default=PORT),
        whole_number(environment, "SKYPILOT_NUM_GPUS_PER_NODE", default=0) or None,
        "SKYPILOT_NUM_NODES",
    )


def _plain(environment: Mapping[str, str]) -> Nodes | None:
    """NNODES with NODE_RANK, or the index that Kubernetes gives a pod of an indexed job."""
    if "NNODES" not in environment:
        return None
    rank = next((name for name in ("NODE_RANK", "JOB_COMPLETION_INDEX") if name in environment), None)
    count = whole_number(environment, "NNODES")
    if rank is None and count > 1:
        raise UserError("NNODES without NODE_RANK", where="environment", fix="set NODE_RANK: 0 on the first node")
    return Nodes(
        count,
        whole_number(environment, rank) if rank else 0,
        environment.get("MASTER_ADDR"),
        whole_number(environment, "MASTER_PORT", default=PORT),
        whole_number(environment, "NPROC_PER_NODE", default=0) or None,
        "NNODES",
    )


def _slurm(environment: Mapping[str, str]) -> Nodes | None:
    """The step that srun started. In a job without a step only this node works: the others were never told."""
    if "SLURM_STEP_NUM_NODES" not in environment:
        held = whole_number(environment, "SLURM_JOB_NUM_NODES", default=1)
        if held > 1:
            raise UserError(
                f"SLURM gave this job {held} nodes, and only this one was told to work",
                where="SLURM_JOB_NUM_NODES",
                fix="start it on all of them: srun --ntasks-per-node=1 gemma-tune ..., or here only: --num-machines 1",
            )
        return None
    count = whole_number(environment, "SLURM_STEP_NUM_NODES")
    tasks = whole_number(environment, "SLURM_STEP_NUM_TASKS", default=count)
    if tasks != count:
        raise UserError(
            f"srun started {tasks} tasks on {count} nodes, and each would take all GPUs of its node",
            where="SLURM_STEP_NUM_TASKS",
            fix="srun --ntasks-per-node=1: gemma-tune starts a process for each GPU itself",
        )
    listed = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    job = whole_number(environment, "SLURM_JOB_ID", default=0)
    return Nodes(
        count,
        whole_number(environment, "SLURM_NODEID", default=0),
        environment.get("MASTER_ADDR") or first_host(listed) or None,
        whole_number(environment, "MASTER_PORT", default=_SLURM_PORTS[job % len(_SLURM_PORTS)]),
        None,
        "SLURM_STEP_NUM_NODES",
    )


def first_host(listed: str) -> str:
    """The first host of a SLURM node list: `gpu[003-007,010],login1` -> `gpu003`. Empty for an empty list."""
    name = ""
    depth = 0
    for character in listed:
        if character == "," and not depth:
            break
        depth += (character == "[") - (character == "]")
        name += character
    # Of each pair of brackets the first number stands; its zeros count, and several pairs may follow each other.
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", name)


def whole_number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A number in `environment`; `default` where it is empty or not set.

    Raises:
        UserError: it is none, or is not set and has no default.
    """
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        what = f"{name}={text} is no whole number" if text else f"{name} is not set"
        raise UserError(what, where="environment", fix=f"set {name} to a whole number") from None
