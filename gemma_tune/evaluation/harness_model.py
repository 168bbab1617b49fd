"""A Gemma as lm-evaluation-harness wants a model: HFLM over a model that is open, with prompts through our renderer.

HFLM of lm-eval 0.4.13, given a Gemma, does these things that this class does otherwise. Each of them is measured in
tests/unit/evaluation/test_harness_model.py.

- BOS is up to the tokenizer. One that does not add it (Gemma 4's) is asked without, unless `add_bos_token` is set.
- Rolling log-likelihoods (perplexity tasks) put BOS before text that the tokenizer gave one already: two. Later windows
  of a long text have none.
- What is too long is cut at the left, and the BOS goes first.
- A batch of generations looks at its first prompt to see whether BOS is there already, for all of them.
- Text is tokenised with control tokens in it: a row that spells out a turn end ends the turn.
- Generation stops at what the model's generation_config names, which a base model's does not have.
- Scores are rounded to the type of the model. In bf16 a sum of -40 has steps of 0.25; where choices tie, the first
  wins. (Its option `softmax_dtype=float32` mends that, and this class gives what HFLM gives with it.)
- Logits of the whole vocabulary are made for all tokens of the prompt, and again as log-probabilities.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gemma_tune.gemma.chat import render_prompt
from gemma_tune.gemma.conversation import Conversation, Message
from gemma_tune.gemma.families import Family
from gemma_tune.models.reference import quiet_transformers
from gemma_tune.models.tokenizer import GemmaEncoder

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""What is asked (None for a window of a longer text), ids of the context, ids of what is scored."""

_ROLES = {"system": "system", "user": "user", "assistant": "model"}


