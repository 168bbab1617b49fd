"""What a dataset row becomes: a conversation in Gemma's own terms, before any token exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "model", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the model made. `arguments` is a JSON object, never a string (Gemma 4 template v5 refuses it)."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Roles are Gemma's: `model`, not `assistant`.

    Attributes:
        role: who speaks; `tool` carries the answer to a tool call.
        content: the text, untouched; the renderer trims as the official template does.
        thinking: the model's reasoning (Gemma 4's `thought` channel), None where there is none.
        tool_calls: calls that the model makes in this turn (Gemma 4).
        name: of the tool that answers (role `tool`).
        tool_call_id: the id of the call that is answered (role `tool`).
        response: the tool's answer where it is structured; `content` is used where it is None.
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    response: Any = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order. `tools` are OpenAI-style function schemas; `thinking` opens Gemma 4's thinking mode."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = field(default=())
    thinking: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text without turns: `<bos>text<eos>`, every token but the BOS trained."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which the first is the better.

    Attributes:
        prompt: turns before the answers; the last one is not the model's.
        chosen, rejected: the answers, each one model turn.
        tools, thinking: as in `Conversation`.
        margin: by how much the chosen answer was rated higher; None where the row holds no ratings.
        group: rows that share it stay on one side of the holdout; empty for the first user turn.
    """

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    tools: tuple[Mapping[str, Any], ...] = field(default=())
    thinking: bool = False
    margin: float | None = None
    group: str = ""

    @property
    def answers(self) -> dict[str, Message]:
        """Name -> answer, the better one first."""
        return {"chosen": self.chosen, "rejected": self.rejected}

    def conversation(self, answer: Message | None = None) -> Conversation:
        """The prompt, followed by `answer` where one is given."""
        return _followed(self, answer)


@dataclass(frozen=True, slots=True)
class Judged:
    """One answer to a prompt, and whether it was found good.

    Attributes:
        prompt: turns before the answer; the last one is not the model's.
        answer: one model turn.
        good: thumbs up or down.
        tools, thinking: as in `Conversation`.
        group: as in `Preference`.
    """

    prompt: tuple[Message, ...]
    answer: Message
    good: bool
    tools: tuple[Mapping[str, Any], ...] = field(default=())
    thinking: bool = False
    group: str = ""

    @property
    def answers(self) -> dict[str, Message]:
        """Name -> answer: one."""
        return {"completion": self.answer}

    def conversation(self, answer: Message | None = None) -> Conversation:
        """The prompt, followed by `answer` where one is given."""
        return _followed(self, answer)


def as_messages(conversation: Conversation) -> list[dict[str, str]]:
    """The turns as others write them: `{"role", "content"}`, and `assistant` for the model."""
    return [
        {"role": "assistant" if message.role == "model" else message.role, "content": message.content}
        for message in conversation.messages
    ]


def _followed(asked: Preference | Judged, answer: Message | None) -> Conversation:
    turns = asked.prompt if answer is None else (*asked.prompt, answer)
    return Conversation(turns, tools=asked.tools, thinking=asked.thinking)


Example = Conversation | Document
Answered = Preference | Judged
"""What is asked, with the answers to it that are compared or judged."""
