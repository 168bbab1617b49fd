"""No telemetry leaves the machine unless the user asks for it.

The libraries below us report home by default. Each is told not to through its own environment variable, before it is
imported. What the user has set stays as it is.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Switch:
    """One variable that stops one kind of report.

    Attributes:
        variable: the environment variable.
        value: what stops the report.
        stops: what would leave the machine, and the source that says so.
        rivals: other variables that decide the same; where the user has set one of them, we set nothing.
    """

    variable: str
    value: str
    stops: str
    rivals: tuple[str, ...] = ()


_HUB = ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")

SWITCHES = (
    Switch(
        "HF_HUB_DISABLE_TELEMETRY",
        "1",
        "TRL's report of trainer, GPU and model architecture at every start (trl/trainer/base_trainer.py), and the "
        "hub client's library versions and agent look-up (huggingface_hub/utils/_headers.py)",
        rivals=_HUB,
    ),
    Switch("DO_NOT_TRACK", "1", "what other tools report that follow this convention", rivals=_HUB),
    Switch("HF_UPDATE_DOWNLOAD_COUNTS", "0", "a request for each dataset that is opened (datasets/load.py)"),
    Switch(
        "DISABLE_SAFETENSORS_CONVERSION",
        "1",
        "a request to a conversion bot for a model without safetensors (transformers/modeling_utils.py)",
    ),
    Switch("WANDB_ERROR_REPORTING", "false", "crash reports and usage figures of wandb (wandb/env.py)"),
)


def keep_private(environ: MutableMapping[str, str]) -> None:
    """Set every switch that the user has not set, in place. Call it before the libraries are imported."""
    chosen = set(environ)
    for switch in SWITCHES:
        if chosen.isdisjoint((switch.variable, *switch.rivals)):
            environ[switch.variable] = switch.value
