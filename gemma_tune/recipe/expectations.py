"""What a key wants, in plain words, from the JSON Schema of the recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma_tune.console import printable, quoted
from gemma_tune.recipe.json_schema import Schema
from gemma_tune.recipe.names import nearest
from gemma_tune.recipe.yaml import Node


def describe(options: Sequence[Schema]) -> str:
    """`a whole number of at least 1, or 'auto'`."""
    words = [_describe_one(option) for option in options]
    return ", or ".join(dict.fromkeys(words))


def _describe_one(option: Schema) -> str:
    if "enum" in option:
        *most, last = map(repr, option["enum"])
        return f"one of {', '.join(most)} or {last}" if most else last
    if "const" in option:
        return repr(option["const"])
    kind = option.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(option)
    if kind == "array":
        item = option.get("items", {})
        return "a list of texts" if item.get("type") == "string" else "a list with at least one source"
    words = {"boolean": "true or false", "null": "null", "object": "a section (`key: value` lines)"}
    if kind == "string":
        return "text that is not empty" if option.get("minLength") else "text"
    return words.get(str(kind), "another value")


def _bounds(option: Schema) -> str:
    low, high = option.get("minimum"), option.get("maximum")
    above, below = option.get("exclusiveMinimum"), option.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" between {low} and {high}"
    words = [
        f"of at least {low}" if low is not None else "",
        f"above {above}" if above is not None else "",
        f"of at most {high}" if high is not None else "",
        f"below {below:,}" if below is not None else "",
    ]
    return "".join(f" {word}" for word in words if word).replace("above 0 of at most", "above 0 and at most")


def shown(node: Node) -> str:
    """The value of `node` as an error message quotes it."""
    if isinstance(node.value, dict):
        return "a section"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}" if node.value else "an empty list"
    if node.value is None and not node.text:
        return "nothing"
    if isinstance(node.value, str):
        return f"the text {quoted(node.value)}"
    return printable(node.text)[:80]


_ITEMS = {"sources": "{name: ...}", "reward": "{source: ...}"}
"""What an item looks like in lists of sections."""
_TRUTH = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def fix_for(path: tuple[str, ...], node: Node, options: Sequence[Schema]) -> str:
    """What to write instead, where it can be guessed."""
    kinds = {option.get("type") for option in options}
    choices = [str(choice) for option in options for choice in option.get("enum", [option.get("const")]) if choice]
    text = node.text.strip()
    if "boolean" in kinds and text.lower() in _TRUTH:
        return f"write {_TRUTH[text.lower()]}"
    if choices and (near := nearest(text, choices)):
        return f"write {' or '.join(near)}"
    if choices and (node.value is None or text.lower() in ("no", "false", "off")) and "none" in choices:
        return "write none"
    if kinds & {"integer", "number"}:
        return _number_fix(node, text, whole="number" not in kinds)
    if "array" in kinds and not isinstance(node.value, list):
        if "string" in kinds and not isinstance(node.value, dict):
            return f"write a path, or a list: `{path[-1]}: [{_ITEMS[path[-1]]}]`"
        return f"write a list: `{path[-1]}: [{_ITEMS.get(path[-1], '...')}]`"
    if "object" in kinds and "boolean" not in kinds:
        return _section_fix(path, text)
    return "correct the value" if not choices else f"write {' or '.join(choices)}"


def _number_fix(node: Node, text: str, *, whole: bool) -> str:
    grouped = re.fullmatch(r"[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text)
    # Elsewhere a comma is what many languages write for the point.
    plain = text.replace("_", "").replace(",", "" if grouped else ".")
    try:
        number = float(plain)
    except ValueError:
        return "write a number"
    if isinstance(node.value, bool) or number != number or abs(number) > 1e15:
        return "write a number within the range"
    if whole and number == int(number) and not isinstance(node.value, int):
        return f"write {int(number)}" + ("" if node.plain else " without quotes")
    if whole and number != int(number):
        return "write a whole number"
    if isinstance(node.value, str) and (node.plain or "," in text):
        return f"write {number:g}"
    return "write a number within the range"


def _section_fix(path: tuple[str, ...], text: str) -> str:
    if path[:-1] in (("data", "sources"), ("ppo", "reward")):
        key = "name" if path[0] == "data" else "source"
        return f"write `- {key}: {printable(text)[:80] or '...'}`"
    if path == ("optim",):
        return "`optim` is a section; the optimizer is optim.optimizer"
    if path == ("model",):
        return f"write `model: {{name: {printable(text)[:80] or '...'}}}`"
    if path == ("data",):
        return f"write `data: {{sources: [{{name: {printable(text)[:80] or '...'}}}]}}`"
    return f"write keys under `{path[-1]}:`" if path else "write sections"
