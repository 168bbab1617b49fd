"""The one renderer: from a conversation to token ids and the mask of what is trained.

Everything that shows a Gemma a conversation goes through here: training, evaluation, samples, `show` and `chat`.
The ids equal those of the official template for every conversation that it accepts (tests/seams), with one difference
that is meant: text cannot become a control token, however it is spelled. Exactly one BOS.

Trained is what the model itself must emit: its text, its thinking, its tool calls, and the token at which it stops.
Never headers, never tool responses, never the newline after a turn end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from gemma_tune.errors import UserError
from gemma_tune.gemma.conversation import Answered, Conversation, Document, Judged, Message, Preference
from gemma_tune.gemma.families import Family
from gemma_tune.gemma.gemma4 import check_gemma4, without_thoughts, write_gemma4
from gemma_tune.gemma.pieces import By, Piece, Script, Token

TrainOn = Literal["model_turns", "last_model_turn", "all"]


class Encoder(Protocol):
    """Text to ids. Never yields an id of `Family.control_ids`, and adds no BOS."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A training row before truncation and packing.

    Attributes:
        ids: token ids, one BOS first.
        trained: 1 where the token carries loss, else 0; as long as `ids`.
        turns: for each place where the model stops and is trained to, the index just after that token. Cutting the row
            there leaves whole turns.
    """

    ids: list[int]
    trained: list[int]
    turns: list[int]


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A prompt and two answers to it as token ids.

    Attributes:
        prompt: what the model is given, one BOS first and the opening of its turn last.
        chosen, rejected: what it emits, the token at which it stops last. `prompt + chosen` is the beginning of the
            rendered conversation; only the newline behind a turn end is missing, which no model has to write.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def answers(self) -> tuple[list[int], ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class RenderedAnswer:
    """A prompt and one answer to it as token ids, as in `RenderedPair`."""

    prompt: list[int]
    answer: list[int]

    @property
    def answers(self) -> tuple[list[int], ...]:
        return (self.answer,)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt alone as token ids, as in `RenderedPair`."""

    prompt: list[int]

    @property
    def answers(self) -> tuple[list[int], ...]:
        return ()


def render(conversation: Conversation, family: Family, encoder: Encoder, train_on: TrainOn = "model_turns") -> Rendered:
    """One conversation. See `render_many`."""
    return render_many([conversation], family, encoder, train_on)[0]


def render_many(
    conversations: Sequence[Conversation | Document],
    family: Family,
    encoder: Encoder,
    train_on: TrainOn = "model_turns",
) -> list[Rendered]:
    """Conversations and documents, with one call of the encoder for all of them.

    Raises:
        UserError: the generation's template refuses a conversation (`check_conversation` says why).
    """
    scripts = [_document(c) if isinstance(c, Document) else _write(c, family) for c in conversations]
    encoded = _encode(scripts, family, encoder)
    return [
        _assemble(script, family, encoded, "all" if isinstance(example, Document) else train_on)
        for example, script in zip(conversations, scripts, strict=True)
    ]


def render_document(document: Document, family: Family, encoder: Encoder) -> Rendered:
    """`<bos>text<eos>`, every token but the BOS trained. No text in it becomes a control token."""
    return render_many([document], family, encoder)[0]


def render_prompt(conversation: Conversation, family: Family, encoder: Encoder) -> list[int]:
    """The ids after which the model is to answer: the conversation and the generation prompt.

    Raises:
        UserError: as `render_many`.
    """
    return render_prompts([conversation], family, encoder)[0].prompt


def render_prompts(conversations: Sequence[Conversation], family: Family, encoder: Encoder) -> list[RenderedPrompt]:
    """Prompts as `render_prompt` makes them, with one call of the encoder for all of them.

    Raises:
        UserError: as `render_many`.
    """
    scripts = [_write(conversation, family, prompt=True) for conversation in conversations]
    encoded = _encode(scripts, family, encoder)
    return [RenderedPrompt(_assemble(script, family, encoded, "model_turns").ids) for script in scripts]


