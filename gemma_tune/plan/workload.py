"""What decides about the memory of a run, apart from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gemma_tune.plan.stages import sequences, unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What PPO holds beside the policy and its reference, and how it draws responses.

    Attributes:
        critic: what it is; None where the estimator needs none.
        critic_rank, critic_targets: of its adapter; rank 0 where it is a head.
        rewards: (rank, targets) of each reward model's adapter.
        together: responses that are drawn at a time.
        prompt: tokens of a prompt at most.
    """

    critic: Literal["adapter", "head"] | None
    critic_rank: int
    critic_targets: str
    rewards: tuple[tuple[int, str], ...]
    together: int
    prompt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What decides about memory, apart from the model's shape.

    Attributes:
        device: `cpu` or `cuda`.
        quantization, double_quantization: how the linear layers are held.
        weight_bytes: bytes of a weight that is not quantised (4 for the fp32 masters of a full fine-tune).
        compute_bytes: bytes of an activation, `d`.
        autocast: whether torch.autocast casts (then adapters compute in `d` as well).
        rank: of LoRA; 0 for a full fine-tune.
        targets: LoRA preset, a key of `Parameters.lora_per_rank`.
        dropout: whether LoRA's dropout is above 0.
        dora: whether LoRA is weight-decomposed.
        optimizer: name that SFTConfig's `optim` takes.
        rows, length: rows in one pass, and tokens in a sequence.
        masked: whether attention sees a mask of length x length (packed rows, or padding).
        attention: attention implementation.
        checkpointing: whether activations are recomputed.
        world_size: processes that train together.
        shards: processes that hold one copy of the model between them (FSDP2); 0 where each holds a whole one.
        reshard: whether a gathered layer is dropped after its forward pass.
        offload: whether the parts are kept in the computer's memory.
        stage: the recipe's; in `reward` and `dpo` a row is a pair of two sequences.
        frozen_rank, frozen_targets: of a second adapter that is not trained: the reference of DPO, KTO and PPO, or what
            a new adapter stands on; rank 0 where there is none.
        roles: of PPO; None in other stages.
    """

    device: Literal["cpu", "cuda"]
    quantization: Literal["nf4", "int8", "none"]
    double_quantization: bool
    weight_bytes: int
    compute_bytes: int
    autocast: bool
    rank: int
    targets: str
    dropout: bool
    dora: bool
    optimizer: str
    rows: int
    length: int
    masked: bool
    attention: str
    checkpointing: bool
    world_size: int
    shards: int = 0
    reshard: bool = True
    offload: bool = False
    stage: Literal["sft", "reward", "dpo", "kto", "ppo"] = "sft"
    frozen_rank: int = 0
    frozen_targets: str = "all-linear"
    roles: Roles | None = None

    @property
    def sequences(self) -> int:
        """Sequences in one pass."""
        return self.rows * sequences(self.stage)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def unit(self) -> str:
        """What a row is called."""
        return unit(self.stage)

    @property
    def sequences_text(self) -> str:
        """How the sequences of a pass come about, for formulas."""
        return str(self.rows) if self.sequences == self.rows else f"{self.rows} pairs x 2"
