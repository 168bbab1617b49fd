"""A PPO trainer on a small random Gemma, without recipe, data or reward model: for what only the loop can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_tune.gemma.families import FAMILIES, Family
from gemma_tune.models.actors import Actors, cast_roles
from gemma_tune.models.roles import TRAINED
from gemma_tune.train.ppo.config import PpoConfig
from gemma_tune.train.ppo.scores import Scores
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Rollout
from gemma_tune.train.session import RunFolder
from gemma_tune.train.signals import Signals
from gemma_tune.train.trainer import Surroundings

VOCAB = 64
FAMILY: Family = replace(FAMILIES["gemma3_text"], pad_id=0, bos_id=2, turn_end_id=1, stop_ids=(1,))
LORA = {"r": 8, "lora_alpha": 16, "target_modules": FAMILY.lora_targets["all-linear"], "task_type": "CAUSAL_LM"}


def small_gemma(seed: int = 0, dtype: torch.dtype = torch.float32) -> Gemma3ForCausalLM:
    """Two layers, 64 words. Widely spread weights: with the usual 0.02 it would be near uniform and hard to teach."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=32,
        initializer_range=0.25,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return Gemma3ForCausalLM(config).to(dtype).eval()


def small_actors(seed: int = 0, dtype: torch.dtype = torch.float32, **cast: Any) -> Actors:
    """The roles on `small_gemma`: a fresh policy, no reward model, and a critic of its own."""
    model: Any = get_peft_model(small_gemma(seed, dtype), LoraConfig(**LORA), adapter_name=TRAINED)
    return cast_roles(model, FAMILY, LORA, **cast)


def prompts_of(count: int, seed: int = 0, longest: int = 6) -> list[list[int]]:
    """Prompts of 1 to `longest` words."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]


class ScoredBy:
    """A scorer with one function of the rollout."""

    sources = ("function",)

    def __init__(self, score: Callable[[Rollout], Sequence[float]]) -> None:
        self._score = score

    def __call__(self, rollout: Rollout) -> Scores:
        found = torch.tensor(self._score(rollout), dtype=torch.float32)
        return Scores(found, {"function": found})


def small_trainer(
    folder: Path,
    score: Callable[[Rollout], Sequence[float]],
    *,
    actors: Actors | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    micro: int = 64,
    size: int = 64,
    held_out: Sequence[Sequence[int]] = (),
    **changes: Any,
) -> PpoTrainer:
    """A trainer whose reward is `score`. `size`: responses a step; the rest are keywords of PpoConfig."""
    keywords = {
        "learning_rate": 1e-2,
        "critic_learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 30,
        "kl": 0.02,
        "ppo_epochs": 2,
        "minibatches": 2,
        "max_new_tokens": 8,
        "adam_beta2": 0.95,
        "seed": 0,
        **changes,
    }
    config = PpoConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=size // micro,
        **keywords,
    )
    return PpoTrainer(
        actors=actors or small_actors(critic="adapter" if config.has_critic else None),
        scorer=ScoredBy(score),  # type: ignore[arg-type]
        family=FAMILY,
        prompts=[{"prompt_ids": prompt} for prompt in (prompts or prompts_of(256))],
        config=config,
        around=Surroundings(
            folder=RunFolder(folder, resume="never"),
            keep=2,
            identity={},
            signals=Signals(),
            held_out=[{"prompt_ids": prompt} for prompt in held_out],
        ),
    )


def wanted_share(rollout: Rollout) -> list[float]:
    """The share of a response's tokens that are of the last quarter of the vocabulary."""
    return [sum(token >= VOCAB * 3 // 4 for token in response) / len(response) for response in rollout.responses]
