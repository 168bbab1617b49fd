"""An artefact, opened as its users open it, against the adapter on its base in fp32: what both write, greedily.

Greedy text shows what matters to a user and what single logits do not: a wrong tokenizer, template or cache. A model
that was rounded to fewer bits may choose another word where two are equally likely; how near the reference's two best
words were is said beside each place where texts part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gemma_tune.errors import GemmaTuneError
from gemma_tune.export.proof import PROMPTS
from gemma_tune.gemma.families import Family

if TYPE_CHECKING:
    import torch

    from gemma_tune.export.llama import LlamaModel

TOKENS = 48
"""Tokens that are compared for each prompt, whether or not the model would have stopped."""
_SIXTEEN = (0.5, 0.01)
LIMITS = {
    **dict.fromkeys(("f32", "float32"), (1e-3, 1e-4)),
    **dict.fromkeys(("f16", "bf16", "float16", "bfloat16"), _SIXTEEN),
    "q8_0": (1.0, 0.05),
}
"""Type -> (lead, mean KL of the first token), in nats, above which texts that part are no rounding any more.

Measured on the 270M: F32 parts nowhere, KL 5e-7. BF16 parts where the lead is 0.05, KL 2.5e-4. Q8_0 parts where it is
0.2, KL 0.012 in llama.cpp, which also rounds activations to 8 bits. A wrong norm, rope or template is at 1 and above.
Fewer bits change what a model says, and are reported only.
"""

Engine = Literal["transformers", "llama.cpp"]


class Speaker(Protocol):
    """Whatever can be asked: token ids in, token ids and log-probabilities out."""

    def greedy(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """The `count` tokens behind each row, each the most likely."""

    def log_probs(self, ids: Sequence[int]) -> Any:
        """Log-probabilities of the next token, [V]."""


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a text left the reference's.

    Attributes:
        prompt: number of the prompt, from 0.
        token: number of the first other token, from 0.
        margin: how much more likely the reference's best token was than its second there, in nats.
    """

    prompt: int
    token: int
    margin: float


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found.

    Attributes:
        artefact: name of what was opened.
        engine: what opened it.
        kind: type of its weights.
        tokens: how many were compared for each prompt.
        equal: for each prompt, how many tokens were the reference's before the first other one.
        partings: where texts left the reference's.
        mean_kl, largest_kl: KL(reference || artefact) of the first token behind each prompt, in nats.
    """

    artefact: str
    engine: Engine
    kind: str
    tokens: int
    equal: tuple[int, ...]
    partings: tuple[Parting, ...]
    mean_kl: float
    largest_kl: float

    def excess(self) -> str | None:
        """What is more than rounding to this type explains; None where nothing is."""
        if self.kind not in LIMITS:
            return None
        lead, kl = LIMITS[self.kind]
        wide = max((one for one in self.partings if not one.margin <= lead), key=lambda one: one.margin, default=None)
        if wide is not None:
            return (
                f"prompt {wide.prompt} ({PROMPTS[wide.prompt]!r}) goes on with another token at {wide.token}, where "
                f"the best one led by {wide.margin:.2g} nats (rounding to {self.kind} explains {lead:g})"
            )
        if not self.mean_kl <= kl:  # NaN is refused too
            return f"the first token's KL is {self.mean_kl:.2g} nats (rounding to {self.kind} explains {kl:g})"
        return None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reference:
    """What base + adapter write.

    Attributes:
        rows: the prompts.
        texts: the tokens behind each.
        margins: for each, how much more likely the best token was than the second, in nats, token by token.
        first: log-probabilities of the first token, [V] fp64 each.
    """

    rows: Sequence[Sequence[int]]
    texts: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    first: tuple[Any, ...]


class TransformersSpeaker:
    """A model of transformers, in fp32.

    Args:
        model: in evaluation mode.
        family: its generation.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model, self._family = model, family

    def greedy(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [text for text, _ in self.scored(rows, count)]

    def scored(self, rows: Sequence[Sequence[int]], count: int) -> list[tuple[list[int], list[float]]]:
        """For each row its tokens, and by how many nats each was more likely than the second best.

        All rows together: a pass of one token reads all weights, whatever the number of rows.
        """
        from gemma_tune.train.evaluate import eval_mode, lent_settings, pad_left

        ids, mask = pad_left(rows, self._family.pad_id)
        device = next(self._model.parameters()).device
        settings = endless_settings(self._family, count)
        with eval_mode(self._model), lent_settings(self._model, settings):
            made = self._model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        texts = made.sequences[:, ids.shape[1] :].tolist()
        margins = [[_margin(step[row]) for step in made.scores] for row in range(len(texts))]
        return list(zip(texts, margins, strict=True))

    def log_probs(self, ids: Sequence[int]) -> torch.Tensor:
        import torch

        prompt = torch.tensor([list(ids)], device=next(self._model.parameters()).device)
        with torch.inference_mode():
            return self._model(input_ids=prompt, use_cache=False).logits[0, -1].double().log_softmax(-1).cpu()


class LlamaSpeaker:
    """A GGUF file that is open in llama.cpp."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model

    def greedy(self, rows: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        return [self._model.greedy(row, count) for row in rows]

    def log_probs(self, ids: Sequence[int]) -> Any:
        return self._model.log_probs(ids)


def endless_settings(family: Family, count: int) -> Any:
    """Greedy decoding of exactly `count` tokens: nothing ends it."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=family.pad_id,
        bos_token_id=family.bos_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_scores=True,
    )


