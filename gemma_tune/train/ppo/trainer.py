"""PPO (arXiv 1707.06347) on one quantised base, as a loop that reads like the paper.

TRL has had no PPO since 1.13 (trl#7020). The Trainer of transformers is one batch, one loss, one step; PPO draws its
batch itself and learns from it several times, with two losses. So the loop is ours, and what is around a step is what
every stage has: the same callbacks, checkpoints, counters and run folder (`train.run`).

There is no DistributedDataParallel: its hooks wait for every parameter in every backward pass, and here each pass
belongs to one role. Each process holds the whole base, and the gradients of the adapters are added up once a step.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, get_scheduler
from transformers import set_seed as seed_everything
from transformers.trainer_callback import CallbackHandler
from trl.trainer.utils import disable_dropout_in_model

from gemma_tune.errors import TrainingError
from gemma_tune.gemma.conversation import as_messages
from gemma_tune.gemma.families import Family
from gemma_tune.models.actors import Actors
from gemma_tune.models.reward import base_of
from gemma_tune.models.roles import speak_as
from gemma_tune.train import checkpoint
from gemma_tune.train.callbacks import Clock, counters_of
from gemma_tune.train.evaluate import Answer, Prompt, eval_mode
from gemma_tune.train.loss_scaling import LossScaler
from gemma_tune.train.ppo import state as saved_state
from gemma_tune.train.ppo.advantages import gae, masked_mean, rewards_to_go, rloo, whiten
from gemma_tune.train.ppo.config import PpoConfig
from gemma_tune.train.ppo.figures import PpoFigures, mean_and_std
from gemma_tune.train.ppo.losses import explained_variance, policy_terms, value_terms
from gemma_tune.train.ppo.passes import Plan, arrange, collate, log_probs_of, spread
from gemma_tune.train.ppo.prompts import Chat, PromptOrder, seed_of
from gemma_tune.train.ppo.rewards import KlController, k1, k3, shape_scores, token_rewards
from gemma_tune.train.ppo.rollout import roll_out, sampling
from gemma_tune.train.ppo.scores import Scorer, Scores
from gemma_tune.train.ppo.types import Experience, Pass, Rollout
from gemma_tune.train.sharding import refuse_parts
from gemma_tune.train.trainer import Surroundings

_EVALUATION = 2**31
"""Stands for the step in the seed of an evaluation: every evaluation draws with the same noise."""


class PpoTrainer:
    """Trains the policy and the critic of `actors`.

    Args:
        actors: the roles (`models.actors.cast_roles`).
        scorer: what a response is worth.
        family: the generation of the base.
        prompts: rows of `prompt_ids`.
        config: keywords of the plan.
        around: what the run gives it. `held_out` are rows as `prompts`.
        conversations, held_out_conversations: the same prompts, as reward functions get them.
        tokenizer: for callbacks.
    """

    def __init__(
        self,
        *,
        actors: Actors,
        scorer: Scorer,
        family: Family,
        prompts: Any,
        config: PpoConfig,
        around: Surroundings,
        conversations: Sequence[Chat] = (),
        held_out_conversations: Sequence[Chat] = (),
        tokenizer: Any = None,
    ) -> None:
        self.args = config
        self.accelerator = Accelerator(cpu=config.use_cpu)
        refuse_parts(self.accelerator.distributed_type)
        self.actors, self.model = actors, actors.model
        self.family = family
        self.scorer = scorer
        self.kl = KlController(config.kl, config.kl_target, config.kl_horizon)
        self.order = PromptOrder(
            [row["prompt_ids"] for row in prompts],
            conversations,
            config.rollout_size,
            config.samples_per_prompt,
            config.seed,
            config.process_index,
            self.world_size,
        )
        self._held_out = [row["prompt_ids"] for row in around.held_out]
        self._held_out_conversations = held_out_conversations
        self._folder, self._keep, self._identity = around.folder, around.keep, around.identity
        self._signals = around.signals
        progress = around.progress or {}
        self.clock = Clock(progress.get("train_seconds", 0.0))
        self._tokens_before = (progress.get("tokens_seen", 0), progress.get("tokens_trained", 0))
        self._tokens = torch.zeros(2, dtype=torch.int64, device=config.device)
        self.counters: dict[str, Any] = {}
        self.last_evaluation: PpoFigures | None = None
        self.evaluated_at = -1
        self._prepare_model()
        self._make_optimizer(scaled=around.loss_scaling)
        self.state = TrainerState(
            is_local_process_zero=self.accelerator.is_local_main_process,
            is_world_process_zero=self.is_world_process_zero(),
        )
        self.control = TrainerControl()
        self.callbacks = CallbackHandler(
            [DefaultFlowCallback()], self.model, tokenizer, self.optimizer, self.lr_scheduler
        )

    @property
    def world_size(self) -> int:
        return self.args.world_size

    def is_world_process_zero(self) -> bool:
        return self.args.process_index == 0

    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return max(1, math.floor(self.args.num_train_epochs * self.order.steps_in_epoch))

    def add_callback(self, callback: TrainerCallback) -> None:
        self.callbacks.add_callback(callback)

    def _prepare_model(self) -> None:
        # The ratio of new to old probabilities means something only where both come from the same network.
        disable_dropout_in_model(self.model)
        self.model.eval()
        if self.args.activation_checkpointing:
            base_of(self.model).activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
            self.model.train()  # layers are recomputed in training mode only
        base_of(self.model).config.use_cache = True

    def _make_optimizer(self, *, scaled: bool) -> None:
        kind, keywords = Trainer.get_optimizer_cls_and_kwargs(self.args)
        groups = [{"params": self.actors.policy_parameters(), "lr": self.args.learning_rate}]
        if critic := self.actors.critic_parameters():
            groups.append({"params": critic, "lr": self.args.critic_learning_rate})
        self.optimizer = kind(groups, **{**keywords, "weight_decay": self.args.weight_decay})
        self.lr_scheduler = _schedule(self.optimizer, self.args, self.total_steps())
        # No autocast: the base has its type, and PEFT casts around the fp32 adapters.
        self.scaler = LossScaler(self.args.device.type, enabled=scaled)

    # --- one step -----------------------------------------------------------------------------------------------------

    def iterate(self, step: int) -> dict[str, float] | None:
        """Step `step` (from 0), whole: its metrics; None where a stop came during the rollout, which is then given up.

        Everything random in it comes from the seed and the step, so that a resumed run draws the same.
        """
        started = time.perf_counter()
        seed_everything(seed_of(self.args.seed, step, self.args.process_index))

        # 1. Prompts. 2. Rollout: one response each. 3. Scores.
        prompts, conversations = self.order.of(step)
        rollout = self.roll_out(prompts, conversations)
        if rollout is None:
            return None
        rolled_out = time.perf_counter()
        scores = self.scorer(rollout)

        # 4. Log-probabilities of policy and reference, and values: by the forward pass, the passes and the padding of
        #    the first epoch, so that the first ratio is exactly 1.
        plan = arrange(
            rollout.lengths,
            epochs=self.args.ppo_epochs,
            minibatches=self.args.minibatches,
            micro=self.args.per_device_train_batch_size,
            seed=seed_of(self.args.seed, step, self.args.process_index),
        )
        experience = self.observe(rollout, plan)

        # 5. Rewards. 6. Advantages and returns.
        shaped = shape_scores(
            scores.total.to(experience.mask.device),
            rollout.stopped.to(experience.mask.device),
            clip=self.args.score_clip,
            missing_stop_penalty=self.args.missing_stop_penalty,
        )
        experience = self.estimate(experience, shaped)
        scored = time.perf_counter()

        # 7. Epochs of minibatches: first the policy's pass and its gradient, then the critic's, then one step.
        skipped = self.scaler.skipped
        learnt = self.learn(rollout, experience, plan, train_policy=step >= self.args.critic_warmup)
        learnt["learning_rate"] = float(self.lr_scheduler.get_last_lr()[0])
        if not learnt["optimizer_steps"] or self.scaler.skipped - skipped < learnt["optimizer_steps"]:
            self.lr_scheduler.step()  # not where every step of it was skipped, in fp16

        # 8. The KL coefficient of the next step.
        metrics = self._describe(rollout, scores, shaped, experience) | learnt
        metrics["objective/kl_coefficient"] = self.kl.coefficient
        self.kl.update(metrics["objective/kl"], self.args.rollout_size * self.world_size)

        self._tokens += torch.tensor([rollout.tokens, int(experience.mask.sum())], device=self._tokens.device)
        seconds = (rolled_out - started, scored - rolled_out, time.perf_counter() - scored)
        return metrics | self._speed(rollout, learnt["optimizer_steps"], *seconds)

    def roll_out(self, prompts: Sequence[Sequence[int]], conversations: Sequence[Any]) -> Rollout | None:
        """Responses of the policy; None where a stop is asked for."""
        return roll_out(
            self.actors,
            prompts,
            self.family,
            sampling(self.family, self.args),
            conversations=conversations,
            together=self.args.per_device_eval_batch_size,
            stop=self._stop_alone,
        )

    @torch.no_grad()
    def observe(self, rollout: Rollout, plan: Plan) -> Experience:
        """Log-probabilities, entropies and values of a rollout, before anything is learnt from it."""
        mask = rollout.mask.to(self.actors.device)
        blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        log_probs, entropy, reference, values = (blank.clone() for _ in range(4))
        passes = [self._collate(rollout, rows) for minibatch in plan[0] for rows in minibatch]
        for one in passes:
            own, spent, hidden = self._score(self.actors.policy, one)
            there = mask[one.rows]
            log_probs[one.rows], entropy[one.rows] = spread(own, there), spread(spent, there)
            if self.args.has_critic and self.actors.critic == "head":
                values[one.rows] = spread(self._values(one, hidden), there)
        for one in passes:  # role after role: a switch costs little, but not nothing
            reference[one.rows] = spread(self._score(self.actors.reference, one)[0], mask[one.rows])
        for one in passes if self.args.has_critic and self.actors.critic == "adapter" else ():
            values[one.rows] = spread(self._values(one, None), mask[one.rows])
        speak_as(self.model, self.actors.policy)
        return Experience(mask, log_probs, entropy, reference, values, blank, blank, blank)

    def estimate(self, seen: Experience, scores: torch.Tensor) -> Experience:
        """Rewards, advantages and returns, from shaped scores [B]."""
        config, mask = self.args, seen.mask
        rewards = token_rewards(scores, seen.log_probs, seen.reference, mask, coefficient=self.kl.coefficient)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, total=self.total)
        returns = torch.zeros_like(rewards)
        if config.estimator == "gae":
            advantages, returns = gae(rewards, seen.values, mask, gamma=config.gamma, lam=config.lam)
        elif config.estimator == "rloo":
            advantages = rloo(rewards.sum(-1), config.samples_per_prompt)[:, None] * mask
        else:
            advantages = rewards_to_go(rewards, mask, gamma=config.gamma)
        return seen.to(rewards=rewards, advantages=whiten(advantages, mask, total=self.total), returns=returns)

    @torch.enable_grad()  # whatever the file of a reward function has switched off for itself
    def learn(
        self, rollout: Rollout, experience: Experience, plan: Plan, *, train_policy: bool = True
    ) -> dict[str, float]:
        """The optimizer steps of one rollout. Sums over tokens are divided by the tokens of the minibatch, those of all
        its passes and processes: neither changes the result."""
        sums: dict[str, float] = {}
        first_gap, ratio_max, last_kl, steps = 0.0, 0.0, 0.0, 0
        for minibatch in (minibatch for epoch in plan for minibatch in epoch):
            tokens = float(self.total(experience.mask[[row for rows in minibatch for row in rows]].sum()))
            found: dict[str, torch.Tensor] = {}
            for rows in minibatch:
                terms = self._learn_pass(self._collate(rollout, rows), experience, tokens, train_policy)
                ratio_max = max(ratio_max, float(terms.pop("ratio_max")))
                if not steps:
                    first_gap = max(first_gap, float(terms.pop("ratio_gap")))
                terms.pop("ratio_gap", None)
                for name, value in terms.items():
                    found[name] = found.get(name, torch.zeros((), device=value.device)) + value.detach()
            means = {name: float(value) / tokens for name, value in self._total_of(found).items()}
            last_kl = means["policy/approxkl_avg"]
            if self.args.stop_kl is not None and means["policy/approxkl_avg"] > self.args.stop_kl:
                self.optimizer.zero_grad()
                sums["policy/stopped_by_kl"] = 1.0
                break
            means |= self._take_step(rollout, means, train_policy)
            steps += 1
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + mean
        stopped_by_kl = sums.pop("policy/stopped_by_kl", 0.0)
        averages = {name: value / max(steps, 1) for name, value in sums.items()}
        return averages | {
            "val/ratio_max": self._largest(ratio_max),
            "val/first_ratio_gap": self._largest(first_gap),
            "policy/approxkl_last": last_kl,  # the minibatch that was refused, where one was
            "policy/stopped_by_kl": stopped_by_kl,
            "optimizer_steps": steps,
            **(self.scaler.figures() if self.scaler.is_enabled() else {}),
        }

    def _learn_pass(
        self, one: Pass, experience: Experience, tokens: float, train_policy: bool
    ) -> dict[str, torch.Tensor]:
        """Forward and backward of both roles over one pass; each backward before the next switch. Sums over tokens."""
        seen, config = experience.of(one.rows), self.args
        with torch.set_grad_enabled(train_policy):
            log_probs, entropy, hidden = self._score(self.actors.policy, one, with_entropy=config.entropy > 0)
            own, spent = spread(log_probs, seen.mask), spread(entropy, seen.mask)
            policy = policy_terms(own, seen.log_probs, seen.advantages, seen.mask, clip=config.clip)
            if train_policy:
                self.scaler.scale((policy.loss - config.entropy * spent.sum()) / tokens).backward()
        gap = torch.expm1((own.detach() - seen.log_probs)[seen.mask]).abs().max()
        terms = {
            "loss/policy_avg": policy.loss,
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clipped,
            "policy/entropy_avg": spent.sum(),
            "val/ratio": policy.ratio,
            "ratio_max": policy.ratio_max,
            "ratio_gap": gap,
        }
        if config.has_critic:
            values = spread(self._values(one, hidden), seen.mask)
            value = value_terms(values, seen.values, seen.returns, seen.mask, clip=config.value_clip)
            self.scaler.scale(value.loss / tokens).backward()
            terms |= {"loss/value_avg": value.loss, "val/clipfrac_avg": value.clipped}
        speak_as(self.model, self.actors.policy)
        return terms

    def _take_step(self, rollout: Rollout, means: Mapping[str, float], train_policy: bool) -> dict[str, float]:
        """Add up the gradients of all processes, clip each role's own, and take the optimizer's step.

        Raises:
            TrainingError: a loss or a gradient is not finite. Nothing is updated then.
        """
        roles = {"policy": self.actors.policy_parameters() if train_policy else []}
        if self.args.has_critic:
            roles["value"] = self.actors.critic_parameters()
        self._add_up_gradients([parameter for parameters in roles.values() for parameter in parameters])
        self.scaler.unscale_(self.optimizer)
        norms = {}
        for role, parameters in roles.items():
            if parameters:
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
                norms[f"{role}/grad_norm"] = float(norm)
        losses = {name: means[name] for name in ("loss/policy_avg", "loss/value_avg") if name in means}
        # In fp16 the scaler skips a step with an infinite gradient by itself; there only the loss counts.
        watched = losses if self.scaler.is_enabled() else losses | norms
        if odd := [name for name, value in watched.items() if not math.isfinite(value)]:
            self._report_non_finite(odd[0], rollout)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return {} if self.scaler.is_enabled() else norms

    def _add_up_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One collective for all gradients. A parameter without one counts as zero on every process alike."""
        if self.world_size == 1:
            return
        with_one = [parameter for parameter in parameters if parameter.grad is not None]
        flat = self.total(torch.cat([parameter.grad.flatten() for parameter in with_one]))  # type: ignore[union-attr]
        for parameter, part in zip(with_one, flat.split([p.numel() for p in with_one]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def _report_non_finite(self, what: str, rollout: Rollout) -> None:
        step = self.state.global_step + 1
        path = self._folder.path / "non_finite.json"
        if self.is_world_process_zero():
            rows = [[*p, *r] for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
            checkpoint.write_atomically(path, json.dumps({"step": step, "what": what, "input_ids": rows}))
        raise TrainingError(
            f"{what} of step {step:,} is not finite; nothing was updated by it",
            where=str(path),
            fix="lower optim.learning_rate or change model.precision; look at the responses of that step, in this file",
        )

    # --- passes -------------------------------------------------------------------------------------------------------

    def _collate(self, rollout: Rollout, rows: Sequence[int]) -> Pass:
        return collate(rollout, rows, self.family.pad_id, self.actors.device)

    def _score(
        self, adapters: Sequence[str], one: Pass, *, with_entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return log_probs_of(self.actors, adapters, one, temperature=self.args.temperature, with_entropy=with_entropy)

    def _values(self, one: Pass, hidden: torch.Tensor | None) -> torch.Tensor:
        return self.actors.values(one.input_ids, one.attention_mask, one.places, hidden)

    # --- figures ------------------------------------------------------------------------------------------------------

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Added up over all processes."""
        if self.world_size == 1:
            return values
        found: torch.Tensor = self.accelerator.reduce(values.to(self.args.device), "sum")
        return found.to(values.device)

    def _largest(self, value: float) -> float:
        """The largest of all processes' values."""
        return float(self.accelerator.gather(torch.tensor([value], device=self.args.device)).max())

    def _total_of(self, named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        added = self.total(torch.stack([value.double() for value in named.values()]))
        return dict(zip(named, added, strict=True))

    def _describe(self, rollout: Rollout, scores: Scores, shaped: torch.Tensor, seen: Experience) -> dict[str, float]:
        """What a rollout was like. Means over all processes' responses, or tokens where it says so (entropy)."""
        mask, config = seen.mask, self.args
        penalty = k1(seen.log_probs, seen.reference) * mask
        each = {
            "objective/scores": scores.total.to(mask.device),
            "squares": scores.total.to(mask.device).square(),
            "objective/kl": penalty.sum(-1),
            "objective/kl_k3": (k3(seen.log_probs, seen.reference) * mask).sum(-1),
            "objective/rlhf_reward": shaped - self.kl.coefficient * penalty.sum(-1),
            "objective/non_score_reward": -self.kl.coefficient * penalty.sum(-1),
            "rollout/length": mask.sum(-1).float(),
            "rollout/stopped": rollout.stopped.float().to(mask.device),
        }
        if len(scores.parts) > 1:
            each |= {f"scores/{name}": part.to(mask.device) for name, part in scores.parts.items()}
        count = config.rollout_size * self.world_size
        found = {
            name: float(value) / count
            for name, value in self._total_of({name: value.double().sum() for name, value in each.items()}).items()
        }
        _, found["objective/scores_std"] = mean_and_std(found["objective/scores"], found.pop("squares"), 1)
        found["objective/entropy"] = float(masked_mean(seen.entropy, mask, total=self.total))
        if config.has_critic:
            found["val/explained_variance"] = explained_variance(seen.values, seen.returns, mask, total=self.total)
        return found

    def _speed(
        self, rollout: Rollout, optimizer_steps: float, drawing: float, scoring: float, learning: float
    ) -> dict[str, float]:
        made = sum(map(len, rollout.responses)) * self.world_size
        learnt = optimizer_steps / self.args.minibatches * rollout.tokens * self.world_size
        return {
            "time/rollout": drawing,
            "time/score": scoring,
            "time/update": learning,
            "rollout/tokens_per_second": made / drawing,
            "update/tokens_per_second": learnt / learning,
        }

    def rate_answers(
        self, prompts: Sequence[Prompt], asked: Sequence[Sequence[int]], found: list[Answer]
    ) -> list[Answer]:
        """The answers with what the recipe's reward says of them. `asked`: the token ids of the prompts."""
        if not found:
            return []
        rollout = Rollout(
            [list(ids) for ids in asked[: len(found)]],
            [list(answer.ids) for answer in found],
            torch.tensor([answer.ended for answer in found]),
            [as_messages(prompt.conversation()) for prompt, _ in zip(prompts, found, strict=False)],
        )
        scores = self.scorer(rollout).total.tolist()
        return [replace(answer, score=score) for answer, score in zip(found, scores, strict=True)]

    def evaluate(self) -> dict[str, float]:
        """`PpoFigures` over the held-out prompts, as `eval_...`. Draws with the same noise every time."""
        with self.clock.paused():
            found = self._evaluate()
        self.count()
        metrics: dict[str, float] = {}
        if found is not None:
            self.last_evaluation, self.evaluated_at = found, self.state.global_step
            metrics = {f"eval_{name}": value for name, value in found.metrics().items()}
            self._log(metrics)
        if self._stop_alone():
            self.control.should_save = self.control.should_training_stop = True
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self) -> PpoFigures | None:
        own = slice(self.args.process_index, None, self.world_size)
        prompts = self._held_out[own]
        sums = torch.zeros(8 + 2 * len(self.scorer.sources), dtype=torch.float64)
        seed_everything(seed_of(self.args.seed, _EVALUATION, self.args.process_index))
        if prompts:
            rollout = self.roll_out(prompts, self._held_out_conversations[: len(self._held_out)][own])
            if rollout is None:
                return None
            micro = self.args.per_device_train_batch_size
            plan = arrange(rollout.lengths, epochs=1, minibatches=1, micro=micro, seed=0)
            with eval_mode(self.model):
                scores, seen = self.scorer(rollout), self.observe(rollout, plan)
            sums = PpoFigures.sums(scores, seen, rollout.stopped)
        sums = self.total(sums)
        return PpoFigures.of(sums, self.scorer.sources) if sums[0] else None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """All steps that are left."""
        if resume_from_checkpoint is not None:
            self.load_trained(Path(resume_from_checkpoint))
        self.state.max_steps = self.total_steps()
        self.state.compute_steps(self.args, self.state.max_steps)
        self.control = self.callbacks.on_train_begin(self.args, self.state, self.control)
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.control = self.callbacks.on_step_begin(self.args, self.state, self.control)
            metrics = self.iterate(self.state.global_step)
            if metrics is None:  # nothing of this step has happened
                self._save_checkpoint()
                break
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.order.steps_in_epoch
            self.count()
            self.control = self.callbacks.on_step_end(self.args, self.state, self.control)
            if self.control.should_log:
                self._log(metrics)
            if self.control.should_evaluate:
                self.evaluate()
            if self.control.should_save:
                self._save_checkpoint()
        self.control = self.callbacks.on_train_end(self.args, self.state, self.control)

    def _log(self, metrics: Mapping[str, float]) -> None:
        self.count()
        logs = {**metrics, "epoch": round(self.state.epoch or 0.0, 4)}
        self.control = self.callbacks.on_log(self.args, self.state, self.control, logs)

    def count(self) -> dict[str, Any]:
        """Bring `counters` up to date. Every process must call this together.

        `tokens_seen` are those of prompts and responses, `tokens_trained` the response tokens, each counted once
        however many epochs they are learnt from.
        """
        here = self.total(self._tokens).tolist()
        self.counters = counters_of(here, self._tokens_before, self.clock.seconds)
        return self.counters

    def _stop_alone(self) -> bool:
        """Of several processes none may leave by itself: the others would wait for it. They agree after the step."""
        return self.world_size == 1 and self._signals.requested is not None

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """All that a bit-equal continuation needs, in one atomic folder."""
        step, run = self.state.global_step, self._folder.path
        with self.clock.paused():
            progress = self.count()
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                fill = partial(saved_state.write, self)
                checkpoint.save(run, step, fill, identity=self._identity, progress=progress)
                checkpoint.rotate(run, self._keep)
            self.accelerator.wait_for_everyone()

    def load_trained(self, folder: Path) -> None:
        """Continue from a verified checkpoint."""
        saved_state.read(self, folder)


def _schedule(optimizer: torch.optim.Optimizer, config: PpoConfig, steps: int) -> LambdaLR:
    """The recipe's schedule over `steps` iterations, one later than transformers has it.

    There the first step of a warm-up has a learning rate of 0, which costs next to nothing where a run has thousands.
    Here it would be a whole rollout.
    """
    usual = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.get_warmup_steps(steps),
        num_training_steps=steps + 1,
    )
    return LambdaLR(optimizer, [_one_later(factor) for factor in usual.lr_lambdas])


def _one_later(factor: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: factor(step + 1)
