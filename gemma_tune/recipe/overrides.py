"""Overrides: `optim.learning_rate=1e-4`, `--optim.learning_rate 1e-4` and `--optim.learning_rate=1e-4`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gemma_tune.console import quoted
from gemma_tune.errors import Problem, UserError
from gemma_tune.recipe.yaml import COMMAND_LINE, Node, parse

PLACE = "command line"
_PATH = re.compile(r"[A-Za-z_][\w-]{0,99}(\.[\w-]{1,100}){0,9}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Override:
    """One value from the command line.

    Attributes:
        path: the keys from the root; a number is the index of a list item.
        node: the value, read as YAML; `node.raw` is the text as typed, which needs no YAML quoting where text is due.
    """

    path: tuple[str, ...]
    node: Node

    @property
    def where(self) -> str:
        return f"{PLACE}: {'.'.join(self.path)}"


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Read overrides in order; a later one wins.

    Raises:
        UserError: with every argument that is no override.
    """
    found, problems = collect_overrides(arguments)
    if problems:
        raise UserError.of(problems)
    return found


def collect_overrides(arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides among `arguments`, and what is wrong with the others."""
    found: list[Override] = []
    problems: list[Problem] = []
    for item in _pairs(arguments):
        if isinstance(item, Problem):
            problems.append(item)
        else:
            found.append(_override(*item))
    return found, problems


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str] | Problem]:
    """(key, value) of each override, or what is wrong with an argument."""
    waiting = iter(arguments)
    for argument in waiting:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not _PATH.fullmatch(key):
            yield Problem(f"{quoted(argument)} is not an override", PLACE, "write it as section.key=value")
        elif equals:
            yield key, value
        elif not argument.startswith("--"):
            yield Problem(f"{quoted(argument)} has no value", PLACE, f"write {key}=VALUE")
        else:
            value = next(waiting, "--")
            # A value that starts with two dashes needs the form with `=`; here a value was forgotten.
            if value.startswith("--"):
                yield Problem(f"{argument} has no value", PLACE, f"write {argument} VALUE or {key}=VALUE")
            else:
                yield key, value


def _override(key: str, raw: str) -> Override:
    # Option names are written with dashes elsewhere; ours have underscores.
    path = tuple(key.replace("-", "_").split("."))
    where = f"{PLACE}: {'.'.join(path)}"
    try:
        document = parse(raw, where, line=COMMAND_LINE, mapping=False)
    except UserError as error:
        return Override(path, Node(None, COMMAND_LINE, raw=raw, error=error.problems[0]))
    node = document.root
    node.error = next(iter(document.problems), None)
    if node.plain or not isinstance(node.value, str):
        node.raw = raw
    return Override(path, node)


def apply(override: Override, root: Node) -> Problem | None:
    """Write one override into the tree of a recipe, in place. Returns what stands in the way."""
    node = root
    for depth, key in enumerate(override.path[:-1]):
        child = _child(node, key, override.path[depth + 1])
        if isinstance(child, str):
            return Problem(child, override.where, "check the path")
        node = child
    key = override.path[-1]
    if isinstance(node.value, list):
        if not _is_index(key, len(node.value) + 1):
            return Problem(_no_item(key, node.value), override.where, "count the items from 0")
        node.value[int(key) : int(key) + 1] = [override.node]
    elif isinstance(node.value, dict):
        node.value[key] = override.node
    return None


def _child(node: Node, key: str, next_key: str) -> Node | str:
    """The container under `key`, made where there is none or null; or why there can be none."""
    if isinstance(node.value, list):
        if not _is_index(key, len(node.value) + 1):
            return _no_item(key, node.value)
        if int(key) == len(node.value):
            node.value.append(Node(None, COMMAND_LINE))
        child = node.value[int(key)]
    else:
        assert isinstance(node.value, dict)
        child = node.value.setdefault(key, Node(None, COMMAND_LINE))
    if child.value is None:
        child.value, child.line = ([] if next_key.isdecimal() else {}), COMMAND_LINE
    if not isinstance(child.value, (dict, list)):
        return f"{key!r} is a single value, not a section"
    return child


def _is_index(key: str, length: int) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 7 and int(key) < length


def _no_item(key: str, items: list[Node]) -> str:
    return f"there is no item {key!r} in a list of {len(items)}"
