"""How the responses of a step are cut into passes, and the passes of policy, reference and critic over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gemma_tune.models.actors import Actors
from gemma_tune.models.reward import base_of
from gemma_tune.train.loss_head import FrozenHeadLogProbs
from gemma_tune.train.ppo.types import Pass, Rollout

Plan = list[list[list[list[int]]]]
"""epochs x minibatches x passes x rows."""


def arrange(lengths: Sequence[int], *, epochs: int, minibatches: int, micro: int, seed: int) -> Plan:
    """Which responses are learnt from together.

    In each epoch the responses are dealt out anew to the minibatches. Within one they stand longest first, so that a
    pass has little padding; what a minibatch holds does not depend on `micro`.

    Args:
        lengths: tokens of each prompt with its response.
        epochs, minibatches: optimizer steps an epoch.
        micro: responses in a pass, at most.
        seed: of the dealing.
    """
    draw = torch.Generator().manual_seed(seed)
    plan: Plan = []
    for _ in range(epochs):
        order = torch.randperm(len(lengths), generator=draw).tolist()
        dealt = [order[place::minibatches] for place in range(minibatches)]
        plan.append([_cut(sorted(rows, key=lambda row: (-lengths[row], row)), micro) for rows in dealt])
    return plan


def _cut(rows: list[int], micro: int) -> list[list[int]]:
    return [rows[start : start + micro] for start in range(0, len(rows), micro)]


def collate(rollout: Rollout, rows: Sequence[int], pad_id: int, device: torch.device | str = "cpu") -> Pass:
    """The responses `rows` of a rollout as one pass."""
    whole = [[*rollout.prompts[row], *rollout.responses[row]] for row in rows]
    longest = max(map(len, whole))
    input_ids = torch.full((len(rows), longest), pad_id)
    mask, places = torch.zeros_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    for place, (row, ids) in enumerate(zip(rows, whole, strict=True)):
        input_ids[place, : len(ids)] = torch.tensor(ids)
        mask[place, : len(ids)] = 1
        places[place, len(rollout.prompts[row]) - 1 : len(ids) - 1] = True
    labels = torch.tensor([token for row in rows for token in rollout.responses[row]])
    found = (torch.tensor(list(rows)), input_ids, mask, places, labels)
    return Pass(*(tensor.to(device) for tensor in found))


def spread(flat: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[N] -> [b, T], zeros outside of `mask`; with a gradient."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def log_probs_of(
    actors: Actors, adapters: Sequence[str], one: Pass, *, temperature: float, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of policy or reference at the response tokens: (log p [N], entropy [N], hidden states [N, D]).

    Both are those of softmax(logits / temperature) over the whole vocabulary. The logits are never held but for a tile
    (`train.loss_head`); the entropy has a gradient where `with_entropy` says so.
    """
    hidden = actors.hidden(adapters, one.input_ids, one.attention_mask, one.places)
    base = base_of(actors.model)
    softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    weight = base.get_output_embeddings().weight
    scored = FrozenHeadLogProbs.apply(hidden, weight, one.labels, softcap, temperature, with_entropy)
    return scored[0], scored[1], hidden
