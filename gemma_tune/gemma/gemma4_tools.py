"""Gemma 4's notation for tools: declarations and arguments, as gemma4_v5.jinja writes them.

It is no JSON: strings stand between quote tokens, keys of calls and responses are bare, keys are sorted without regard
to case, and types are written in capitals. The oddities are the template's; the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_tune.gemma.pieces import Token

QUOTE = Token('<|"|>')
# Keys of a schema that are no properties themselves (the template's list).
_STANDARD_KEYS = frozenset({"description", "type", "properties", "required", "nullable"})


def format_argument(value: Any, quote_keys: bool = True) -> Iterator[str]:
    """A JSON value."""
    if value is None:
        yield "null"
    elif isinstance(value, str):
        yield from _quoted(value)
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, Mapping):
        yield "{"
        for number, (key, item) in enumerate(_sorted(value)):
            yield "," if number else ""
            yield from _quoted(key) if quote_keys else (key,)
            yield ":"
            yield from format_argument(item, quote_keys)
        yield "}"
    elif isinstance(value, (list, tuple)):
        yield "["
        for number, item in enumerate(value):
            yield "," if number else ""
            yield from format_argument(item, quote_keys)
        yield "]"
    else:
        yield str(value)


def argument_items(arguments: Mapping[str, Any]) -> Iterator[str]:
    """`key:value,key:value`, as in a call or a response."""
    for number, (key, value) in enumerate(_sorted(arguments)):
        yield f",{key}:" if number else f"{key}:"
        yield from format_argument(value, quote_keys=False)


def declaration(function: Mapping[str, Any]) -> Iterator[str]:
    """A tool as the model is told of it. `function` is an OpenAI-style schema: name, description, parameters."""
    yield f"declaration:{function['name']}{{description:"
    yield from _quoted(_text(function, "description"))
    parameters = function.get("parameters")
    if parameters:
        yield ",parameters:{"
        if _get(parameters, "properties"):
            yield "properties:{"
            yield from _properties(parameters["properties"])
            yield "},"
        if _get(parameters, "required"):
            yield from _required(parameters["required"])
            yield ","
        if _get(parameters, "type"):
            yield "type:"
            yield from _quoted(_text(parameters, "type").upper())
            yield "}"  # only here: without a type the template leaves the brace open
    if "response" in function:
        yield ",response:{"
        response = function["response"]
        if _get(response, "description"):
            yield "description:"
            yield from _quoted(_text(response, "description"))
            yield ","
        if _text(response, "type").upper() == "OBJECT":
            yield "type:"
            yield from _quoted("OBJECT")
            yield "}"
    yield "}"


def _properties(properties: Mapping[str, Any], skip: frozenset[str] = frozenset()) -> Iterator[str]:
    found = [(key, schema) for key, schema in _sorted(properties) if key not in skip]
    for number, (key, schema) in enumerate(found):
        yield f",{key}:{{" if number else f"{key}:{{"
        for part in _schema(schema):
            yield from part
            yield ","
        yield "type:"
        yield from _quoted(_text(schema, "type").upper())
        yield "}"


def _schema(schema: Any) -> Iterator[Iterable[str]]:
    """The parts of one property's schema but its type, in the template's order."""
    kind = _text(schema, "type").upper()
    if _get(schema, "description"):
        yield ["description:", *_quoted(_text(schema, "description"))]
    if kind == "STRING" and _get(schema, "enum"):
        yield ["enum:", *format_argument(schema["enum"])]
    if kind == "ARRAY" and isinstance(_get(schema, "items"), Mapping) and schema["items"]:
        yield ["items:{", *_items(schema["items"]), "}"]
    if _get(schema, "nullable"):
        yield ["nullable:true"]
    if kind == "OBJECT":
        if isinstance(_get(schema, "properties"), Mapping):
            yield ["properties:{", *_properties(schema["properties"]), "}"]
        elif isinstance(schema, Mapping):
            yield ["properties:{", *_properties(schema, _STANDARD_KEYS), "}"]
        if _get(schema, "required"):
            yield _required(schema["required"])


def _items(items: Mapping[str, Any]) -> Iterator[str]:
    """The schema of an array's elements."""
    found = [(key, value) for key, value in _sorted(items) if value is not None]
    for number, (key, value) in enumerate(found):
        yield "," if number else ""
        if key == "properties":
            yield "properties:{"
            yield from _properties(value) if isinstance(value, Mapping) else ()
            yield "}"
        elif key == "required":
            yield from _required(value)
        elif key == "type":
            yield "type:"
            upper = value.upper() if isinstance(value, str) else [str(kind).upper() for kind in value]
            yield from format_argument(upper)
        else:
            yield f"{key}:"
            yield from format_argument(value)


def _required(names: Iterable[Any]) -> Iterator[str]:
    yield "required:["
    for number, name in enumerate(names):
        yield "," if number else ""
        yield from _quoted(str(name))
    yield "]"


def _quoted(text: str) -> tuple[str, ...]:
    return (QUOTE, text, QUOTE)


def _sorted(mapping: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """As Jinja's `dictsort`."""
    return sorted(mapping.items(), key=lambda item: item[0].lower())


def _get(schema: Any, key: str) -> Any:
    """None where a schema is no object (`additionalProperties: false`), as an undefined value in the template."""
    return schema.get(key) if isinstance(schema, Mapping) else None


def _text(schema: Any, key: str) -> str:
    """A value as the template prints it: nothing where it is missing, `None` where it is null."""
    return str(schema[key]) if isinstance(schema, Mapping) and key in schema else ""
