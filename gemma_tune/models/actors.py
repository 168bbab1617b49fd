"""Four roles on one base: policy, reference, reward models and critic, by switching adapters and heads.

    policy       the trained adapter (on top of the frozen one in mode `stack`), with the base's LM head
    reference    what the policy began with: the frozen adapter, or none; with the same LM head
    reward       the adapter of `gemma-tune reward`, with its scalar head; frozen
    critic       an adapter and a scalar head of its own, trained; or a head on the policy's trunk

The base is loaded once and never changes. Which parameters are trained is fixed at the start; a role is a pointer
(`roles.speak_as`). As in Hydra-PPO (arXiv 2309.00754), but with the critic's own adapter and on a quantised base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gemma_tune.errors import UserError
from gemma_tune.gemma.families import Family
from gemma_tune.models.lora import add_saved, keep_fp32
from gemma_tune.models.reward import RewardHead, base_of, check_stats, last_hidden, open_head, read_stats
from gemma_tune.models.roles import TRAINED, belongs, policy_adapters, reference_adapters, speak_as, speaking
from gemma_tune.plan.starts import adapter_folder, scale_of

if TYPE_CHECKING:
    from peft import PeftModel

CRITIC = "critic"
"""The critic's adapter."""


@dataclass(frozen=True, slots=True)
class RewardRole:
    """A frozen reward model on the shared base: the name of its adapter, its head, and reward_stats.json."""

    adapter: str
    head: RewardHead
    stats: Mapping[str, Any]


