"""What the rollout draws, against what the training reads: `generate` with its cache against the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from gemma_tune.models.actors import Actors, cast_roles
from gemma_tune.models.load import load_base
from gemma_tune.models.lora import attach
from gemma_tune.models.reward import base_of
from gemma_tune.models.roles import speaking
from gemma_tune.train.ppo.passes import arrange
from gemma_tune.train.ppo.rollout import roll_out, sampling
from gemma_tune.train.ppo.trainer import PpoTrainer
from gemma_tune.train.ppo.types import Rollout
from tests.ppo_batches import stir, whole
from tests.ppo_rig import FAMILY, VOCAB, prompts_of, small_actors, small_trainer, wanted_share
from tests.seams.test_trl_seams import family_of_tiny
from tests.tiny import TINY_NAMES

Tiny = Callable[..., Path]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}


@pytest.fixture
def heard() -> Iterator[list[torch.Tensor]]:
    """The logits [B, T, V] behind each batch that any model generates, before temperature, top-k and top-p."""
    from transformers.generation.utils import GenerationMixin

    found: list[torch.Tensor] = []
    own = GenerationMixin.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = own(self, *args, **kwargs, return_dict_in_generate=True, output_logits=True)
        found.append(torch.stack(made.logits, dim=1))
        return made.sequences

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "generate", generate)
        yield found


def drawn_with(rollout: Rollout, logits: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """[B, T] log-probabilities of the responses by the logits of `generate`, zeros behind them."""
    together = len(logits[0])
    order = sorted(range(len(rollout)), key=lambda row: (len(rollout.prompts[row]), row))
    found = torch.zeros(rollout.mask.shape)
    for start, batch in zip(range(0, len(order), together), logits, strict=True):
        for row, of_row in zip(order[start : start + together], batch, strict=True):
            ids = torch.tensor(rollout.responses[row])
            scaled = (of_row[: len(ids)].float() / temperature).log_softmax(-1)
            found[row, : len(ids)] = scaled.gather(-1, ids[:, None])[:, 0]
    return found


def rolled_out(trainer: PpoTrainer, prompts: list[list[int]], seed: int = 0) -> Rollout:
    torch.manual_seed(seed)
    rollout = trainer.roll_out(prompts, [])
    assert rollout is not None
    return rollout


@pytest.mark.parametrize(
    ("sampled", "longest"),
    [
        ({}, 6),
        ({"temperature": 0.7}, 50),  # past the sliding window of 32
        ({"temperature": 1.5, "top_k": 10, "top_p": 0.9}, 50),
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_of_the_cached_rollout_are_those_of_the_training(
    tmp_path: Path, heard: list[torch.Tensor], sampled: dict[str, Any], longest: int, checkpointing: bool
) -> None:
    """To 1e-5 in fp32, also with top-k and top-p: what they leave out still counts as possible."""
    actors = stir(small_actors(), 1)
    trainer = small_trainer(
        tmp_path,
        wanted_share,
        actors=actors,
        max_new_tokens=16,
        per_device_eval_batch_size=64,
        activation_checkpointing=checkpointing,
        **sampled,
    )
    rollout = rolled_out(trainer, prompts_of(96, longest=longest))
    found = trainer.observe(rollout, whole(96, 20)).log_probs
    expected = drawn_with(rollout, heard, sampled.get("temperature", 1.0))
    assert len(heard) == 2 and rollout.stopped.any() and not rollout.stopped.all() and expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY_NAMES)
def test_in_every_generation(tiny: Tiny, tmp_path: Path, heard: list[torch.Tensor], name: str) -> None:
    """Gemma 4 amplifies the rounding of fp32: it is up to 2e-5 from itself already in passes of another size."""
    actors = stir(tiny_actors(tiny, name), 1)
    trainer = small_trainer(tmp_path, lambda _: [], actors=actors, max_new_tokens=24)
    rollout = rolled_out(trainer, some_prompts())
    expected = drawn_with(rollout, heard, 1.0)
    found = trainer.observe(rollout, whole(12, 5)).log_probs
    torch.testing.assert_close(found, expected, atol=1e-4 if name.startswith("gemma4") else 1e-5, rtol=0)
    assert (found - expected).abs().mean() < 3e-6


def tiny_actors(tiny: Tiny, name: str, dtype: str = "float32", quantization: dict[str, Any] | None = None) -> Actors:
    family = family_of_tiny(name)
    model = {"name": str(tiny(name)), "dtype": dtype, "attn_implementation": family.attention[0]}
    lora = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": family.lora_targets["all-linear"]}
    torch.manual_seed(0)  # of A
    return cast_roles(attach(load_base(model, quantization or {}, family), lora, family), family, lora)


def some_prompts() -> list[list[int]]:
    """Of 3 to 25 tokens that the tiny tokenizers know as text."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 25, (12,), generator=draw).tolist()
    return [[2, *torch.randint(240, 900, (length,), generator=draw).tolist()] for length in lengths]


