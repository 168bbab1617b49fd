"""How well a model does on rows it never saw: loss over trained tokens, and whether its answers end by themselves.

Nothing here draws a random number: evaluating more or less often does not change the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from gemma_tune.gemma.chat import Encoder, render_prompt
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Example, Judged, Message
from gemma_tune.gemma.families import Family

DOCUMENT_PROMPT_WORDS = 6
"""A plain document has no user turn: its first words are the prompt."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Loss of held-out rows. Each trained token weighs the same, however rows are batched or padded.

    Attributes:
        loss: mean of -log p over the trained tokens, in nats.
        token_accuracy: share of trained tokens that are the model's first guess.
        tokens: trained tokens.
        rows: rows that were read.
    """

    loss: float
    token_accuracy: float
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        return {"loss": self.loss, "perplexity": self.perplexity, "token_accuracy": self.token_accuracy}

    def to_json(self) -> dict[str, Any]:
        """What stands in run.json."""
        return self.metrics() | {"tokens": self.tokens, "rows": self.rows}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: without the stop token.
        ended: whether it stopped by a stop token of its own.
        tokens: how many, that stop token among them.
        ids: the tokens that `tokens` counts.
        score: what the recipe's reward says of it, where the stage has one.
    """

    text: str
    ended: bool
    tokens: int
    ids: tuple[int, ...] = ()
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for live samples.

    Attributes:
        label: how it is shown.
        example: a conversation that ends with a user turn, or the beginning of a document.
        held_out: whether it comes from a held-out row.
        reference: what that row says next; empty where unknown.
    """

    label: str
    example: Example
    held_out: bool = False
    reference: str = ""

    def conversation(self) -> Conversation:
        """The prompt as turns; a document is taken for what a user says."""
        if isinstance(self.example, Document):
            return Conversation((Message("user", self.example.text),))
        return self.example


def held_out_loss(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, torch.Tensor]],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    stop: Callable[[], bool] = lambda: False,
    each: Callable[[Sequence[int], torch.Tensor], None] = lambda numbers, sums: None,
) -> HeldOut | None:
    """Token-weighted loss and accuracy of `rows`.

    Args:
        model: with a fused head (`trl.trainer.utils.add_fused_lm_head`): it scores labels without holding the logits.
        rows: with `input_ids` and `labels` (-100 where a token is not counted), not packed.
        collate: rows -> tensors of one batch.
        batch_size: rows in one forward pass; rows of similar length go together, the longest first.
        rank, world_size: of this process. Each scores its share.
        total: adds a tensor up over all processes.
        stop: asked before each batch; True gives up and returns None.
        each: gets the row numbers of each batch of this process and what they add up to, [rows, 3]: sum of
            log-probabilities, first guesses that are right, trained tokens.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    with eval_mode(model):
        for chosen, counts in shares([len(row["input_ids"]) for row in rows], batch_size, rank, world_size):
            if stop():
                return None
            part = _score(model, collate([rows[index] for index in chosen]))
            each(chosen, part)
            if counts:
                sums += part.sum(0)
    log_prob, correct, tokens = total(sums).tolist()
    if not tokens:
        return None
    return HeldOut(-log_prob / tokens, correct / tokens, int(tokens), len(rows))


def shares(lengths: Sequence[int], batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[list, bool]]:
    """The batches of one process, longest rows first: (row numbers, whether they count).

    Each process gets as many batches as any other, and in each turn batches of one size: what waits for all processes
    (a sharded model, TRL's metrics) does not wait for ever. A batch that another process has as well counts there.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    whole = len(order) // batch_size
    for turn in range(math.ceil(whole / world_size)):
        place = turn * world_size + rank
        start = place % whole * batch_size
        yield order[start : start + batch_size], place < whole
    if rest := order[whole * batch_size :]:
        yield rest, rank == 0


def _score(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of each row: sum of log-probabilities, first guesses that are right, trained tokens; [rows, 3] fp64."""
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) for key, value in batch.items()}, fused_lm_head=True)
    found = (output.log_probs, output.is_top1, output.label_mask)
    return torch.stack([value.double().sum(1).cpu() for value in found], dim=1)


