"""Gemma 4's conversations: system turns, thinking, tool declarations, calls and responses (gemma4_v5.jinja).

What that template does, and this therefore does as well:
  - every text is trimmed except thinking; a thought channel that is spelled out inside a model's text is cut out;
  - thinking is shown only after the last user message, so that earlier turns are trained as they are remembered;
  - model messages in a row, and those around tool responses, are one turn;
  - a message's text comes after the responses to its tool calls;
  - a call that is not answered ends with the token that opens a response: there the model hands over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.gemma.conversation import Conversation, Message
from gemma_tune.gemma.gemma4_tools import argument_items, declaration, format_argument
from gemma_tune.gemma.pieces import By, Piece, Script, Token

TURN, TURN_END = Token("<|turn>"), Token("<turn|>")
CHANNEL, CHANNEL_END = Token("<|channel>"), Token("<channel|>")
CALL, CALL_END = Token("<|tool_call>"), Token("<tool_call|>")
RESPONSE, RESPONSE_END = Token("<|tool_response>"), Token("<tool_response|>")
TOOL, TOOL_END = Token("<|tool>"), Token("<tool|>")
THINK = Token("<|think|>")


def check_gemma4(conversation: Conversation) -> str | None:
    """Why Gemma 4 cannot render the conversation; None where it can."""
    for index, tool in enumerate(conversation.tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return f"tool {index + 1} has no function.name"
        if not _can_be_declared(function):
            return f"tool {index + 1} ('{function['name']}') has parameters that are no JSON schema"
    calls: Sequence[Any] = ()
    for index, message in enumerate(conversation.messages):
        if message.role != "model" and (message.thinking or message.tool_calls):
            return f"turn {index + 1} is '{message.role}', but only the model thinks and calls tools"
        if message.role != "tool":
            calls = message.tool_calls
        elif not calls:
            return f"turn {index + 1} answers a tool call that nobody made"
        elif message.tool_call_id is not None and message.tool_call_id not in {call.id for call in calls}:
            return f"turn {index + 1} answers the tool call '{message.tool_call_id}', which nobody made"
        elif message.tool_call_id is None and len(calls) > 1:
            # The template would name every such answer after the last call.
            return f"turn {index + 1} does not say which of {len(calls)} tool calls it answers (tool_call_id)"
    return None


def _can_be_declared(function: Mapping[str, Any]) -> bool:
    """Schemas in the wild have a list for `properties`, or true for `required`. The template fails on them as well."""
    try:
        list(declaration(function))
    except (AttributeError, TypeError, RecursionError):
        return False
    return True


def write_gemma4(conversation: Conversation, prompt: bool) -> list[Piece]:
    """Pieces of a conversation that `check_gemma4` accepts; `prompt` adds what opens the model's answer."""
    script = Script()
    script.add(Token("<bos>"), By.NOBODY)
    messages = conversation.messages
    leading_system = messages[0].role == "system"
    if conversation.thinking or conversation.tools or leading_system:
        _write_system(script, conversation, messages[0].content if leading_system else "")
        messages = messages[1:] if leading_system else messages
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    spoken = [index for index, message in enumerate(messages) if message.role != "tool"]
    state = "text"
    for position, index in enumerate(spoken):
        previous = messages[spoken[position - 1]] if position else None
        following = spoken[position + 1] if position + 1 < len(spoken) else len(messages)
        state = _write_message(
            script,
            messages[index],
            responses=messages[index + 1 : following],
            continues=previous is not None and previous.role == "model",
            next_role=messages[following].role if following < len(messages) else None,
            show_thinking=index > last_user,
        )
    if prompt and state == "text":
        script.add([TURN, "model\n"], By.OTHERS)
    elif prompt and state == "answered" and conversation.thinking:
        script.add([CHANNEL, "thought\n"], By.OTHERS)
    return script.pieces


def _write_system(script: Script, conversation: Conversation, content: str) -> None:
    script.add([TURN, "system\n"], By.OTHERS)
    if conversation.thinking:
        script.add([THINK, "\n"], By.OTHERS)
    script.add(content.strip(), By.OTHERS)
    for tool in conversation.tools:
        script.add([TOOL, *declaration(tool["function"]), TOOL_END], By.OTHERS)
    script.add(TURN_END, By.OTHERS)
    script.add("\n", By.NOBODY)


def _write_message(
    script: Script,
    message: Message,
    responses: Sequence[Message],
    continues: bool,
    next_role: str | None,
    show_thinking: bool,
) -> str:
    """Append one message and the tool responses after it.

    Returns:
        What a prompt that ends here has to know: `called` (a call that is not answered), `answered` (there were
        responses), or `text`.
    """
    by = By.MODEL if message.role == "model" else By.OTHERS
    if not (by is By.MODEL and continues):
        if by is By.MODEL:
            script.open_turn()
        script.add([TURN, f"{message.role}\n"], By.OTHERS)
    if message.thinking and show_thinking:
        script.add([CHANNEL, f"thought\n{message.thinking}\n", CHANNEL_END], by)
    for call in message.tool_calls:
        script.add([CALL, f"call:{call.name}{{", *argument_items(call.arguments), "}", CALL_END], by)
    answered = bool(message.tool_calls) and bool(responses)
    if answered:
        _write_responses(script, message, responses)
    content = without_thoughts(message.content) if by is By.MODEL else message.content.strip()
    script.add(content, by)
    waits = answered and not content and next_role is None
    if message.tool_calls and not answered:
        script.add(RESPONSE, by, stop=True)
        return "called"
    if not waits and not (by is By.MODEL and next_role == "model"):
        script.add(TURN_END, by, stop=by is By.MODEL)
        script.add("\n", By.NOBODY)
    return "answered" if answered else "text"


def _write_responses(script: Script, message: Message, responses: Sequence[Message]) -> None:
    """All responses. The model opens the first one itself: that is where it stops and hands over."""
    for number, response in enumerate(responses):
        script.add(RESPONSE, By.OTHERS if number else By.MODEL, stop=not number)
        script.add([f"response:{_tool_name(message, response)}{{", *_response_body(response), "}"], By.OTHERS)
        script.add(RESPONSE_END, By.OTHERS)


def _tool_name(message: Message, response: Message) -> str:
    """Of the call with the same id; also where both have none, as in the template."""
    for call in reversed(message.tool_calls):
        if call.id == response.tool_call_id:
            return call.name
    return response.name or "unknown"


def _response_body(response: Message) -> Iterator[str]:
    value = response.content if response.response is None else response.response
    if isinstance(value, Mapping):
        yield from argument_items(value)
    else:
        yield "value:"
        yield from format_argument(value, quote_keys=False)


def without_thoughts(text: str) -> str:
    """The template's `strip_thinking`: drops what stands between the spellings of the channel tokens."""
    return "".join(part.split(CHANNEL, 1)[0] for part in text.split(CHANNEL_END)).strip()