def test_in_bf16_they_differ_by_their_rounding(tiny: Tiny, tmp_path: Path, heard: list[torch.Tensor]) -> None:
    """By 0.08 nats at most and 0.009 on average here; on average by 0.007 to 0.017 in the other tiny generations, and
    by 0.03 in one of experts, where a rounding may choose another expert (measured on a CPU).

    Both round every activation to 8 bits, but not alike: the cached pass multiplies one row at a time, the forward pass
    all of them, and each adds up in another order. That it is no mistake of mask or cache shows in fp32 (above); here
    the gap has no sign, and is no larger than what bf16 itself costs against fp32. An importance ratio would be off by
    some percent from the start: which is why the log-probabilities come from the passes that learn, so that the first
    ratio is exactly 1 in bf16 as well (below).
    """
    found = {}
    for dtype in ("bfloat16", "float32"):
        actors = stir(tiny_actors(tiny, "gemma3_text", dtype), 1)
        trainer = small_trainer(tmp_path, lambda _: [], actors=actors, max_new_tokens=24)
        if dtype == "bfloat16":
            rollout = rolled_out(trainer, some_prompts())
            cached = drawn_with(rollout, heard, 1.0)
        found[dtype] = trainer.observe(rollout, whole(12, 5)).log_probs
    mask = rollout.mask
    gap, cost = (cached - found["bfloat16"])[mask], (found["bfloat16"] - found["float32"])[mask]
    assert gap.abs().max() < 0.3 and gap.abs().mean() < cost.abs().mean()
    assert gap.mean().abs() < 4 * gap.std() / mask.sum().sqrt()


# --- the first ratio


