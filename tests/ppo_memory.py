"""What PPO's four roles cost on the real Gemma 3 270M in NF4: `python -m tests.ppo_memory FOLDER KIND`.

KIND is one of

    one       the base with one training adapter: a policy's pass, its backward pass, and the optimizer's step
    roles     policy, reference, reward model and critic on one base: a whole step of PPO on the same responses
    models    the same four roles on four bases

Prints `{"held": bytes of all weights, gradients and optimizer states, "peak": peak resident bytes above what the
process had before the first base was loaded}`. One process measures one kind: what was freed is not given back.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.actors import CRITIC, Actors, RewardRole
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach, keep_fp32
from gemma_tune.models.reward import RewardHead, base_of
from gemma_tune.models.roles import REFERENCE, TRAINED
from gemma_tune.train.ppo.advantages import gae, whiten
from gemma_tune.train.ppo.losses import policy_terms, value_terms
from gemma_tune.train.ppo.passes import collate, log_probs_of, spread
from gemma_tune.train.ppo.rewards import token_rewards
from gemma_tune.train.ppo.types import Rollout
from gemma_tune.train.provenance import peak_memory

FAMILY = FAMILIES["gemma3_text"]
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": FAMILY.lora_targets["all-linear"], "task_type": "CAUSAL_LM"}
RESPONSES, PROMPT, LENGTH = 16, 96, 32


def actors(folder: Path, adapters: list[str], critic: bool) -> Actors:
    """A base with these adapters; the policy's and the critic's are trained."""
    from peft import LoraConfig

    base = load_base({"name": str(folder), "dtype": "bfloat16"}, NF4, FAMILY)
    model: Any = attach(base, LORA, FAMILY)
    for name in adapters:
        model.add_adapter(name, LoraConfig(**LORA))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f".{TRAINED}." in name or (critic and f".{CRITIC}." in name)
    keep_fp32(model)
    head = RewardHead(base_of(model).config.hidden_size)
    rewards = {"r": RewardRole("reward", head.requires_grad_(False), {})} if "reward" in adapters else {}
    value_head = RewardHead(base_of(model).config.hidden_size) if critic else None
    return Actors(model, rewards=rewards, critic="adapter" if critic else None, value_head=value_head)


def step(policy: Actors, reference: Actors | None, reward: Actors | None, critic: Actors | None) -> list[Any]:
    """A step of PPO with the roles that are given; returns the optimizers. All may be one."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 200_000, (RESPONSES, PROMPT + LENGTH), generator=draw).tolist()
    rollout = Rollout([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids], torch.ones(RESPONSES).bool())
    one, mask = collate(rollout, range(RESPONSES), FAMILY.pad_id), rollout.mask
    with torch.no_grad():
        old = spread(log_probs_of(policy, policy.policy, one, temperature=1.0)[0], mask)
        told = old
        scores, values = torch.zeros(RESPONSES), torch.zeros(mask.shape)
        if reference is not None:
            told = spread(log_probs_of(reference, [REFERENCE], one, temperature=1.0)[0], mask)
        if reward is not None:
            scores = reward.rate("r", one.input_ids, one.attention_mask)
        if critic is not None:
            values = spread(critic.values(one.input_ids, one.attention_mask, one.places), mask)
    rewards = token_rewards(scores, old, told, mask, coefficient=0.05)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    new = spread(log_probs_of(policy, policy.policy, one, temperature=1.0)[0], mask)
    policy_terms(new, old, whiten(advantages, mask), mask, clip=0.2).loss.backward()
    optimizers = [torch.optim.AdamW(policy.policy_parameters())]
    if critic is not None:
        found = spread(critic.values(one.input_ids, one.attention_mask, one.places), mask)
        value_terms(found, values, returns, mask, clip=0.2).loss.backward()
        optimizers.append(torch.optim.AdamW(critic.critic_parameters()))
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def held_bytes(all_actors: list[Actors], optimizers: list[Any]) -> int:
    """Bytes of all storages that weights, gradients and optimizer states live in, each once."""
    tensors: list[torch.Tensor] = []
    for one in all_actors:
        tensors += [*one.model.parameters(), *one.model.buffers()]
        for parameter in one.model.parameters():
            state = getattr(parameter, "quant_state", None)
            while state is not None:  # the constants, and those of the constants
                tensors += [state.absmax, state.code]
                state = state.state2 if state.nested else None
        for head in (one.value_head, *(role.head for role in one.rewards.values())):
            tensors += [] if head is None else list(head.parameters())
    tensors += [parameter.grad for parameter in list(tensors) if getattr(parameter, "grad", None) is not None]
    for optimizer in optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def main(folder: Path, kind: str) -> dict[str, int]:
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    if kind == "one":
        whole = [actors(folder, [], critic=False)]
        optimizers = step(whole[0], None, None, None)
    elif kind == "roles":
        whole = [actors(folder, [REFERENCE, "reward", CRITIC], critic=True)]
        optimizers = step(*whole * 4)
    else:
        names: list[tuple[list[str], bool]] = [([], False), ([REFERENCE], False), (["reward"], False), ([CRITIC], True)]
        whole = [actors(folder, adapters, critic) for adapters, critic in names]
        optimizers = step(*whole)
    peak = peak_memory()["rss"] - before
    return {"held": held_bytes(whole, optimizers), "peak": peak}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
