"""What a plan is made of. JSON-serialisable, no torch object inside, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and the reason for it. `reason` is `recipe` where the user wrote the value down."""

    value: Any
    reason: str


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """One term of the memory estimate, per process. `bytes` is an integer; `formula` says where it comes from."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run needs. The run reads no recipe.

    Attributes:
        stage: the algorithm.
        family: name of the Gemma generation (`gemma.families`).
        machine: name and facts of the machine that it was made for.
        model: keywords of `models.load` (name, revision, tokenizer, text_only, dtype, attn_implementation; and
            residual_exponent where the residual stream is made smaller for fp16).
        quantization: keywords of `transformers.BitsAndBytesConfig`; empty where the base is not quantised.
        lora: keywords of `peft.LoraConfig`; empty for a full fine-tune.
        trainer: keywords of the stage's configuration (`stages.CONFIGS`).
        data: keywords of `data.build.build`, of `data.pairs.build_pairs` where rows are pairs, of
            `data.judged.build_judged`, or of `data.prompts.build_prompts`.
        session: what the run folder, samples, evaluation and tracking need; the adapter that the training begins with;
            whether the loss is scaled; and what a stage's own code needs (`reward`, `precompute_reference`; `rewards`,
            `critic`).
        memory: the estimate, term by term.
        notes: what the user should know before starting: one sentence each.
        refusal: why a run of it would be refused on this machine (it does not fit); empty where it may start.
    """

    stage: str
    family: str
    machine: Mapping[str, Any]
    model: Mapping[str, Choice]
    quantization: Mapping[str, Choice]
    lora: Mapping[str, Choice]
    trainer: Mapping[str, Choice]
    data: Mapping[str, Choice]
    session: Mapping[str, Choice]
    memory: tuple[MemoryTerm, ...] = ()
    notes: tuple[str, ...] = field(default=())
    refusal: str = ""

    def values(self, section: str) -> dict[str, Any]:
        """The bare values of one section, `plan.values("trainer")`: copies, as libraries write into what they get."""
        return {key: deepcopy(choice.value) for key, choice in getattr(self, section).items()}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
