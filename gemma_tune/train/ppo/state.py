"""What a PPO run puts into a checkpoint and takes out again: policy, critic, optimizer, schedule, KL coefficient.

Prompts and random numbers of a step follow from its number (`prompts`); reward models and reference never change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from gemma_tune.errors import TrainingError
from gemma_tune.train.weights import load_weights, write_weights

if TYPE_CHECKING:
    from gemma_tune.train.ppo.trainer import PpoTrainer

CRITIC_FILE = "critic.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer_state.json"
PPO_FILE = "ppo.json"


def write(trainer: PpoTrainer, folder: Path) -> None:
    """
    Raises:
        TrainingError: a weight is not finite; nothing is to be saved then.
    """
    named = {f"policy {place}": value for place, value in enumerate(trainer.actors.policy_parameters())}
    critic = trainer.actors.critic_tensors()
    for name, tensor in (named | critic).items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} is not finite at step {trainer.state.global_step:,}; it is not saved",
                where=str(folder.parent),
                fix="lower optim.learning_rate; the last checkpoint is intact",
            )
    write_weights(trainer.model, folder)
    if critic:
        save_file({name: tensor.detach().contiguous() for name, tensor in critic.items()}, str(folder / CRITIC_FILE))
    torch.save(
        {
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
        },
        folder / OPTIMIZER_FILE,
    )
    trainer.state.save_to_json(str(folder / STATE_FILE))
    (folder / PPO_FILE).write_text(json.dumps({"kl": trainer.kl.state()}), encoding="utf-8")


def read(trainer: PpoTrainer, folder: Path) -> None:
    """
    Raises:
        TrainingError: its tensors are not those of this run.
    """
    load_weights(trainer.model, folder)
    _read_critic(trainer, folder)
    saved = torch.load(folder / OPTIMIZER_FILE, map_location=trainer.actors.device, weights_only=True)
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    trainer.scaler.load_state_dict(saved["scaler"])
    state = TrainerState.load_from_json(str(folder / STATE_FILE))
    trainer.state.global_step, trainer.state.epoch = state.global_step, state.epoch
    trainer.kl.load(json.loads((folder / PPO_FILE).read_text(encoding="utf-8"))["kl"])


def _read_critic(trainer: PpoTrainer, folder: Path) -> None:
    own = trainer.actors.critic_tensors()
    saved = load_file(str(folder / CRITIC_FILE)) if own else {}
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise TrainingError("the critic in the checkpoint does not fit this run", where=str(folder), fix="start anew")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
