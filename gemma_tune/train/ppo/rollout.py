"""Rollout: the policy answers prompts, in batches padded on the left, with the KV cache.

The seam for another engine (vLLM, say): whatever makes a `Rollout` of prompts can stand in for `roll_out`. The
log-probabilities that PPO needs are never taken from the engine but recomputed by the forward pass of the training, so
that the first ratio is 1; an engine whose samples come from other probabilities would need importance weights as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import GenerationConfig

from gemma_tune.gemma.families import Family
from gemma_tune.models.actors import Actors
from gemma_tune.models.roles import speak_as
from gemma_tune.train.evaluate import eval_mode, lent_settings, pad_left
from gemma_tune.train.ppo.config import PpoConfig
from gemma_tune.train.ppo.types import Rollout


def sampling(family: Family, config: PpoConfig) -> GenerationConfig:
    """Sampling as the recipe says, and nothing that the checkpoint's own settings would add (top_k 64, top_p 0.95)."""
    return GenerationConfig(
        do_sample=True,
        num_beams=1,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=list(family.stop_ids),
        pad_token_id=family.pad_id,
        bos_token_id=family.bos_id,
        use_cache=True,
    )


def roll_out(
    actors: Actors,
    prompts: Sequence[Sequence[int]],
    family: Family,
    settings: GenerationConfig,
    *,
    conversations: Sequence[list[dict[str, str]]] = (),
    together: int = 64,
    stop: Callable[[], bool] = lambda: False,
) -> Rollout | None:
    """One response of the policy to each prompt, in evaluation mode. Draws from torch's global generator.

    Args:
        actors: speaks as the policy, and does so afterwards.
        prompts: token ids that end with the generation prompt.
        settings: from `sampling`, or greedy.
        conversations: the prompts as reward functions get them.
        together: prompts in a batch at most; those of like length share one.
        stop: asked before each batch; True gives up and returns None.
    """
    responses: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    speak_as(actors.model, actors.policy)
    # Evaluation mode: in training mode a layer that is checkpointed drops the KV cache (transformers 5.23).
    with eval_mode(actors.model), lent_settings(actors.model, settings):
        for start in range(0, len(order), together):
            if stop():
                return None
            chosen = order[start : start + together]
            ids, mask = pad_left([prompts[index] for index in chosen], family.pad_id)
            made = actors.model.generate(
                input_ids=ids.to(actors.device), attention_mask=mask.to(actors.device), generation_config=settings
            )
            for index, row in zip(chosen, made[:, ids.shape[1] :].tolist(), strict=True):
                responses[index] = cut_at_stop(row, family)
    found = [responses[index] for index in range(len(prompts))]
    stopped = torch.tensor([response[-1] in family.stop_ids for response in found])
    return Rollout([list(prompt) for prompt in prompts], found, stopped, conversations)


def cut_at_stop(ids: Sequence[int], family: Family) -> list[int]:
    """Generated ids up to the first stop token of the generation, which stays; what follows is padding."""
    for place, token in enumerate(ids):
        if token in family.stop_ids:
            return list(ids[: place + 1])
    return list(ids)


def body(response: Sequence[int], family: Family) -> list[int]:
    """A response without its stop token."""
    return list(response[:-1] if response and response[-1] in family.stop_ids else response)
