"""What a machine can do, read from made-up system files and driver answers."""

from pathlib import Path

import pytest

from gemma_tune.errors import AccessError, UserError
from gemma_tune.plan.machine import (
    GIB,
    MACHINES,
    MIB,
    cpu_machine,
    cpu_memory,
    glance,
    named_machine,
    visible_gpus,
    world_size_of,
)

TWO_GPUS = "Tesla T4, 15360, 7.5\nNVIDIA H100 80GB HBM3, 81559, 9.0\n"


def system(root: Path, **files: str) -> Path:
    """A root folder with system files; `__` in a name stands for a slash."""
    for name, content in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return root


MEMINFO = "MemTotal:       16777216 kB\nMemFree: 1 kB\n"


def test_memory_without_a_limit_is_the_total(tmp_path):
    assert cpu_memory(system(tmp_path, proc__meminfo=MEMINFO)) == 16 * GIB


def test_cgroup_version_2_limits(tmp_path):
    root = system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/jobs/one\n")
    (root / "sys/fs/cgroup/jobs/one").mkdir(parents=True)
    (root / "sys/fs/cgroup/jobs/one/memory.max").write_text("max\n")
    (root / "sys/fs/cgroup/jobs/memory.max").write_text(f"{4 * GIB}\n")
    assert cpu_memory(root) == 4 * GIB, "the limit of a parent group binds"


def test_cgroup_version_1_limits(tmp_path):
    root = system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory:/a/b\n3:cpu,cpuacct:/\n")
    limits = root / "sys/fs/cgroup/memory"
    (limits / "a/b").mkdir(parents=True)
    (limits / "a/b/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (limits / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
    assert cpu_memory(root) == 3 * GIB


def test_a_container_that_mounts_its_own_group_at_the_root(tmp_path):
    root = system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/not/mounted\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory.max").write_text(str(2 * GIB))
    assert cpu_memory(root) == 2 * GIB


@pytest.mark.parametrize(
    ("cpuinfo", "bf16"),
    [
        ("model name : EPYC\nflags : fpu avx512f avx512_bf16\n", True),
        ("model name : Xeon\nflags : fpu amx_bf16 amx_tile\n", True),
        ("Features : fp asimd bf16\n", True),
        ("model name : Core\nflags : fpu avx2 avx512f avx512_vnni\n", False),
        ("", False),
    ],
)
def test_bf16_of_a_cpu_is_an_instruction(tmp_path, cpuinfo, bf16):
    machine = cpu_machine(root=system(tmp_path, proc__meminfo=MEMINFO, proc__cpuinfo=cpuinfo))
    assert (machine.bf16, machine.device, machine.flash_attention) == (bf16, "cpu", False)


def test_processes_share_a_cpus_memory(tmp_path):
    root = system(tmp_path, proc__meminfo=MEMINFO)
    assert cpu_machine(world_size=2, root=root).memory_bytes == 8 * GIB


def test_driver_answer():
    t4, h100 = visible_gpus(TWO_GPUS, None)
    assert (t4.name, t4.memory_bytes, t4.bf16, t4.flash_attention) == ("Tesla T4", 15_360 * MIB, False, False)
    assert (h100.compute_capability, h100.bf16, h100.flash_attention) == ((9, 0), True, True)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["Tesla T4", "NVIDIA H100 80GB HBM3"]),
        ("1", ["NVIDIA H100 80GB HBM3"]),
        ("1,0", ["NVIDIA H100 80GB HBM3", "Tesla T4"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["Tesla T4"]),  # CUDA ignores all from the first invalid one on
        ("GPU-8f2b", ["Tesla T4"]),
    ],
)
def test_visible_devices(visible, names):
    assert [gpu.name for gpu in visible_gpus(TWO_GPUS, visible)] == names


@pytest.mark.parametrize("answer", ["", "No devices were found\n", "NVIDIA-SMI has failed, because, of reasons\n"])
def test_a_driver_without_devices(answer):
    assert visible_gpus(answer, None) == []


def test_glance_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr("gemma_tune.plan.machine._ask_nvidia_smi", lambda: TWO_GPUS)
    seen = glance({}, world_size=2)
    assert (seen.name, seen.gpus, seen.world_size) == ("Tesla T4", 2, 2)
    assert glance({"CUDA_VISIBLE_DEVICES": ""}).device == "cpu"


@pytest.mark.parametrize(("environment", "size"), [({}, 1), ({"WORLD_SIZE": "8"}, 8)])
def test_world_size(environment, size):
    assert world_size_of(environment) == size


@pytest.mark.parametrize("text", ["", "0", "-2", "two", "1.5", "²"])
def test_a_broken_world_size_is_refused(text):
    with pytest.raises(AccessError, match="WORLD_SIZE"):
        world_size_of({"WORLD_SIZE": text})


def test_the_table():
    assert set(MACHINES) >= {"cpu", "t4", "l4", "rtx4090", "a100", "h100", "8xh100"}
    assert all(name == machine.name for name, machine in MACHINES.items())
    assert not MACHINES["t4"].bf16
    assert MACHINES["8xh100"].world_size == 8
    # torch reports 85,520,809,984 bytes for an H100 (modal-labs/modal-client pull request 2797).
    assert MACHINES["h100"].memory_bytes == 85_520_809_984


def test_an_unknown_machine_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="'h900'") as caught:
        named_machine("h900")
    assert "8xh100" in caught.value.problems[0].fix
    for name in ("8xH100", "2x8xH100", "T4"):
        with pytest.raises(UserError) as caught:
            named_machine(name)
        assert caught.value.problems[0].fix == f"did you mean '{name.lower()}'?"


@pytest.mark.parametrize("name", ["99999999999xh100", "99999x99999xh100", f"{'9' * 5000}xh100"])
def test_more_gpus_than_there_are(name):
    with pytest.raises(UserError, match="more GPUs than any plan is for"):
        named_machine(name)
    assert named_machine("12500x8xh100").world_size == 100_000
