"""One step of PPO on a fixed rollout, on this process's share of it.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.ppo_worker FOLDER

What a process learnt by each estimator lies in FOLDER/RANK.pt afterwards. `step_on` alone is the same step on a single
process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.ppo_batches import experience_of, parts, some_rollout, some_scores, stir, trained
from tests.ppo_rig import small_actors, small_trainer

ESTIMATORS = ("gae", "rloo", "reinforce_pp")
COUNT, GROUP = 24, 4


def step_on(folder: Path, estimator: str, rank: int, processes: int) -> dict[str, Any]:
    """Two epochs of two minibatches by plain gradient descent, in fp64: its result is linear in the gradients.

    Minibatch m of all processes together holds the same responses, whatever their number is.

    Returns:
        The gradients of the first minibatch as the optimizer gets them, by how much each parameter moved in all, the
        metrics, advantages and returns.
    """
    share = COUNT // processes
    rollout = parts(some_rollout(COUNT), range(rank * share, (rank + 1) * share))
    scores = some_scores(some_rollout(COUNT))[rank * share : (rank + 1) * share]
    critic: Any = "adapter" if estimator == "gae" else None
    trainer = small_trainer(
        folder,
        lambda _: [],
        actors=stir(small_actors(dtype=torch.float64, critic=critic), 1),
        micro=share,
        size=share,
        optim="sgd",
        learning_rate=0.3,
        critic_learning_rate=0.1,
        max_grad_norm=0.05,  # well below what they are: each role's gradient is clipped, once it is whole
        estimator=estimator,
        samples_per_prompt=GROUP if estimator == "rloo" else 1,
        whiten_rewards=estimator == "gae",
        entropy=0.01,
        kl=0.1,
    )
    assert trainer.world_size == processes
    halves = [[row for row in range(share) if row // 2 % 2 == half] for half in (0, 1)]
    # Passes of another size in each epoch, and on each number of processes.
    plan = [[[half[: 2 + epoch], half[2 + epoch :]] for half in halves] for epoch in (0, 1)]
    experience = experience_of(trainer, rollout, scores)
    own = trained(trainer.actors)
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    gradients: list[dict[str, torch.Tensor]] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({name: parameter.grad.clone() for name, parameter in own.items()})  # type: ignore
    )
    metrics = trainer.learn(rollout, experience, plan)
    return {
        "gradients": gradients[0],
        "moved": {name: parameter.detach() - before[name] for name, parameter in own.items()},
        "metrics": metrics,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, rank, processes = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.save({name: step_on(place, name, rank, processes) for name in ESTIMATORS}, place / f"{rank}.pt")
    torch.distributed.destroy_process_group()
