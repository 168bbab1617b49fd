"""Random conversations from a seed, and the same in the form that the official templates take."""

from __future__ import annotations

import random
from typing import Any

from gemma_tune.gemma.conversation import Conversation, Message, ToolCall
from gemma_tune.gemma.families import Family

# fmt: off
_WORDS = [
    "the", "a", "gemma", "river", "model", "token", "turn", "user", "system", "think", "call", "name", "value",
    "true", "null", "3.14", "1e-05", "0", "-7", "Ünïcødé", "naïve", "東京", "こんにちは", "مرحبا", "שלום", "Привет",
    "नमस्ते", "안녕", "🙂", "👩\u200d👩\u200d👧", "🇨🇭", "e\u0301", "ﬁ", "∑", "€", "½", "def", "return", "{x}",
    "[1,2]", "<b>", "</b>", "<table>", "&", "%", "\\n", "\\", "`", "```", '"', "'", ":", ";", ",", ".", "…",
    "—", '"quoted"', "key:", "a_b", "camelCase", "http://x.y/z?q=1", "foo()", "==", "!=", "=>", "//", "#", "*",
    "**", "_", "|", "||", "~", "^", "@", "\u00a0", "\u200b",
]
# fmt: on
_SPACES = (" ", " ", " ", " ", "  ", "\n", "\n\n", "\n    ", "\t", "", "\n\n\n", " " * 17, "\r\n", "\u2028")
_EDGES = ("", "", "", "", " ", "\n", "  \n\n", "\t", "\u3000")
_KEYS = ("city", "Unit", "alpha", "Beta", "a_b", "ключ", "x", "limit", "n-1", "zeta")


def random_text(rng: random.Random, longest: int = 24) -> str:
    """Words and blanks of many kinds, at times empty or with blanks at its ends."""
    if rng.random() < 0.04:
        return rng.choice(("", " ", "\n"))
    words = [rng.choice(_WORDS) + rng.choice(_SPACES) for _ in range(rng.randint(1, longest))]
    return rng.choice(_EDGES) + "".join(words) + rng.choice(_EDGES)


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind == 2:
        return rng.randint(-(10**9), 10**9)
    if kind == 3:
        return rng.choice((0.5, 1e-07, 1.0, -2.25, 1e22))
    if kind in (4, 5):
        return random_text(rng, 5)
    if kind == 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return random_object(rng, depth + 1)