@pytest.mark.parametrize("critic", ["adapter", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_ratio_is_exactly_one(tmp_path: Path, dtype: torch.dtype, checkpointing: bool, critic: str) -> None:
    trainer = small_trainer(
        tmp_path,
        wanted_share,
        actors=stir(small_actors(dtype=dtype, critic=critic), 1),
        size=32,
        micro=8,
        minibatches=2,
        entropy=0.01,
        temperature=0.8,
        critic=critic,
        activation_checkpointing=checkpointing,
    )
    check_first_step(trainer, prompts_of(32))


@pytest.mark.parametrize("quantization", [{}, NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gemma4"])
def test_the_first_ratio_is_exactly_one_on_a_base_in_bf16(
    tiny: Tiny, tmp_path: Path, name: str, quantization: dict[str, Any]
) -> None:
    if quantization:
        quantization = {**quantization, "bnb_4bit_compute_dtype": "bfloat16"}
    actors = stir(tiny_actors(tiny, name, "bfloat16", quantization), 1)
    trainer = small_trainer(tmp_path, lambda _: [], actors=actors, size=12, micro=3, minibatches=2)
    check_first_step(trainer, some_prompts())


def check_first_step(trainer: PpoTrainer, prompts: list[list[int]]) -> None:
    """The first minibatch of the first epoch: ratio 1 and nothing clipped, to the bit. The second one: not."""
    rollout = rolled_out(trainer, prompts)
    lengths = [len(p) + len(r) for p, r in zip(rollout.prompts, rollout.responses, strict=True)]
    micro = trainer.args.per_device_train_batch_size
    plan = arrange(lengths, epochs=1, minibatches=2, micro=micro, seed=0)
    experience = trainer.estimate(trainer.observe(rollout, plan), torch.linspace(-1, 1, len(rollout)))
    first = trainer.learn(rollout, experience, [plan[0][:1]])
    assert first["val/first_ratio_gap"] == 0.0 and first["val/ratio"] == 1.0 == first["val/ratio_max"]
    assert first["policy/clipfrac_avg"] == first["val/clipfrac_avg"] == 0.0 == first["policy/approxkl_avg"]
    second = trainer.learn(rollout, experience, [plan[0][1:]])
    assert second["val/first_ratio_gap"] > 1e-4 and second["policy/approxkl_avg"] > 0


# --- sampling


SHARE_OF_CHANCE = 4.5
"""Standard deviations of a share that chance may make: once in 100,000 words."""


def shares(actors: Actors, trainer_settings: dict[str, Any], count: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """(how often each word was drawn first after one prompt, its probability at temperature 1)."""
    settings = sampling(FAMILY, SimpleNamespace(**{**DRAW, **trainer_settings}))  # type: ignore[arg-type]
    prompt = [2, 17, 23]
    torch.manual_seed(0)
    rollout = roll_out(actors, [prompt] * count, FAMILY, settings, together=count)
    assert rollout is not None
    words = torch.tensor([response[0] for response in rollout.responses])
    with torch.no_grad():
        logits = actors.model(torch.tensor([prompt])).logits[0, -1]
    return torch.bincount(words, minlength=VOCAB) / count, logits


DRAW = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 1}
GREEDY_CHECKPOINT = GenerationConfig(
    do_sample=False, top_k=1, top_p=0.1, min_p=0.5, typical_p=0.2, temperature=0.1, repetition_penalty=5.0,
    no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7], num_beams=1,
)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_checkpoints_own_settings_change_nothing(temperature: float) -> None:
    """With top_k and top_p off the draw is from the whole distribution at the temperature, whatever it says."""
    actors = stir(small_actors(), 1)
    base = base_of(actors.model)
    base.generation_config = GREEDY_CHECKPOINT
    found, logits = shares(actors, {"temperature": temperature})
    probs = (logits / temperature).softmax(-1)
    deviations = (found - probs).abs() / (probs * (1 - probs) / 4096).sqrt()
    assert (deviations[probs > 1e-3] < SHARE_OF_CHANCE).all() and (probs > 1e-3).sum() > 10
    assert base.generation_config is GREEDY_CHECKPOINT, "it has them again"
    assert speaking(actors.model) == actors.policy


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_the_recipes_settings_do(settings: dict[str, Any]) -> None:
    found, logits = shares(stir(small_actors(), 1), settings, 512)
    best = logits.softmax(-1).sort(descending=True)
    reach = settings.get("top_k") or int((best.values.cumsum(0) < settings["top_p"]).sum()) + 1
    assert set(found.nonzero()[:, 0].tolist()) == set(best.indices[:reach].tolist()) and reach < VOCAB / 4


def test_the_size_of_a_batch_and_what_shares_it_do_not_change_the_distribution(heard: list[torch.Tensor]) -> None:
    """Left padding: the logits of a prompt's first word are those that it has alone."""
    actors = stir(small_actors(), 1)
    settings = sampling(FAMILY, SimpleNamespace(**DRAW))  # type: ignore[arg-type]
    prompts = prompts_of(20, longest=50)
    roll_out(actors, prompts, FAMILY, settings, together=64)
    roll_out(actors, prompts, FAMILY, settings, together=1)
    torch.testing.assert_close(heard[0][:, 0], torch.cat(heard[1:])[:, 0], atol=2e-5, rtol=1e-5)


def test_responses_end_with_their_first_stop_token(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, wanted_share, actors=stir(small_actors(), 1), max_new_tokens=12)
    rollout = rolled_out(trainer, prompts_of(256))
    assert 0.02 < rollout.stopped.float().mean() < 0.9
    for response, stopped in zip(rollout.responses, rollout.stopped.tolist(), strict=True):
        assert (response[-1] in FAMILY.stop_ids) == stopped and not set(response[:-1]) & set(FAMILY.stop_ids)
        assert len(response) == 12 or stopped
    assert rollout.prompts == prompts_of(256)