def _margin(scores: torch.Tensor) -> float:
    best = scores.float().topk(2).values
    return float(best[0] - best[1])


def listen(model: Any, family: Family, rows: Sequence[Sequence[int]], tokens: int = TOKENS) -> Reference:
    """What `model` writes behind each row: the reference of any number of verifications."""
    speaker = TransformersSpeaker(model, family)
    spoken = speaker.scored(rows, tokens)
    return Reference(
        rows,
        tuple(tuple(text) for text, _ in spoken),
        tuple(tuple(margins) for _, margins in spoken),
        tuple(speaker.log_probs(row) for row in rows),
    )


def verify(reference: Reference, speaker: Speaker, *, artefact: str, engine: Engine, kind: str) -> Verification:
    """Let `speaker` answer the reference's prompts and compare."""
    equal: list[int] = []
    partings: list[Parting] = []
    kls: list[float] = []
    spoken = speaker.greedy(reference.rows, len(reference.texts[0]))
    for number, (row, text, made) in enumerate(zip(reference.rows, reference.texts, spoken, strict=True)):
        same = next((place for place, pair in enumerate(zip(text, made, strict=True)) if pair[0] != pair[1]), len(text))
        equal.append(same)
        if same < len(text):
            partings.append(Parting(number, same, reference.margins[number][same]))
        kls.append(kl_of(reference.first[number], speaker.log_probs(row)))
    tokens = len(reference.texts[0])
    return Verification(artefact, engine, kind, tokens, tuple(equal), tuple(partings), sum(kls) / len(kls), max(kls))


def kl_of(reference: Any, other: Any) -> float:
    """KL(reference || other) of two vectors of log-probabilities, in nats.

    The shorter one counts: a GGUF may lack the rows of image placeholders, which no text reaches.
    """
    import torch

    length = min(len(reference), len(other))
    p, q = torch.as_tensor(reference)[:length].double(), torch.as_tensor(other)[:length].double()
    kl = float((p.exp() * (p - q)).sum())
    return 0.0 if -1e-9 < kl < 0 else kl  # NaN stays NaN


def check_verification(found: Verification, where: Path | str) -> None:
    """Refuse an artefact that writes other texts than rounding to its type explains.

    Raises:
        GemmaTuneError: it does.
    """
    excess = found.excess()
    if excess is not None:
        raise GemmaTuneError(
            f"{found.engine} with {found.artefact} does not say what the adapter on its base does: {excess}; "
            "nothing was written",
            where=str(where),
            fix="report it: this is a bug of ours, or of what opened the file",
        )


def lines_of(found: Verification, reference: str = "base + adapter") -> list[str]:
    """The report as it is printed.

    Args:
        reference: what it was compared with.
    """
    whole = sum(count == found.tokens for count in found.equal)
    lines = [
        f"{found.engine} on {found.artefact}: {whole} of {len(found.equal)} prompts give {found.tokens} of "
        f"{found.tokens} tokens of {reference}; first-token KL {found.mean_kl:.2g} nats on average, "
        f"{found.largest_kl:.2g} at most"
    ]
    lines += [
        f"  prompt {one.prompt}: other from token {one.token} on, where the two best were {one.margin:.2g} nats apart"
        for one in found.partings
    ]
    return lines


def summary_of(found: Sequence[Verification]) -> Mapping[str, Any]:
    """For a card: figures under the name of the engine."""
    return {
        one.engine: {
            "equal_tokens": sum(one.equal),
            "compared_tokens": one.tokens * len(one.equal),
            "mean_first_token_kl": one.mean_kl,
        }
        for one in found
    }
