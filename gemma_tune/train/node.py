"""One process of each node works, the others of the node wait for it and take what it made.

They speak through the key-value store in which the processes meet (`torch.distributed.rendezvous`), not by
collectives: a barrier does not know what it waits for, holds up signals until it ends, and NCCL's ends the process.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from gemma_tune.errors import AccessError, GemmaTuneError, LostProcess, Stopped, UserError
from gemma_tune.plan.types import Plan

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""How long a process that has nothing to say stays when another one failed. Launchers end all processes when the first
one leaves, also the one whose message is still on its way."""

_TOLD = "told"


class Node:
    """This process among those of its machine.

    Args:
        store: of all processes; keys and values are bytes.
        rank: of this process among all.
        leads: whether it is the one that works.
        name: of the node, the same for all its processes and no others.
        minutes: that the others wait.
    """

    def __init__(self, store: Any, *, rank: int, leads: bool, name: str, minutes: float) -> None:
        self.rank = rank
        self.leads = leads
        self.name = name
        self.minutes = minutes
        self._store = store
        # Of a second run in the same processes: what the first one left there is none of its business.
        self._turn = store.add(f"turn of {rank}", 1)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """What the others wait for. Where it fails they are told, and leave without a word: the error is said here."""
        try:
            yield
        except BaseException as exc:
            for place in self._own_places():
                self._set(f"{place}/failed", {"code": exit_code_of(exc)})
            if isinstance(exc, Stopped) and self._has(_TOLD):
                raise SystemExit(exc.exit_code) from None  # ended by the launcher, because another gave up waiting
            raise

    def does(self, what: str) -> None:
        """Say what is being done: `reads and tokenises the data`. It is told to whoever has waited too long."""
        for place in self._own_places():
            self._set(f"{place}/doing", {"rank": self.rank, "host": socket.gethostname(), "what": what})

    def hand_over(self, name: str, made: Mapping[str, Any]) -> None:
        """End the wait of the others for what is called `name`. `made` is what they get: JSON."""
        self._set(f"node/{self.name}/{name}", made)

    def take(self, name: str) -> dict[str, Any]:
        """What the process that leads this node handed over as `name`, once it has.

        Raises:
            AccessError: it took longer than the others wait; one process of all says so.
            SystemExit: it failed, and has said why; or another process says that it waited too long.
        """
        return self._wait(f"node/{self.name}", name)

    def agree_on(self, fingerprint: str) -> None:
        """Compare the data with that of the first process of all, which may have read files of another disk.

        Raises:
            UserError: they differ.
            AccessError, SystemExit: as `take`.
        """
        if self.rank == 0:
            self._set("first/data", {"fingerprint": fingerprint})
            return
        if not self.leads:
            return
        self.does("waits for process 0, to compare the data")
        first = self._wait("first", "data")["fingerprint"]
        if first != fingerprint:
            raise UserError(
                f"the data of process {self.rank} on {socket.gethostname()} is not that of process 0 "
                f"(fingerprints {fingerprint[:12]} and {first[:12]})",
                where="data.sources",
                fix="let all nodes read the same files, or prepare the data once where all nodes see it: gemma-tune "
                "data prepare RECIPE --out FOLDER",
            )

    # --- the store ----------------------------------------------------------------------------------------------------

    def _wait(self, place: str, name: str) -> dict[str, Any]:
        """The value of `name` once it is there. Polled, so that signals are heard meanwhile."""
        from torch.distributed import DistError

        begun = time.monotonic()
        try:
            while (found := self._get(f"{place}/{name}")) is None:
                if (failed := self._get(f"{place}/failed")) is not None:
                    self._leave(failed["code"])
                if time.monotonic() - begun > self.minutes * 60:
                    raise self._too_long(f"{place}/doing")
                time.sleep(POLL_SECONDS)
        except Stopped as exc:  # by the launcher, perhaps because that process failed: then it has the word
            if self._get(f"{place}/failed") is None:
                raise
            raise SystemExit(exc.exit_code) from None
        except DistError as exc:
            raise LostProcess(
                f"process {self.rank} has lost process 0, through which all speak to each other",
                where="distributed",
                fix="see what process 0 or its launcher said last",
            ) from exc
        return found

    def _too_long(self, doing: str) -> AccessError:
        if self._store.add(self._key(_TOLD), 1) > 1:
            self._leave(AccessError.exit_code)
        known = self._get(doing)
        whom = (
            f"process {known['rank']} on {known['host']}, which still {known['what']}"
            if known
            else "the first process of its node, which has not begun"
        )
        return AccessError(
            f"process {self.rank} has waited {self.minutes:g} minutes for {whom}",
            where="distributed.timeout",
            fix="raise it, or do once beforehand what takes long: gemma-tune data prepare RECIPE",
        )

    def _leave(self, code: int) -> None:
        with suppress(Stopped):  # by the launcher: that is what is waited for
            time.sleep(GRACE_SECONDS)
        raise SystemExit(code)

    def _own_places(self) -> list[str]:
        """Where others wait for this process: those of its node, and for process 0 the other nodes."""
        return [f"node/{self.name}", *(["first"] if self.rank == 0 else [])]

    def _key(self, name: str) -> str:
        return f"{self._turn}/{name}"

    def _set(self, name: str, value: Mapping[str, Any]) -> None:
        self._store.set(self._key(name), json.dumps(dict(value)))

    def _has(self, name: str) -> bool:
        return bool(self._store.check([self._key(name)]))

    def _get(self, name: str) -> dict[str, Any] | None:
        return dict(json.loads(self._store.get(self._key(name)))) if self._has(name) else None


def exit_code_of(exc: BaseException) -> int:
    """What `cli.main` will make of it."""
    if isinstance(exc, GemmaTuneError):
        return exc.exit_code
    return 130 if isinstance(exc, KeyboardInterrupt) else 1


def node_of(plan: Plan) -> Node | None:
    """This process among those that the launcher started on its machine; None where there is only one in all.

    The node's name is what torchrun or SLURM calls it. Without either, ranks are taken to be numbered node by node.
    """
    if plan.machine.get("world_size", 1) == 1:
        return None
    from torch.distributed import PrefixStore, rendezvous

    minutes = plan.values("session")["distributed"]["timeout"]
    store, rank, _ = next(rendezvous("env://", timeout=timedelta(minutes=minutes)))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    name = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or f"from {rank - local}"
    return Node(PrefixStore("gemma-tune", store), rank=rank, leads=local == 0, name=name, minutes=minutes)
