"""Several runs one after the other in the same processes, since most of a short run is the start of its processes.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.parallel_worker FILE

FILE holds a list of `{"arguments": [...], "code": 0, "stop": [rank, step] or null}`. Each is a command of gemma-tune,
with the exit code that it must have; `stop` sends SIGTERM to one process alone, in the middle of a step. What each step
is made of goes into OUTPUT-rows.RANK, a line a row: step and digest of its tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from gemma_tune.cli import main
from gemma_tune.train import run as runs
from gemma_tune.train.trainer import RunTrainer

RANK = int(os.environ.get("RANK", "0"))


def watch(output: str, stop: tuple[int, int] | None) -> Any:
    """Write down the rows of each step, and stop one process. Returns what undoes it."""
    own = RunTrainer.get_batch_samples
    file = Path(f"{output}-rows.{RANK}")

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows, items = own(self, *args, **kwargs)
        step = self.state.global_step + 1
        with file.open("a", encoding="utf-8") as out:
            for batch in rows:
                for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                    if any(label != -100 for label in labels):  # a repetition stands in for no row
                        out.write(f"{step} {digest(ids)}\n")
        if stop == (RANK, step):
            os.kill(os.getpid(), signal.SIGTERM)
        return rows, items

    RunTrainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
    return lambda: setattr(RunTrainer, "get_batch_samples", own)


def digest(ids: list[int]) -> str:
    """Of a row without its padding (id 0, which no text has)."""
    return hashlib.sha256(json.dumps([one for one in ids if one]).encode()).hexdigest()[:16]


def begin_again() -> None:
    """As a new process would find accelerate, but for the process group, which lives on."""
    AcceleratorState._reset_state()
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def run_all(file: str) -> int:
    runs.leave_together = runs.wait_for_all  # the group is needed again
    for one in json.loads(Path(file).read_text(encoding="utf-8")):
        output = next(word.removeprefix("output=") for word in one["arguments"] if word.startswith("output="))
        undo = watch(output, tuple(one["stop"]) if one.get("stop") else None) if one.get("watch") else lambda: None
        code = main(one["arguments"])
        undo()
        if code != one.get("code", 0):
            print(f"{one['arguments']}: exit code {code}", file=sys.stderr)
            return 1
        begin_again()
    return 0


if __name__ == "__main__":
    code = run_all(sys.argv[1])
    import torch

    torch.distributed.destroy_process_group()
    sys.exit(code)
