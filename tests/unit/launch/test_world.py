"""How many processes there are to be, and what is refused when others came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.launch.nodes import Nodes
from gemma_tune.launch.settings import Settings, settings_of
from gemma_tune.launch.world import ASKED, Options, World, check_option, check_world, is_worker, nodes_of, world_of
from gemma_tune.plan.accelerate_files import read_accelerate_file

FILE = Path("f.yaml")
TWO = Nodes(2, 1, "a", 29_500, None, "SLURM_STEP_NUM_NODES")


def settings(**changes: Any) -> Settings:
    return Settings(**{"path": FILE, "kind": "MULTI_GPU"} | changes)


def options(**changes: Any) -> Options:
    return Options(**changes)


def test_a_file_is_read_as_accelerate_means_it(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: NO\nnum_processes: 1\nnum_machines: 2\n"
        "machine_rank: 1\nmain_process_ip: host\nmain_process_port: 4000\nuse_cpu: true\ngpu_ids: 0,1\n"
    )
    assert settings_of(read_accelerate_file(path)) == Settings(path, "NO", 1, 2, 1, "host", 4000, True, "0,1")
    path.write_text("distributed_type: FSDP\nnum_processes: -1\ngpu_ids: all\n")
    assert settings_of(read_accelerate_file(path)) == Settings(path, "FSDP")


@pytest.mark.parametrize(("written", "ids"), [("'0'", "0"), ("'1, 3'", "1,3"), ("all", None), ("", None)])
def test_gpus_are_named_in_one_text(tmp_path: Path, written: str, ids: str | None) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(f"distributed_type: MULTI_GPU\ngpu_ids: {written}\n")
    assert settings_of(read_accelerate_file(path)).gpu_ids == ids


@pytest.mark.parametrize("written", ["[0, 1]", "'0,,1'", "'1,1'", "true"])
def test_gpus_that_are_named_otherwise_are_refused(tmp_path: Path, written: str) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(f"distributed_type: MULTI_GPU\ngpu_ids: {written}\n")
    with pytest.raises(UserError, match="gpu_ids"):
        settings_of(read_accelerate_file(path))


SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "a\nb"}


@pytest.mark.parametrize(
    ("file", "given", "environment", "expected"),
    [
        (settings(), options(), {}, (1, 0, None, None)),
        (settings(machines=2, machine_rank=1, address="h", port=7), options(), {}, (2, 1, "h", 7)),
        (settings(machines=4, machine_rank=3, address="h"), options(), SKY, (2, 1, "a", 29_500)),
        (settings(), options(main_process_ip="x", main_process_port=9), SKY, (2, 1, "x", 9)),
        (settings(), options(machine_rank=0), SKY, (2, 0, "a", 29_500)),
        (settings(), options(num_machines=1), SKY, (1, 0, None, None)),
        (settings(), options(num_machines=3, machine_rank=2, main_process_ip="y"), SKY, (3, 2, "y", 29_500)),
    ],
)
def test_options_win_over_the_scheduler_and_it_over_the_file(
    file: Settings, given: Options, environment: dict[str, str], expected: tuple[object, ...]
) -> None:
    nodes = nodes_of(file, given, environment)
    assert (nodes.count, nodes.rank, nodes.address, nodes.port) == expected


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (options(num_machines=2, main_process_ip="h"), "is not told which it is"),
        (options(num_machines=2, machine_rank=1), "nobody says where the first one is"),
        (options(num_machines=2, machine_rank=2, main_process_ip="h"), "node 2 of 2"),
        (options(machine_rank=1), "node 1 of 1"),
    ],
)
def test_options_that_lack_a_fact_are_refused(given: Options, what: str) -> None:
    with pytest.raises(UserError, match=what):
        nodes_of(settings(), given, {})


@pytest.mark.parametrize(
    ("file", "given", "nodes", "gpus", "size", "a_node"),
    [
        (settings(), options(), Nodes(), 8, 8, 8),  # all GPUs
        (settings(), options(), TWO, 8, 16, 8),
        (settings(), options(num_processes=4), TWO, 8, 4, 2),
        (settings(processes=4), options(), Nodes(), 8, 4, 4),
        (settings(processes=4), options(), TWO, 8, 16, 8),  # the file's 4 were for one machine
        (settings(processes=4, machines=2), options(), TWO, 8, 4, 2),
        (settings(), options(), Nodes(2, 0, "a", 1, 3), 8, 6, 3),  # the scheduler's number for a node
        (settings(kind="NO"), options(), Nodes(), 8, 1, 1),
        (settings(kind="NO"), options(), Nodes(), 0, 1, 1),
        (settings(use_cpu=True), options(num_processes=2), Nodes(), 0, 2, 2),
        (settings(gpu_ids="0,2,3"), options(), TWO, 8, 6, 3),
    ],
)
def test_how_many_processes(file: Settings, given: Options, nodes: Nodes, gpus: int, size: int, a_node: int) -> None:
    world = world_of(file, given, nodes, gpus)
    assert world == World(nodes, a_node) and world.size == size


@pytest.mark.parametrize(
    ("file", "given", "nodes", "gpus", "error", "what"),
    [
        (settings(), options(), Nodes(), 0, AccessError, "no GPU that torch can use"),
        (settings(use_cpu=True), options(), Nodes(), 8, UserError, "share the CPU"),
        (settings(), options(num_processes=3), TWO, 8, UserError, "shared evenly by 2 nodes"),
        (
            settings(),
            options(num_processes=4),
            Nodes(),
            2,
            AccessError,
            "4 processes on this machine, which has 2 GPUs",
        ),
        (settings(gpu_ids="0,2"), options(num_processes=4), Nodes(), 8, AccessError, "4 processes on this machine"),
        (settings(gpu_ids="0,2"), options(), Nodes(), 1, AccessError, "2 GPUs are named, and this machine has 1"),
        (settings(kind="NO"), options(num_processes=2), Nodes(), 8, UserError, "its distributed_type is NO"),
        (settings(kind="NO"), options(), TWO, 8, UserError, "its distributed_type is NO"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_before_anything_starts(
    file: Settings, given: Options, nodes: Nodes, gpus: int, error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what):
        world_of(file, given, nodes, gpus)


WORKER = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        WORKER,
        WORKER | {ASKED: "2"},
        WORKER | {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "2"},  # one task a node, started by our launcher
        {ASKED: "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"ACCELERATE_MIXED_PRECISION": "no"},  # accelerate launch of one process
    ],
)
def test_the_company_that_was_asked_for_is_let_through(environment: dict[str, str]) -> None:
    check_world(environment)


@pytest.mark.parametrize(
    ("environment", "error", "what"),
    [
        (WORKER | {ASKED: "4"}, AccessError, "4 processes were asked for, and 2 came"),
        ({ASKED: "two"}, UserError, "GEMMA_TUNE_WORLD_SIZE=two is no whole number"),
        (WORKER | {"WORLD_SIZE": "x"}, UserError, "WORLD_SIZE=x is no whole number"),
        (WORKER | {"RANK": "first"}, UserError, "RANK=first is no whole number"),
        ({ASKED: "2"}, AccessError, "2 processes were asked for, and 1 came"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, UserError, "started one"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, UserError, "8 processes were started that do not know each other"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, UserError, "2 processes were started that do not know each other"),
    ],
)
def test_another_company_is_refused(environment: dict[str, str], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        check_world(environment)


def test_a_worker_has_a_rank_here_and_among_all() -> None:
    assert is_worker(WORKER)
    assert not is_worker({"RANK": "1", "WORLD_SIZE": "2"})  # Kubeflow's first operator numbers pods like this
    assert not is_worker({})


def test_in_a_worker_the_option_is_only_checked() -> None:
    fsdp = settings(kind="FSDP")
    check_option(settings(), options(num_processes=2), WORKER)
    check_option(fsdp, options(), WORKER | {"ACCELERATE_USE_FSDP": "true"})
    with pytest.raises(UserError, match="4 processes are asked for, and 2 were started"):
        check_option(settings(), options(num_processes=4), WORKER)
    with pytest.raises(UserError, match="were started without it"):
        check_option(fsdp, options(), WORKER)


def test_options_are_named_as_they_are_written() -> None:
    assert options(num_processes=2, main_process_ip="h").given() == ["--num-processes", "--main-process-ip"]
