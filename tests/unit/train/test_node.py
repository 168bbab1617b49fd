"""One process works, the others wait: for what it made, for its failure, or for too long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from gemma_tune.errors import AccessError, LostProcess, Stopped, UserError
from gemma_tune.train import node as module
from gemma_tune.train.node import Node, node_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)


@dataclass
class Crew:
    """Two nodes of two processes: ranks 0 and 1, 2 and 3."""

    minutes: float = 1.0
    store: Any = field(default_factory=dist.HashStore)

    def turn(self) -> list[Node]:
        return [
            Node(self.store, rank=rank, leads=rank % 2 == 0, name=str(rank // 2), minutes=self.minutes)
            for rank in range(4)
        ]


def test_each_node_gets_what_its_own_first_process_made() -> None:
    crew = Crew()
    for number in range(2):  # the second run of the same processes does not meet the first one's
        nodes = crew.turn()
        assert not nodes[1]._has("node/0/data")
        for leader in (nodes[0], nodes[2]):
            with leader.leading():
                leader.does("reads")
                leader.agree_on("equal")
                leader.hand_over("data", {"folder": f"{number} {leader.name}"})
        assert [nodes[rank].take("data") for rank in (1, 3)] == [{"folder": f"{number} 0"}, {"folder": f"{number} 1"}]


def test_a_failure_is_said_by_whom_it_happened_to_and_the_others_leave_quietly() -> None:
    nodes = Crew().turn()
    with pytest.raises(UserError, match="row 7"), nodes[0].leading():
        raise UserError("row 7 is bad")
    with pytest.raises(SystemExit) as left:
        nodes[1].take("data")
    assert left.value.code == 2
    with pytest.raises(SystemExit), nodes[2].leading():
        nodes[2].agree_on("own")
    with pytest.raises(SystemExit):
        nodes[3].take("data")


def test_data_of_another_node_that_differ_are_refused() -> None:
    nodes = Crew().turn()
    nodes[0].agree_on("a" * 64)
    nodes[1].agree_on("whatever: its node's first process compares")
    with pytest.raises(UserError, match=r"process 2 on .* is not that of process 0 \(fingerprints bbb"):
        nodes[2].agree_on("b" * 64)


def test_who_waits_too_long_says_for_whom_and_what_and_only_one_says_it() -> None:
    nodes = Crew(minutes=0.0).turn()
    with pytest.raises(
        AccessError, match="process 3 has waited 0 minutes for the first process of its node, which has"
    ):
        nodes[3].take("data")
    nodes = Crew(minutes=0.0).turn()
    nodes[0].does("reads and tokenises the data")
    with pytest.raises(AccessError) as told:
        nodes[2].agree_on("own")
    (problem,) = told.value.problems
    assert "process 2 has waited 0 minutes for process 0 on " in problem.what
    assert problem.what.endswith("which still reads and tokenises the data")
    assert problem.where == "distributed.timeout" and "gemma-tune data prepare RECIPE" in problem.fix
    with pytest.raises(SystemExit) as left:
        nodes[1].take("data")
    assert left.value.code == 3
    # The launcher then ends the one that was waited for: it has nothing to add.
    with pytest.raises(SystemExit) as left, nodes[0].leading():
        raise Stopped("stopped by SIGTERM")
    assert left.value.code == 75


@pytest.mark.parametrize("failed", [True, False])
def test_a_signal_is_heard_while_waiting(monkeypatch: pytest.MonkeyPatch, failed: bool) -> None:
    """Of a launcher that ends all because the first process failed, nothing is said."""
    nodes = Crew().turn()

    def stop(seconds: float) -> None:
        if failed:
            nodes[0]._set("node/0/failed", {"code": 2})
        raise Stopped("stopped by SIGTERM")

    monkeypatch.setattr(time, "sleep", stop)
    with pytest.raises(SystemExit if failed else Stopped):
        nodes[1].take("data")


def test_a_lost_store_is_no_bug_of_ours() -> None:
    class Lost:
        def add(self, key: str, amount: int) -> int:
            return 1

        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Failed to recv, got 0 bytes")

    with pytest.raises(LostProcess, match="process 1 has lost process 0"):
        Node(Lost(), rank=1, leads=False, name="0", minutes=1).take("data")


@pytest.mark.parametrize(
    ("environment", "name", "leads"),
    [
        ({"LOCAL_RANK": "1", "GROUP_RANK": "2"}, "2", False),
        ({"LOCAL_RANK": "0", "SLURM_NODEID": "4"}, "4", True),
        ({"LOCAL_RANK": "1"}, "from 4", False),
        ({}, "from 5", True),
    ],
)
def test_a_node_is_what_the_launcher_calls_one(
    environment: dict[str, str], name: str, leads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("LOCAL_RANK", "GROUP_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)

    def meet(url: str, **_: Any) -> Iterator[tuple[Any, int, int]]:
        yield dist.HashStore(), 5, 8

    monkeypatch.setattr(dist, "rendezvous", meet)
    values = {"distributed": {"timeout": 30}}
    plan: Any = SimpleNamespace(machine={"world_size": 8}, values=lambda section: values)
    found = node_of(plan)
    assert found is not None and (found.name, found.leads, found.minutes) == (name, leads, 30)
    plan.machine = {"world_size": 1}
    assert node_of(plan) is None
