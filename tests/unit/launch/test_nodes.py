"""What schedulers say about the machines of a job, in their own words."""

from __future__ import annotations

import pytest

from gemma_tune.errors import UserError
from gemma_tune.launch.nodes import Nodes, find_nodes, first_host

# What a task of `srun --nodes=2 --ntasks-per-node=1` finds on the second node.
SLURM = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[003,007]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
}
SKYPILOT = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}
KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "auto",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "tune-node-0-0.tune",
    "PET_MASTER_PORT": "29400",
    "JOB_COMPLETION_INDEX": "1",
}
PLAIN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "4000"}
INDEXED = {"NNODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "pod-0.service"}


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({}, Nodes()),
        (SLURM, Nodes(2, 1, "gpu003", 24_567, None, "SLURM_STEP_NUM_NODES")),
        (SLURM | {"MASTER_ADDR": "ib3", "MASTER_PORT": "4000"}, Nodes(2, 1, "ib3", 4000, None, "SLURM_STEP_NUM_NODES")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}, None),
        (SKYPILOT, Nodes(2, 1, "10.0.0.5", 29_500, 8, "SKYPILOT_NUM_NODES")),
        (KUBEFLOW, Nodes(2, 1, "tune-node-0-0.tune", 29_400, None, "PET_NNODES")),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "4"}, Nodes(2, 1, "tune-node-0-0.tune", 29_400, 4, "PET_NNODES")),
        (PLAIN, Nodes(2, 1, "10.0.0.5", 4000, None, "NNODES")),
        (INDEXED, Nodes(2, 1, "pod-0.service", 29_500, None, "NNODES")),
        (PLAIN | SLURM, Nodes(2, 1, "10.0.0.5", 4000, None, "NNODES")),
        (KUBEFLOW | {"PET_NNODES": "1", "PET_NODE_RANK": "0"}, Nodes(1, 0, None, None, None, "PET_NNODES")),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "5"}, Nodes()),  # salloc or sbatch, one node, no step
    ],
)
def test_each_scheduler_is_understood(environment: dict[str, str], nodes: Nodes | None) -> None:
    found = find_nodes(environment)
    if nodes is None:
        assert (found.count, found.rank, found.address) == (1, 0, None)
    else:
        assert found == nodes


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        (SLURM | {"SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes"),
        ({"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "5"}, "only this one was told to work"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "nobody says where the first one is"),
        (SKYPILOT | {"SKYPILOT_NODE_RANK": "2"}, "node 2 of 2 cannot be"),
        (SKYPILOT | {"SKYPILOT_NODE_RANK": "one"}, "SKYPILOT_NODE_RANK=one is no whole number"),
        ({"SKYPILOT_NUM_NODES": "2"}, "SKYPILOT_NODE_RANK is not set"),
        (KUBEFLOW | {"PET_NNODES": "1:4"}, "a number of nodes that changes"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NNODES without NODE_RANK"),
    ],
)
def test_what_cannot_be_is_refused_with_a_fix(environment: dict[str, str], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        find_nodes(environment)
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("listed", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,010],login1", "gpu003"),
        ("gpu[003,007]", "gpu003"),
        ("r[1-2]n[05-06]", "r1n05"),
        ("r[1-2]n[05-06]-ib,r9", "r1n05-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(listed: str, host: str) -> None:
    assert first_host(listed) == host


def test_jobs_that_share_a_node_meet_on_ports_of_their_own() -> None:
    ports = {find_nodes(SLURM | {"SLURM_JOB_ID": str(job)}).port for job in range(500, 600)}
    assert len(ports) == 100 and all(20_000 <= (port or 0) < 30_000 for port in ports)