def answers(
    model: Any,
    tokenizer: Any,
    family: Family,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    stop: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Greedy answers to `prompts` (token ids that end with the generation prompt), in their order.

    Batched, padded on the left, with the KV cache, in evaluation mode; the model's mode is restored.

    Args:
        max_new_tokens: tokens in an answer at most, the stop token included.
        batch_size: prompts that are answered together.
        stop: asked before each batch; where it says True the answers so far are returned.
    """
    settings = greedy(family, max_new_tokens)
    found: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with eval_mode(model), lent_settings(model, settings):
        for start in range(0, len(order), batch_size):
            if stop():
                break
            chosen = order[start : start + batch_size]
            ids, mask = pad_left([prompts[index] for index in chosen], family.pad_id)
            device = next(model.parameters()).device
            made = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings)
            for index, row in zip(chosen, made[:, ids.shape[1] :].tolist(), strict=True):
                found[index] = read_answer(row, tokenizer, family)
    return [found[index] for index in range(len(prompts)) if index in found]


def greedy(family: Family, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding with the KV cache that ends at every stop token of the generation."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(family.stop_ids),
        pad_token_id=family.pad_id,
        bos_token_id=family.bos_id,
        use_cache=True,
    )


def read_answer(ids: Sequence[int], tokenizer: Any, family: Family) -> Answer:
    """The answer in generated `ids`: everything before the first stop token."""
    for place, token in enumerate(ids):
        if token in family.stop_ids:
            text = tokenizer.decode(list(ids[:place]), skip_special_tokens=True)
            return Answer(text, True, place + 1, tuple(ids[: place + 1]))
    return Answer(tokenizer.decode(list(ids), skip_special_tokens=True), False, len(ids), tuple(ids))


def stop_rate(found: Sequence[Answer]) -> float | None:
    """Share of answers that ended by themselves; None where there is no answer."""
    return sum(answer.ended for answer in found) / len(found) if found else None


# --- prompts --------------------------------------------------------------------------------------------------------


def sample_prompts(texts: Sequence[str], held_out: Sequence[Example | Answered], count: int) -> list[Prompt]:
    """The fixed prompts of the recipe, then the first user turns of `count` held-out rows, none of them twice.

    Where the held-out rows are plain documents, the fixed prompts are beginnings of documents too.
    """
    documents = bool(held_out) and all(isinstance(example, Document) for example in held_out)
    fixed = [Prompt(text, Document(text) if documents else Conversation((Message("user", text),))) for text in texts]
    chosen: list[Prompt] = []
    for example in held_out:
        if len(chosen) == count:
            break
        prompt = prompt_of(example)
        # Real dialogues often open with the same words, and the answer to the same prompt says nothing new.
        if prompt is not None and all(prompt.example != other.example for other in fixed + chosen):
            chosen.append(prompt)
    return fixed + chosen


def prompt_of(example: Example | Answered) -> Prompt | None:
    """The first user turn of a held-out row (with the system turn before it); None where it has no user turn.

    Of a pair or a judged answer the whole prompt, and as what could come next the answer that was found good. A
    conversation that ends before an answer is itself the prompt.
    """
    if isinstance(example, Answered):
        last, better = example.prompt[-1].content, next(iter(example.answers.values())).content
        if isinstance(example, Judged) and not example.good:
            better = ""
        return Prompt(last, example.conversation(), held_out=True, reference=better)
    if isinstance(example, Document):
        words = example.text.split(" ")
        head = " ".join(words[:DOCUMENT_PROMPT_WORDS])
        rest = " ".join(words[DOCUMENT_PROMPT_WORDS:])
        return Prompt(head, Document(head), held_out=True, reference=rest) if rest else None
    if example.messages and example.messages[-1].role in ("user", "tool"):
        return Prompt(example.messages[-1].content, example, held_out=True)
    for place, message in enumerate(example.messages):
        if message.role == "user":
            following = example.messages[place + 1 : place + 2]
            asked = Conversation(example.messages[: place + 1], tools=example.tools, thinking=example.thinking)
            return Prompt(message.content, asked, held_out=True, reference=following[0].content if following else "")
    return None


def prompt_ids(prompts: Sequence[Prompt], family: Family, encoder: Encoder) -> list[list[int]]:
    """Token ids of each prompt as they stand at inference."""
    found = []
    for prompt in prompts:
        if isinstance(prompt.example, Document):
            found.append([family.bos_id, *encoder.encode([prompt.example.text])[0]])
        else:
            found.append(list(render_prompt(prompt.example, family, encoder)))
    return found


# --- small parts ----------------------------------------------------------------------------------------------------


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients; each module's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def lent_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Lend the model `settings`: its own sampling defaults (top_k, top_p) would be mixed in otherwise."""
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = owner.generation_config
    owner.generation_config = settings
    try:
        yield
    finally:
        owner.generation_config = own


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([rows, longest] ids, the same shape of 0/1): each row ends at the right edge."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