def render_preferences(preferences: Sequence[Preference], family: Family, encoder: Encoder) -> list[RenderedPair]:
    """Pairs, with one call of the encoder for all of them.

    Raises:
        UserError: the generation's template refuses a pair (`check_answers` says why).
    """
    return [RenderedPair(prompt, *answers) for prompt, answers in _render_answers(preferences, family, encoder)]


def render_judged(judged: Sequence[Judged], family: Family, encoder: Encoder) -> list[RenderedAnswer]:
    """Judged answers, with one call of the encoder for all of them.

    Raises:
        UserError: as `render_preferences`.
    """
    return [RenderedAnswer(prompt, *answers) for prompt, answers in _render_answers(judged, family, encoder)]


def _render_answers(
    rows: Sequence[Answered], family: Family, encoder: Encoder
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(ids of the prompt, ids of each answer) of each row."""
    scripts: list[list[list[Piece]]] = []
    for row in rows:
        reason = check_answers(row, family)
        if reason is not None:
            raise UserError(reason, fix="set data.fix_roles, or correct the row")
        scripts.append(_answer_scripts(row, family))
    encoded = _encode([script for row in scripts for script in row], family, encoder)
    for row_scripts in scripts:
        prompt, *sides = (_assemble(script, family, encoded, "model_turns") for script in row_scripts)
        if any(side.ids[: len(prompt.ids)] != prompt.ids for side in sides):
            raise RuntimeError(f"the encoder joins the prompt with its answer: {prompt.ids[-8:]}")
        yield prompt.ids, [side.ids[len(prompt.ids) : side.turns[-1]] for side in sides]


def check_answers(row: Answered, family: Family) -> str | None:
    """Why this generation cannot render the prompt with its answers; None where it can."""
    for name, answer in row.answers.items():
        reason = check_conversation(row.conversation(answer), family)
        if reason is not None:
            return f"{name}: {reason}"
    reason = check_conversation(row.conversation(), family)
    if reason is not None:
        return f"prompt: {reason}"
    prompt, *sides = _answer_scripts(row, family)
    for name, side in zip(row.answers, sides, strict=True):
        if not _begins_with(side, prompt):
            return f"{name}: {family.label} is not prompted for this answer: its prompt already says something else"
    return None


def check_prompt(conversation: Conversation, family: Family) -> str | None:
    """Why this generation cannot be asked to go on behind the conversation; None where it can."""
    reason = check_conversation(conversation, family)
    if reason is not None:
        return reason
    answer = Message("model", "x", thinking="x" if conversation.thinking else None)
    whole = replace(conversation, messages=(*conversation.messages, answer))
    if not _begins_with(_write(whole, family), _write(conversation, family, prompt=True)):
        return f"{family.label} is not prompted for an answer here: its turn is over, and no new one is opened"
    return None


def check_conversation(conversation: Conversation, family: Family) -> str | None:
    """Why this generation cannot render the conversation; None where it can."""
    if not conversation.messages:
        return "there are no turns"
    if family.system_role == "turn":
        return check_gemma4(conversation)
    if conversation.thinking or any(message.thinking for message in conversation.messages):
        return f"{family.label} has no thinking"
    if conversation.tools or any(message.tool_calls or message.role == "tool" for message in conversation.messages):
        return f"{family.label} has no tool calls"
    turns = conversation.messages[1:] if conversation.messages[0].role == "system" else conversation.messages
    if not turns:
        return "there is nothing but a system turn"
    for index, message in enumerate(turns):
        expected = "model" if index % 2 else "user"
        if message.role != expected:
            return _wrong_role(index + len(conversation.messages) - len(turns), conversation.messages, family)
    return None


def written_text(message: Message, family: Family) -> str:
    """The text of a message as it is written: trimmed, without thoughts that it spells out (Gemma 4's template)."""
    if family.thinking and message.role == "model":
        return without_thoughts(message.content)
    return message.content.strip()


def _answer_scripts(row: Answered, family: Family) -> list[list[Piece]]:
    """The prompt, and the whole conversation with each answer."""
    whole = (_write(row.conversation(answer), family) for answer in row.answers.values())
    return [_write(row.conversation(), family, prompt=True), *whole]


def _begins_with(script: Sequence[Piece], prompt: Sequence[Piece]) -> bool:
    """Whether the ids of `script` begin with those of `prompt`.

    Gemma 4 opens a thought in some of its prompts, behind the answer of a tool. An answer goes on from there if it has
    a thought as well, and if that does not begin with a newline, which would be one token with the newline before it.
    """
    *before, last = prompt
    if [piece.value for piece in before] != [piece.value for piece in script[: len(before)]]:
        return False
    text = script[len(before)].value
    if isinstance(last.value, Token) or text == last.value:
        return text == last.value
    return not isinstance(text, Token) and text.startswith(last.value) and text[len(last.value)] != "\n"


def _wrong_role(index: int, messages: Sequence[Message], family: Family) -> str:
    role = messages[index].role
    if role == "system":
        return f"turn {index + 1} is 'system', which can only come first"
    if index == 0 or messages[index - 1].role == "system":
        return f"turn {index + 1} is '{role}': {family.label} wants the user to speak first"
    return (
        f"turn {index + 1} is '{role}' after '{messages[index - 1].role}': "
        f"{family.label} wants user and model to alternate"
    )


def _write(conversation: Conversation, family: Family, prompt: bool = False) -> list[Piece]:
    reason = check_conversation(conversation, family)
    if reason is not None:
        raise UserError(reason, fix="set data.fix_roles, or correct the row")
    if family.system_role == "turn":
        return write_gemma4(conversation, prompt)
    return _write_alternating(conversation, family, prompt)


def _write_alternating(conversation: Conversation, family: Family, prompt: bool) -> list[Piece]:
    """Gemma 1 to 3 (gemma.jinja, gemma3.jinja): user and model in turn, a system text before the first user's.

    The system text is joined as Gemma 3's template does, also for Gemma 1 and 2, whose template has none.
    """
    start, end = Token(family.turn_start), Token(family.turn_end)
    messages = conversation.messages
    prefix = ""
    if messages[0].role == "system":
        prefix, messages = messages[0].content + "\n\n", messages[1:]  # the template does not trim it
    script = Script()
    script.add(Token("<bos>"), By.NOBODY)
    for message in messages:
        by = By.MODEL if message.role == "model" else By.OTHERS
        if by is By.MODEL:
            script.open_turn()
        script.add([start, f"{message.role}\n"], By.OTHERS)
        script.add([prefix, message.content.strip(), end], by, stop=by is By.MODEL)
        script.add("\n", By.NOBODY)
        prefix = ""
    if prompt:
        script.add([start, f"{family.role_model}\n"], By.OTHERS)
    return script.pieces


def _document(document: Document) -> list[Piece]:
    script = Script()
    script.add(Token("<bos>"), By.NOBODY)
    script.add([document.text, Token("<eos>")], By.MODEL, stop=True)
    return script.pieces


def _encode(scripts: Sequence[Sequence[Piece]], family: Family, encoder: Encoder) -> dict[str, list[int]]:
    """Ids of every text in the scripts, each text encoded once: headers and newlines repeat in all of them.

    Raises:
        RuntimeError: the encoder broke its word.
    """
    texts = {piece.value: None for script in scripts for piece in script if not isinstance(piece.value, Token)}
    unique = list(texts)
    encoded = dict(zip(unique, encoder.encode(unique), strict=True)) if unique else {}
    for text, ids in encoded.items():
        if not family.control_ids.isdisjoint(ids):
            raise RuntimeError(f"the encoder read a control token out of text: {text[:80]!a}")
    return encoded


def _assemble(script: Sequence[Piece], family: Family, encoded: dict[str, list[int]], train_on: TrainOn) -> Rendered:
    last_turn = max((piece.turn for piece in script), default=-1)
    ids: list[int] = []
    trained: list[int] = []
    turns: list[int] = []
    for piece in script:
        new = [family.tokens[piece.value]] if isinstance(piece.value, Token) else encoded[piece.value]
        if train_on == "all":
            flag = piece.by is not By.NOBODY
        else:
            flag = piece.by is By.MODEL and (train_on == "model_turns" or piece.turn == last_turn)
        ids += new
        trained += [int(flag)] * len(new)
        if piece.stop and flag:
            turns.append(len(ids))
    return Rendered(ids, trained, turns)