class GemmaLM(HFLM):
    """An opened model, its tokenizer and its family, for `lm_eval.simple_evaluate`.

    Text that comes from `apply_chat_template` is a conversation, and is rendered as training renders it; all other text
    is a document, of which the model has read the beginning: BOS and the text. Exactly one BOS in both.

    Attributes:
        truncated: prompts that were longer than the model's context; their beginning was left out, BOS stayed.
    """

    def __init__(self, model: Any, tokenizer: Any, family: Family, *, batch_size: int) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self.family = family
        self.truncated = 0
        self._encoder = GemmaEncoder(tokenizer, family)
        self._rendered: dict[str, tuple[list[int], str]] = {}

    # --- text to ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and nothing in it becomes a control token."""
        return self._encoder.encode([text])[0]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """lm-eval's name for `encode`. BOS is put by who makes a prompt, never here."""
        return self.encode(string)

    def tok_decode(self, tokens: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of a generation, up to the first id at which a Gemma stops; the text of a single id as it is."""
        if isinstance(tokens, int):
            return str(self.tokenizer.decode([tokens], skip_special_tokens=skip_special_tokens))
        ids = list(tokens)
        end = next((at for at, token in enumerate(ids) if token in self.family.stop_ids), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation. What is returned is its JSON, under which the ids are kept.

        A rendered text could not be told from text that spells out the same turns; JSON of the turns can.

        Args:
            chat_history: turns with `role` (system, user, assistant) and `content`.
            add_generation_prompt: False where the last turn is the beginning of the answer (a task's `gen_prefix`).

        Raises:
            UserError: the family's template refuses the turns.
        """
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in chat_history]
        key = json.dumps(turns if add_generation_prompt else [*turns, {"continued": True}], ensure_ascii=False)
        begun = "" if add_generation_prompt else turns.pop()["content"]
        conversation = Conversation(tuple(Message(_ROLES[turn["role"]], turn["content"]) for turn in turns))  # type: ignore[arg-type]
        self._rendered[key] = render_prompt(conversation, self.family, self._encoder), begun
        return key

    def prompt_ids(self, text: str, continuation: str = "") -> tuple[list[int], list[int]]:
        """(ids of the prompt, ids of what follows it), one BOS first.

        Prompt and continuation are read in one piece and cut at the length of the prompt, as lm-eval does: Gemma's
        tokens take the blank before a word with them. An answer in a turn begins without blanks, as the renderer and
        all templates write it.
        """
        if text in self._rendered:
            opening, begun = self._rendered[text]
            head, begun = opening, begun.lstrip()
            tail = continuation if begun else continuation.lstrip() or continuation
        else:
            head, begun, tail = [self.family.bos_id], text, continuation
        blanks = len(begun) - len(begun.rstrip())
        if tail and blanks:
            begun, tail = begun[:-blanks], begun[-blanks:] + tail
        before = self.encode(begun)
        return head + before, self.encode(begun + tail)[len(before) :]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.prompt_ids(context, continuation)

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: BOS, of the family."""
        return self.family.bos_id

    def fitted(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids of a prompt, BOS first."""
        if len(ids) <= room:
            return ids
        self.truncated += 1
        return [self.family.bos_id, *ids[len(ids) - room + 1 :]] if room > 1 else ids[-room:]

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of a generation: (ids, attention mask), both [batch, length], padded at the left."""
        rows = [self.fitted(self.prompt_ids(text)[0], left_truncate_len or self.max_length) for text in strings]
        ids = [torch.tensor(row) for row in rows]
        ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
        return (
            pad_sequence(ids, True, self.family.pad_id, padding_side),
            pad_sequence(ones, True, 0, padding_side),
        )

    # --- the model

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        """As HFLM, and it stops at every id at which this Gemma stops."""
        with quiet_transformers():  # sampling values of the generation_config do not go with greedy decoding
            return super()._model_generate(
                context, max_length, stop, eos_token_id=list(self.family.stop_ids), **generation_kwargs
            )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """As HFLM; the bar is for a terminal."""
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm or _no_terminal()))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM; the bar is for a terminal."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm or _no_terminal()))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts, negative: each token once, in windows that do not overlap, BOS first in each."""
        windows: list[Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            parts = get_rolling_token_windows(
                token_list=self.encode(request.args[0]),
                prefix_token=self.family.bos_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, scored in map(make_disjoint_window, parts):
                first = context[:1] == [self.family.bos_id]
                windows.append((None, context if first else [self.family.bos_id, *context], scored))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm or _no_terminal())
        for owner, (nats, _) in zip(owners, scores, strict=True):
            totals[owner] += nats
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding says the same) of each continuation.

        Rows are sorted and put together as HFLM does it, so that they share a batch with the same rows. Logits are made
        from the first place on that a row of the batch is scored at, and log-probabilities of scored places alone, in
        fp32.
        """
        room = self.max_length + 1
        fitted = [(text, self.fitted(context, room - len(ids)), ids) for text, context, ids in requests]
        collator = Collator(
            fitted,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        found: list[tuple[float, bool]] = []
        bar = tqdm(total=len(fitted), disable=disable_tqdm, desc="log-likelihoods")
        for batch in collator.get_batched(n=override_bs or int(self.batch_size)):
            rows = [torch.tensor(context + ids[:-1]) for _, context, ids in batch]
            inputs = pad_sequence(rows, True, self.family.pad_id).to(self.device)
            kept = max(inputs.shape[1] - len(context) + 1 for _, context, _ in batch)
            logits = self.model(input_ids=inputs, logits_to_keep=kept).logits
            begin = inputs.shape[1] - logits.shape[1]
            for (text, context, ids), row, whole in zip(batch, rows, logits, strict=True):
                end = len(row) - begin
                scored = whole[end - len(ids) : end].float()
                best, logs = scored.argmax(-1), scored.log_softmax(-1)
                # One row serves all requests that differ in their last token alone.
                for _, last, part in collator.get_cache(text, context, ids, logs[None]):
                    wanted = torch.tensor(last, device=self.device)
                    chosen = part[0, -len(last) :].gather(1, wanted[:, None])
                    found.append((float(chosen.double().sum()), bool((best[-len(last) :] == wanted).all())))
                    bar.update(1)
        bar.close()
        return list(collator.get_original(found))


def _no_terminal() -> bool:
    return not sys.stderr.isatty()
