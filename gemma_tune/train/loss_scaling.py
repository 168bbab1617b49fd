"""Loss scaling for gradients in fp16, with autocast or without it, on any device.

fp16 has no number between 0 and 6e-8, and few below 6e-5, where many gradients lie. So the loss is multiplied by a
factor before the backward pass, and gradients are divided by it before anybody reads them. The factor falls where they
become infinite, and that step is not taken.

accelerate makes a scaler only together with fp16 autocast, which it refuses on a CPU (1.15, accelerator.py); a base
that is held in fp16 needs the factor and no autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from gemma_tune.errors import TrainingError

INITIAL = 2.0**12
"""torch begins with 2^16. A gradient is that of the mean over a step's tokens. On the real Gemma 3 270M it is as exact
for 2^-8 to 2^6 times the loss of one token (docs/precision.md): with this, for steps of 64 to a million tokens."""

MOST_SKIPPED = 16
"""Steps that may be skipped one after the other. A factor of `INITIAL` has fallen to 2^-4 by then: what is infinite at
that is infinite by itself."""


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler, which counts the steps that it skips, in a row and in all, and gives up.

    Optimizers with a fused kernel skip an infinite gradient inside of it, so that whoever asks whether the step was
    taken hears yes (accelerate 1.15, optimizer.py) and moves the learning rate on. Here no optimizer is called for it.

    Attributes:
        skipped: steps that were skipped, of the whole run.
        in_a_row: those since the last step that was taken.
    """

    def __init__(self, device: str, *, enabled: bool = True) -> None:
        super().__init__(device, init_scale=INITIAL, enabled=enabled)
        self.skipped = self.in_a_row = 0

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Take the step, or skip it.

        Raises:
            TrainingError: `MOST_SKIPPED` in a row.
        """
        if not self.is_enabled():
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.READY:
            self.unscale_(optimizer)
        if not any(flag.item() for flag in state["found_inf_per_device"].values()):
            self.in_a_row = 0
            return super().step(optimizer, *args, **kwargs)
        state["stage"] = OptState.STEPPED
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had an infinite gradient in fp16, the last one at a loss scale of "
                f"{self.get_scale():g}; nothing was updated by them",
                where="model.precision",
                fix="lower optim.learning_rate, or set model.precision: fp32 (bf16 where the GPU has it)",
            )
        return None

    def figures(self) -> dict[str, float]:
        """For the log: the factor, and steps that were skipped in the whole run."""
        return {"loss_scale": self.get_scale(), "skipped_steps": float(self.skipped)}

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()  # empty where nothing is scaled
        return {**found, "skipped": self.skipped, "in_a_row": self.in_a_row} if found else found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.is_enabled():
            # Checkpoints of before this class hold torch's state alone.
            self.skipped, self.in_a_row = state_dict.get("skipped", 0), state_dict.get("in_a_row", 0)
