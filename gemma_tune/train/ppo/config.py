"""The keywords of a PPO run: what transformers' TrainingArguments has, and PPO's own."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass
class PpoConfig(TrainingArguments):
    """Keywords of `Plan.trainer`. What they mean stands in `recipe.schema.Ppo`, where their sources are.

    A step of `max_steps`, of the schedule and of the log is one iteration: a rollout of
    `per_device_train_batch_size x gradient_accumulation_steps` responses a process, then `ppo_epochs x minibatches`
    optimizer steps.
    """

    estimator: str = "gae"
    ppo_epochs: int = 2
    minibatches: int = 1
    critic: str = "adapter"
    critic_learning_rate: float = 2e-5
    critic_warmup: int = 0
    clip: float = 0.2
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    kl: float = 0.05
    kl_target: float | None = None
    kl_horizon: int = 10_000
    stop_kl: float | None = None
    entropy: float = 0.0
    missing_stop_penalty: float = 1.0
    score_clip: float | None = 10.0
    whiten_rewards: bool = False
    normalize: bool = True
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    samples_per_prompt: int = 1

    @property
    def rollout_size(self) -> int:
        """Responses that this process draws in a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def has_critic(self) -> bool:
        """Whether the estimator needs values."""
        return self.estimator == "gae"
