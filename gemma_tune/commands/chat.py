"""`gemma-tune chat`: talk to a run, an adapter, a model folder, a GGUF file or a hub model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.gemma.chat import render_prompt
from gemma_tune.gemma.conversation import Conversation, Message

if TYPE_CHECKING:
    from gemma_tune.gemma.families import Family
    from gemma_tune.models.tokenizer import GemmaEncoder

HELP = "/new starts over, /quit ends (or Ctrl-D)"


def run(target: str, prompts: Sequence[str], max_new_tokens: int, system: str | None = None) -> int:
    """Answer `prompts`, each by itself, or talk until the user leaves.

    Args:
        target: run folder, adapter folder, model folder, GGUF file, hub id or packaged weights.
        prompts: user turns; empty for a conversation on the terminal.
        max_new_tokens: tokens in an answer at most.
        system: system turn; folded into the first user turn where the generation has none.
    """
    from gemma_tune.commands.train import quieten
    from gemma_tune.models.saved import load_run
    from gemma_tune.models.tokenizer import GemmaEncoder

    quieten()
    model, tokenizer, family = load_run(target)
    encoder = GemmaEncoder(tokenizer, family)
    if prompts:
        _answer_all(model, tokenizer, family, encoder, prompts, max_new_tokens, system)
    else:
        _talk(model, tokenizer, family, encoder, max_new_tokens, system)
    return 0


def _answer_all(
    model: Any,
    tokenizer: Any,
    family: Family,
    encoder: GemmaEncoder,
    prompts: Sequence[str],
    max_new_tokens: int,
    system: str | None,
) -> None:
    from gemma_tune.train.evaluate import answers

    asked = [Conversation((*_opening(system), Message("user", text))) for text in prompts]
    ids = [render_prompt(conversation, family, encoder) for conversation in asked]
    for text, answer in zip(
        prompts, answers(model, tokenizer, family, ids, max_new_tokens=max_new_tokens), strict=True
    ):
        if len(prompts) > 1:
            console.out(f"> {console.printable(text)}")
        console.out(console.printable(answer.text))


def _opening(system: str | None) -> tuple[Message, ...]:
    return (Message("system", system),) if system else ()


def _talk(
    model: Any, tokenizer: Any, family: Family, encoder: GemmaEncoder, max_new_tokens: int, system: str | None
) -> None:
    """One conversation on the terminal; each answer appears while it is written."""
    console.out(HELP)
    opening = _opening(system)
    turns: tuple[Message, ...] = ()
    for text in _typed():
        if text == "/new":
            turns = ()
            continue
        asked = (*turns, Message("user", text))
        ids = render_prompt(Conversation((*opening, *asked)), family, encoder)
        answer = _stream(model, tokenizer, family, ids, max_new_tokens)
        turns = (*asked, Message("model", answer))


def _typed() -> Iterator[str]:
    """What the user types, line by line, until the end of input or /quit. Empty lines are skipped."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if text in ("/quit", "/exit"):
            return
        if text:
            yield text


def _stream(model: Any, tokenizer: Any, family: Family, ids: list[int], max_new_tokens: int) -> str:
    """Print the answer piece by piece and return it."""
    import torch
    from transformers import TextStreamer

    from gemma_tune.train.evaluate import eval_mode, greedy, lent_settings, read_answer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # Text of a model may hold anything: escape what would drive the terminal.
            print(console.escaped(text), end="\n" if stream_end else "", flush=True)

    device = next(model.parameters()).device
    prompt = torch.tensor([ids], device=device)
    settings = greedy(family, max_new_tokens)
    with eval_mode(model), lent_settings(model, settings):
        made = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return read_answer(made[0, len(ids) :].tolist(), tokenizer, family).text
