"""What is held equal between one process and several: the cases of tests/integration/test_parallel.py.

The matrix in docs/clusters.md is made of these, so it states what runs and nothing else:

    python -m tests.parallel_cases      prints it
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.tiny import TINY_NAMES

RELATIVE = 1e-5
"""Largest relative difference of losses, and of the saved weights taken together, that is allowed in fp32."""


@dataclass(frozen=True, slots=True)
class Case:
    """One recipe that one process and several run.

    Attributes:
        name: unique.
        what: the row of the matrix.
        stage, base: of the recipe; a base of `tests.tiny`.
        overrides: of the command line.
        changes: sections of the recipe.
        strategies: under which several processes run it.
        relative: largest relative difference.
    """

    name: str
    what: str
    stage: str = "sft"
    base: str = "gemma3_text"
    overrides: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    strategies: tuple[str, ...] = ("ddp", "fsdp2")
    relative: float = RELATIVE


UNEVEN = {"data": {"packing": False, "holdout": 9}, "optim": {"max_steps": None, "epochs": 1}, "batch": {"size": 16}}
"""51 rows in batches of 16: the last step has 3, of which the second of two processes gets none."""

EPOCH = {"optim": {"max_steps": None, "epochs": 1}, "batch": {"size": 16, "micro": 8}}
"""39 pairs in batches of 16: the last step has 7, of which the second of two processes gets none."""

CASES = (
    *(Case(f"sft {name}", "SFT, LoRA, packed rows, every generation", base=name) for name in TINY_NAMES),
    Case("uneven", "SFT, single rows, uneven last batch", changes=UNEVEN, overrides=("batch.micro=4",)),
    Case("checkpointing", "SFT, activation checkpointing, shared keys and values", base="gemma4",
         overrides=("memory.gradient_checkpointing=true",)),
    Case("full", "full fine-tune, tied head", overrides=("adapter=null", "optim.learning_rate=1e-3")),
    Case("full with towers", "full fine-tune, frozen towers", base="gemma4", strategies=("fsdp2",),
         overrides=("adapter=null", "optim.learning_rate=1e-3")),
    Case("nf4", "QLoRA (NF4, fp32 on a CPU)", overrides=("model.quantization=nf4",)),
    Case("int8", "LoRA on int8", overrides=("model.quantization=int8",), strategies=("ddp",)),
    Case("dora", "DoRA", overrides=("adapter.dora=true",)),
    Case("reward", "reward model, uneven last batch", stage="reward", changes={**EPOCH, "reward": {"margin": "score"}}),
    Case("dpo", "DPO, uneven last batch", stage="dpo", changes={**EPOCH, "dpo": {"sft_weight": 0.5}}),
    Case("dpo cached", "DPO, reference scored beforehand", stage="dpo",
         overrides=("dpo.precompute_reference=true",)),
)  # fmt: skip


ELSEWHERE = (
    ("SFT on four processes, and as two groups of two (HSDP)", "equal", "equal", "integration/test_parallel.py",
     "test_four_processes_do_what_one_does"),
    ("stopped on 2, resumed on 1 and 3, from one file or from parts", "equal", "equal", "integration/test_parallel.py",
     "test_a_run_goes_on_with_another_number_of_processes"),
    ("KTO (each pass estimates its own KL: another number of rows in a pass is another estimate)", "same held-out rows",
     "refused", "integration/test_kto_tiny.py",
     "test_two_processes_end_together_and_score_the_held_out_rows_as_one_does"),
    ("PPO (equal responses, where sampling leaves no choice)", "equal to 1e-3", "refused",
     "integration/test_two_processes.py", "test_two_processes_make_a_step_of_ppo_as_one_does"),
)  # fmt: skip
"""(row, DDP, FSDP2, file below tests/, test) of what other tests run."""


def table() -> str:
    """The matrix in Markdown: rows in the order of `CASES`, one a `what`."""
    rows: dict[str, set[str]] = {}
    for case in CASES:
        rows.setdefault(case.what, set()).update(case.strategies)
    lines = ["| what | DDP | FSDP2 |", "|---|---|---|"]
    for what, strategies in rows.items():
        lines.append(
            f"| {what} | " + " | ".join("equal" if one in strategies else "-" for one in ("ddp", "fsdp2")) + " |"
        )
    lines += [f"| {what} | {ddp} | {fsdp2} |" for what, ddp, fsdp2, _, _ in ELSEWHERE]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
