"""Tasks that lm-evaluation-harness lacks, as it wants them: a YAML file each, and the functions that it names.

`bold` and `winobias` (with `winobias_type1` and `winobias_type2`) are on the model card of Gemma 1.1. How Google
measured them is not written down, so our figures are not the card's; two models measured here can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def by_group(task: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures of the groups of people that a task of ours compares; empty for every other task.

    Args:
        task: its name.
        samples: lm-eval's samples of it.
    """
    if task == "bold":
        from gemma_tune.evaluation.tasks.bold import groups

        return groups(samples)
    return {}