class Actors:
    """The roles of one `PeftModel`.

    Attributes:
        model: the base with all adapters. Outside of a role's pass it speaks as the policy.
        policy, reference: adapters of these roles.
        rewards: source (as the recipe names it) -> reward model.
        critic: what the critic is: `adapter`, `head`, or None where the estimator needs none.
        value_head: fp32; None without a critic.
    """

    def __init__(
        self,
        model: PeftModel,
        *,
        mode: str = "continue",
        rewards: Mapping[str, RewardRole] | None = None,
        critic: Literal["adapter", "head"] | None = None,
        value_head: RewardHead | None = None,
    ) -> None:
        self.model = model
        self.policy = policy_adapters(model, mode)
        self.reference = reference_adapters(model)
        self.rewards = dict(rewards or {})
        self.critic = critic
        self.value_head = value_head
        speak_as(model, self.policy)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's loss trains."""
        return [parameter for name, parameter in self.model.named_parameters() if belongs(name, TRAINED)]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic's loss trains; empty without a critic."""
        return list(self.critic_tensors().values())

    def critic_tensors(self) -> dict[str, nn.Parameter]:
        """The critic's parameters by name."""
        if self.value_head is None:
            return {}
        own = {name: parameter for name, parameter in self.model.named_parameters() if belongs(name, CRITIC)}
        return own | {f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()}

    # --- forward passes -----------------------------------------------------------------------------------------------

    def hidden(
        self, adapters: Sequence[str], input_ids: torch.Tensor, attention_mask: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """The trunk's last hidden states at `places`: [B, L] ids, 0/1 mask and bool places -> [N, D], row by row.

        The role stays switched on afterwards: with gradient checkpointing the backward pass runs the layers again.
        A backward pass under another role raises a RuntimeError, where its gradients would be silently wrong.
        """
        speak_as(self.model, adapters)
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        trunk = base_of(self.model).base_model
        found = trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        chosen: torch.Tensor = found.last_hidden_state[places]
        if chosen.requires_grad:
            chosen.register_hook(_refuse_other_role(self.model, list(adapters)))
        return chosen

    def values(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, places: torch.Tensor, policy_hidden: Any = None
    ) -> torch.Tensor:
        """The critic's value at `places`: [N] fp32.

        Args:
            policy_hidden: of the same places, under the policy, where it is known: a critic that is a head reads it.
                It is detached: the critic's loss moves the head, and never the policy.
        """
        assert self.value_head is not None
        if self.critic == "adapter":
            hidden = self.hidden([CRITIC], input_ids, attention_mask, places)
        elif policy_hidden is None:
            with torch.no_grad():
                hidden = self.hidden(self.policy, input_ids, attention_mask, places)
        else:
            hidden = policy_hidden.detach()
        return self.value_head(hidden)

    def rate(self, source: str, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The rewards of whole sequences by one of `rewards`, read at their last token: [B, L] -> [B] fp32."""
        role = self.rewards[source]
        speak_as(self.model, [role.adapter])
        return role.head(last_hidden(self.model, input_ids, attention_mask))


def cast_roles(
    model: PeftModel,
    family: Family,
    lora: Mapping[str, Any],
    *,
    rewards: Sequence[str] = (),
    critic: Literal["adapter", "head"] | None = "adapter",
    begin: str | None = None,
    mode: str = "continue",
    normalize: bool = True,
) -> Actors:
    """Put the other roles beside the policy.

    Args:
        model: the policy, from `attach`, or from `begin_with` with its frozen copy.
        family: the generation of the base.
        lora: keywords of peft.LoraConfig for a critic that begins with no reward model.
        rewards: run or adapter folders of `gemma-tune reward`.
        critic: an `adapter` and head of its own; or a `head` on the policy's trunk; or None.
        begin: the one of `rewards` that a critic with an adapter is begun as a copy of.
        mode: how the policy's start adapter is used.
        normalize: whether rewards are scaled by their mean and spread: the critic's head is then begun with the scaled
            head, so that its first values are those rewards.

    Raises:
        UserError: a reward model is damaged, or made for another base or template; or the policy's adapter is on the
            LM head as well.
    """
    _check_head(model)
    cast = {
        source: _cast_reward(model, adapter_folder(source, where="ppo.reward"), f"reward_{number}", family)
        for number, source in enumerate(rewards)
    }
    head = None
    if critic is not None:
        width = base_of(model).config.get_text_config().hidden_size
        judge = begin if critic == "adapter" else None
        head = _value_head(width, cast[judge] if judge else None, normalize)
        if critic == "adapter":
            _cast_critic(model, adapter_folder(judge) if judge else None, lora)
        head = head.to(next(model.parameters()).device)
    for role in cast.values():
        role.head.to(next(model.parameters()).device).requires_grad_(False)
    # PEFT makes the newest adapter the trained one; here it is fixed, once and for all.
    for name, parameter in model.named_parameters():
        parameter.requires_grad = belongs(name, TRAINED) or (critic == "adapter" and belongs(name, CRITIC))
    keep_fp32(model)
    return Actors(model, mode=mode, rewards=cast, critic=critic, value_head=head)


def _check_head(model: PeftModel) -> None:
    """Log-probabilities are taken from the base's own head: what an adapter adds to it would be sampled, not learnt."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(base_of(model).get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "this adapter is on the LM head (lm_head) as well, which PPO leaves as it is",
            where="model.adapter",
            fix="begin with an adapter that is on the layers only, as adapter.targets: all-linear makes it",
        )


def _cast_reward(model: PeftModel, folder: Path, name: str, family: Family) -> RewardRole:
    stats = read_stats(folder)
    check_stats(stats, family, str(folder))
    width = base_of(model).config.get_text_config().hidden_size
    head = open_head(folder, width)
    add_saved(model, folder, name)
    return RewardRole(name, head.eval(), stats)


def _cast_critic(model: PeftModel, reward: Path | None, lora: Mapping[str, Any]) -> None:
    """The critic's adapter: a copy of the reward model's, or a new one, which changes nothing at first."""
    from peft import LoraConfig

    if reward is not None:
        add_saved(model, reward, CRITIC)
    else:
        model.add_adapter(CRITIC, LoraConfig(**lora))


def _value_head(width: int, reward: RewardRole | None, normalize: bool) -> RewardHead:
    """A head that says 0 everywhere; or the reward model's, scaled as its rewards are."""
    head = RewardHead(width)
    with torch.no_grad():
        if reward is None:
            head.score.weight.zero_()
            return head
        mean, std = scale_of(reward.stats) if normalize else (0.0, 1.0)
        head.score.weight.copy_(reward.head.score.weight / std)
        head.score.bias.copy_((reward.head.score.bias - mean) / std)
    return head


def _refuse_other_role(model: PeftModel, adapters: list[str]) -> Any:
    def check(gradient: torch.Tensor) -> None:
        now = speaking(model)
        if now != adapters:
            raise RuntimeError(
                f"the backward pass of the role {adapters or 'base'} began while the model spoke as {now or 'base'}: "
                "its gradients would be wrong; run the backward pass before switching"
            )

    return check