def random_object(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    return {key: random_value(rng, depth) for key in rng.sample(_KEYS, rng.randint(0, 4))}


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A JSON schema as tool declarations have them, with the gaps that they have in the wild."""
    kind = rng.choice(("string", "integer", "number", "boolean", "array", "object", "STRING", None))
    schema: dict[str, Any] = {}
    if kind is not None:
        schema["type"] = kind
    if rng.random() < 0.1:
        schema["type"] = ["string", "null"]
    if rng.random() < 0.7:
        schema["description"] = random_text(rng, 6)
    if rng.random() < 0.2:
        schema["nullable"] = rng.random() < 0.7
    if rng.random() < 0.3:
        schema["enum"] = [random_value(rng, 1) for _ in range(rng.randint(0, 3))]
    if kind == "array" and rng.random() < 0.8:
        items = random_schema(rng, depth + 1) if depth < 2 else {"type": "string"}
        schema["items"] = items | rng.choice(({}, {"default": None}, {"maxItems": 3}, {"title": "T"}))
    if kind == "object" and depth < 2:
        if rng.random() < 0.8:
            schema["properties"] = {key: random_schema(rng, depth + 1) for key in rng.sample(_KEYS, rng.randint(0, 3))}
        elif rng.random() < 0.5:
            schema |= {key: random_schema(rng, depth + 1) for key in rng.sample(_KEYS, rng.randint(1, 2))}
        if rng.random() < 0.5:
            schema["required"] = rng.sample(_KEYS, rng.randint(0, 2))
        if rng.random() < 0.2:
            schema["additionalProperties"] = False
    return schema


def random_tool(rng: random.Random) -> dict[str, Any]:
    function: dict[str, Any] = {"name": rng.choice(("get_weather", "search", "f")), "description": random_text(rng, 8)}
    if rng.random() < 0.1:
        del function["description"]
    if rng.random() < 0.9:
        parameters: dict[str, Any] = {"type": "object"}
        parameters["properties"] = {key: random_schema(rng) for key in rng.sample(_KEYS, rng.randint(0, 4))}
        if rng.random() < 0.6:
            parameters["required"] = rng.sample(_KEYS, rng.randint(0, 3))
        function["parameters"] = parameters
    if rng.random() < 0.2:
        function["response"] = rng.choice(({"type": "object", "description": "d"}, {"type": "string"}, {}))
    return {"type": "function", "function": function}


def random_conversation(rng: random.Random, family: Family) -> Conversation:
    """A conversation that the family's official template accepts."""
    if family.tools:
        return _random_gemma4(rng)
    messages: list[Message] = []
    if family.template_accepts_system and rng.random() < 0.4:
        messages.append(Message("system", random_text(rng)))
    for index in range(rng.randint(1, 7)):
        messages.append(Message("model" if index % 2 else "user", random_text(rng)))
    return Conversation(tuple(messages))


def _random_gemma4(rng: random.Random) -> Conversation:
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append(Message("system", random_text(rng)))
    tools = tuple(random_tool(rng) for _ in range(rng.randint(1, 3))) if rng.random() < 0.5 else ()
    for _ in range(rng.randint(1, 5)):
        roll = rng.random()
        if roll < 0.45 or not messages:
            messages.append(Message("user", random_text(rng)))
        elif roll < 0.5:
            messages.append(Message("system", random_text(rng)))
        else:
            messages += _random_model_turn(rng, bool(tools))
    if rng.random() < 0.5:
        messages += _random_model_turn(rng, bool(tools))
    return Conversation(tuple(messages), tools=tools, thinking=rng.random() < 0.4)


def _random_model_turn(rng: random.Random, tools: bool) -> list[Message]:
    thinking = random_text(rng) if rng.random() < 0.5 else None
    content = random_text(rng) if rng.random() < 0.8 else ""
    if not tools or rng.random() < 0.4:
        return [Message("model", content, thinking=thinking)]
    named = [rng.choice(("get_weather", "search", "f")) for _ in range(rng.randint(1, 3))]
    ids = len(named) > 1 or rng.random() < 0.6
    calls = tuple(ToolCall(name, random_object(rng), f"id{n}" if ids else None) for n, name in enumerate(named))
    turn = [Message("model", content if rng.random() < 0.4 else "", thinking=thinking, tool_calls=calls)]
    if rng.random() < 0.8:
        structured = rng.random() < 0.4
        for call in calls[: rng.randint(1, len(calls))]:
            answer = random_object(rng) if structured else None
            turn.append(Message("tool", random_text(rng), name=call.name, tool_call_id=call.id, response=answer))
        if rng.random() < 0.6:
            turn.append(Message("model", random_text(rng)))
    return turn


def official_form(conversation: Conversation) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, keywords) for `apply_chat_template`.

    Structured tool responses go the template's older way, as `tool_responses` of the message that called: as the
    content of a tool message it takes only text.
    """
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        if message.role == "tool":
            _add_response(messages, message)
            continue
        entry: dict[str, Any] = {
            "role": "assistant" if message.role == "model" else message.role,
            "content": message.content,
        }
        if message.thinking is not None:
            entry["reasoning_content"] = message.thinking
        if message.tool_calls:
            entry["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                | ({"id": call.id} if call.id is not None else {})
                for call in message.tool_calls
            ]
        messages.append(entry)
    keywords: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    if conversation.thinking:
        keywords["enable_thinking"] = True
    return messages, keywords


def _add_response(messages: list[dict[str, Any]], message: Message) -> None:
    if message.response is not None:
        caller = next(entry for entry in reversed(messages) if entry["role"] == "assistant")
        caller.setdefault("tool_responses", []).append({"name": message.name, "response": message.response})
        return
    entry: dict[str, Any] = {"role": "tool", "content": message.content, "name": message.name}
    if message.tool_call_id is not None:
        entry["tool_call_id"] = message.tool_call_id
    messages.append(entry)
