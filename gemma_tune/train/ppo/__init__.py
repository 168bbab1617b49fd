"""Proximal policy optimisation: what it does besides what all stages do (`train/run.py`).

prompts     which prompts a step takes
rollout     the policy answers them             scores      what the answers are worth
passes      how answers are cut into passes     types       what is handed on
rewards     KL penalty and score a token        advantages  GAE, RLOO, REINFORCE++
losses      the clipped losses                  trainer     the step, in numbered parts
state       checkpoints                         figures     held-out figures
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.data.prompts import build_prompts
from gemma_tune.errors import UserError
from gemma_tune.gemma.conversation import as_messages
from gemma_tune.gemma.families import Family
from gemma_tune.models.actors import Actors, cast_roles
from gemma_tune.models.lora import save_adapter
from gemma_tune.models.roles import speak_as
from gemma_tune.plan.types import Plan
from gemma_tune.train.ppo.config import PpoConfig
from gemma_tune.train.ppo.scores import Scorer
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.run import Run, Stage, trainer_config
from gemma_tune.train.trainer import Surroundings


def cast(model: Any, plan: Plan, family: Family) -> Actors:
    """Reward models and critic beside the policy."""
    trainer, session = plan.values("trainer"), plan.values("session")
    critic = session["critic"] or {}
    return cast_roles(
        model,
        family,
        critic.get("lora") or {},
        rewards=[source["source"] for source in session["rewards"] if source["kind"] == "model"],
        critic=trainer["critic"] if trainer["estimator"] == "gae" else None,
        begin=critic.get("start"),
        mode=(session.get("adapter") or {}).get("mode") or "continue",
        normalize=trainer["normalize"],
    )


def make_trainer(run: Run, around: Surroundings) -> PpoTrainer:
    """Our own loop over prompts.

    Raises:
        UserError: a source of rewards cannot be used, or the critic's warm-up never ends.
    """
    config = trainer_config(run.plan)
    assert isinstance(config, PpoConfig)
    family, data = run.materials.family, run.materials.data
    scorer = Scorer(
        run.model,
        run.session["rewards"],
        family,
        run.materials.tokenizer,
        normalize=config.normalize,
        micro=config.per_device_train_batch_size,
    )
    trainer = PpoTrainer(
        actors=run.model,
        scorer=scorer,
        family=family,
        prompts=data.train,
        config=config,
        around=around,
        conversations=[as_messages(example) for example in data.train_examples],
        held_out_conversations=[as_messages(example) for example in data.held_out_examples],
        tokenizer=run.materials.tokenizer,
    )
    # The recipe's own rule sees optim.max_steps alone: what optim.epochs comes to depends on the prompts.
    if config.has_critic and config.critic_warmup >= trainer.total_steps():
        raise UserError(
            f"ppo.critic_warmup: {config.critic_warmup:,} leaves none of the run's {trainer.total_steps():,} steps to "
            "the policy",
            where="ppo.critic_warmup",
            fix="lower it, or train for longer",
        )
    return trainer


def write(run: Run, folder: Path, results: Mapping[str, Any]) -> None:
    """The policy as one plain adapter on the base, also where it was trained on top of another."""
    speak_as(run.model.model, run.model.policy)
    save_adapter(run.model.model, folder, run.materials.family, run.materials.tokenizer)


def finish(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """By how many deviations of a batch's mean the held-out score has risen: chance moves it by about one."""
    base, tuned = results.get("base", {}), results["tuned"]
    if base.get("score") is None or tuned.get("score") is None or not base["score_std"]:
        return {}
    size = run.plan.values("trainer")
    batch = size["per_device_train_batch_size"] * size["gradient_accumulation_steps"]
    batch *= run.plan.machine.get("world_size", 1)
    deviation = base["score_std"] / batch**0.5
    return {"score_batch_std": deviation, "score_rise": (tuned["score"] - base["score"]) / deviation}


STAGE = Stage(
    config=PpoConfig,
    prepare=build_prompts,
    trainer=make_trainer,  # type: ignore[arg-type]
    write=write,
    finish=finish,
    wrap=cast,
    reference=True,
)
