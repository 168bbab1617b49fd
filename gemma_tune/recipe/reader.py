"""A recipe file and overrides -> Recipe, or every finding at once, each with its line and its remedy.

Four steps: parse the file, write the overrides into the tree, compare the tree with the schema (unknown keys, text
that YAML would take for a number), then let pydantic and the rules judge the values. Each later step goes on as well as
it can after findings of an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gemma_tune.console import TOKEN, printable
from gemma_tune.errors import Problem, UserError
from gemma_tune.recipe import yaml
from gemma_tune.recipe.expectations import describe, fix_for, shown
from gemma_tune.recipe.json_schema import recipe_schema, resolve_schema, schema_at
from gemma_tune.recipe.names import SECRETS
from gemma_tune.recipe.overrides import PLACE, apply, collect_overrides, parse_overrides
from gemma_tune.recipe.rules import clashes, secret_in
from gemma_tune.recipe.schema import Recipe
from gemma_tune.recipe.unknown import explain_unknown
from gemma_tune.recipe.yaml import COMMAND_LINE, Node

__all__ = ["parse_overrides", "read_recipe", "recipe_schema"]

KeyPath = tuple[str, ...]


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` and apply `overrides` (`a.b=c`, `--a.b c`, `--a.b=c`) in order.

    Raises:
        UserError: with every finding; a file that cannot be parsed at all has only one.
    """
    return _read(yaml.load(path), overrides)


def read_recipe_text(text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The same for a recipe that is already in memory; errors call it `name`."""
    return _read(yaml.parse(text, name), overrides)


def _read(document: yaml.Document, overrides: Sequence[str]) -> Recipe:
    reader = _Reader(document)
    reader.override(overrides)
    data = reader.compare(document.root, recipe_schema(), ())
    recipe = reader.judge(data)
    reader.find_secrets()
    if reader.problems:
        # Keys come from the file as well: a token or a control character in one must not reach the terminal.
        raise UserError.of([_clean(problem) for problem in sorted(reader.problems, key=reader.order)])
    assert recipe is not None
    return recipe


def _clean(problem: Problem) -> Problem:
    return Problem(printable(problem.what), printable(problem.where), printable(problem.fix))


class _Reader:
    """Collects the findings about one document."""

    def __init__(self, document: yaml.Document) -> None:
        self.document = document
        self.root = document.root
        self.problems: list[Problem] = list(document.problems)
        self.tainted: set[KeyPath] = set()

    # Places

    def node_at(self, path: KeyPath) -> tuple[Node, int]:
        """The node at `path`, or its deepest parent that exists; and how many keys of `path` lead to it."""
        node, depth = self.root, 0
        for key in path:
            if isinstance(node.value, dict) and key in node.value:
                node = node.value[key]
            elif isinstance(node.value, list) and key.isdecimal() and int(key) < len(node.value):
                node = node.value[int(key)]
            else:
                break
            depth += 1
        return node, depth

    def where(self, path: KeyPath, node: Node) -> str:
        dotted = ".".join(path)
        if node.line == COMMAND_LINE:
            return f"{PLACE}: {dotted}"
        return f"{self.document.name}:{node.line}: {dotted}"

    def place(self, dotted: str) -> str:
        """Where a value comes from, in words."""
        path = tuple(dotted.split("."))
        node, depth = self.node_at(path)
        if depth < len(path):
            return "default"
        return PLACE if node.line == COMMAND_LINE else f"line {node.line}"

    def add(self, path: KeyPath, node: Node, what: str, fix: str = "") -> None:
        where = self.where(path, node)
        self.problems.append(Problem(what, where, fix))
        self.tainted.add(path)

    def order(self, problem: Problem) -> tuple[bool, int]:
        """Sort key: the file's findings by line, then the command line's."""
        if problem.where.startswith(PLACE):
            return True, 0
        line = problem.where.removeprefix(f"{self.document.name}:").partition(":")[0]
        return False, int(line) if line.isdecimal() else 0

    # Step 2: overrides

    def override(self, arguments: Sequence[str]) -> None:
        overrides, problems = collect_overrides(arguments)
        self.problems.extend(problems)
        for override in overrides:
            problem = apply(override, self.root)
            if problem:
                self.problems.append(problem)

    # Step 3: the tree against the schema

    def compare(self, node: Node, schema: Mapping[str, Any], path: KeyPath) -> Any:
        """Plain data for pydantic. Unknown keys are reported and left out."""
        options = resolve_schema(schema)
        if node.raw is not None and _takes_text(options) and not _is_null(node, options):
            return self.verbatim(node, path)
        if node.error is not None:
            self.problems.append(Problem(node.error.what, self.where(path, node), node.error.fix))
            self.tainted.add(path)
            return None
        if isinstance(node.value, dict):
            return self.compare_mapping(node, node.value, options, path)
        if isinstance(node.value, list):
            items: Mapping[str, Any] = next((option["items"] for option in options if "items" in option), {})
            return [self.compare(item, items, (*path, str(index))) for index, item in enumerate(node.value)]
        if isinstance(node.value, float) and not math.isfinite(node.value):
            self.add(path, node, f"{node.text} is not a finite number", "write a finite number")
        if node.plain and node.value is not None and _takes_text(options):
            return node.text
        if node.value is None and not node.text and any("properties" in option for option in options):
            self.add(path, node, "is empty", self.empty_fix(path, options))
        return node.value

    def verbatim(self, node: Node, path: KeyPath) -> str:
        raw = node.raw or ""
        if yaml.FORBIDDEN.search(raw):
            self.add(path, node, "holds a control character or undecodable bytes", "remove them")
        return raw

    def empty_fix(self, path: KeyPath, options: Sequence[Mapping[str, Any]]) -> str:
        if any(option.get("type") == "null" for option in options):
            return "remove the line for LoRA's defaults, or write `adapter: null` to train all weights"
        return f"remove the line `{path[-1]}:`, or write keys under it"

    def compare_mapping(
        self, node: Node, value: dict[str, Node], options: Sequence[Mapping[str, Any]], path: KeyPath
    ) -> dict[str, Any]:
        # A schema without a type takes anything.
        option = next((option for option in options if option.get("type", "object") == "object"), None)
        if option is None:
            # pydantic will say what is wanted here instead of a section.
            return dict.fromkeys(value)
        known = option.get("properties")
        data = {}
        for key, child in value.items():
            if known is not None and key not in known:
                self.unknown((*path, key), child, list(known))
            else:
                schema = known[key] if known is not None else option.get("additionalProperties", {})
                data[key] = self.compare(child, schema if isinstance(schema, dict) else {}, (*path, key))
        return data

    def unknown(self, path: KeyPath, node: Node, siblings: list[str]) -> None:
        if path[-1].lower() in SECRETS:
            return  # find_secrets() speaks about it
        what, fix = explain_unknown(path, siblings, is_section=isinstance(node.value, (dict, list)))
        self.add(path, node, what, fix)

    # Step 4: values

    def judge(self, data: Any) -> Recipe | None:
        """Validate; after findings, repair a copy so that contradictions elsewhere are found in the same go."""
        recipe = None
        for _ in range(4):
            try:
                recipe = Recipe.model_validate(data)
                break
            except ValidationError as error:
                for path, missing, message in self.grouped(error):
                    self.report(path, missing, message)
                    _patch(data, path)
        if recipe is not None:
            for clash in clashes(recipe, self.place):
                self.report_clash(clash.keys, clash.what, clash.fix)
        return recipe

    def grouped(self, error: ValidationError) -> list[tuple[KeyPath, bool, str]]:
        """(path, is missing, message of a validator) once a place.

        A union reports each of its branches apart, and a list with a bad item reports itself as too short as well.
        """
        found: dict[KeyPath, tuple[KeyPath, bool, str]] = {}
        for item in error.errors(include_url=False):
            location = tuple(map(str, item["loc"]))
            missing = item["type"] == "missing"
            path = location if missing else location[: self.node_at(location)[1]]
            message = str(item["ctx"]["error"]) if item["type"] == "value_error" else ""
            found.setdefault(path, (path, missing, message))
        return [entry for path, entry in found.items() if not any(_is_below(other, path) for other in found)]

    def report(self, path: KeyPath, missing: bool, message: str) -> None:
        if any(path[: len(bad)] == bad for bad in self.tainted) or path in self.tainted:
            return
        node, _ = self.node_at(path)
        options = resolve_schema(schema_at(path))
        if missing:
            self.add(path, node, "is missing", _example(path))
        elif message:
            what, _, fix = message.partition("; ")
            self.add(path, node, what, fix)
        else:
            self.add(path, node, f"needs {describe(options)}, got {shown(node)}", fix_for(path, node, options))

    def report_clash(self, keys: tuple[str, ...], what: str, fix: str) -> None:
        paths = [tuple(key.split(".")) for key in keys]
        for path in paths:
            if any(path[: len(bad)] == bad or bad[: len(path)] == path for bad in self.tainted):
                return
        written = next((path for path in paths if self.node_at(path)[1] == len(path)), paths[0])
        node, _ = self.node_at(written)
        # The text names the keys itself.
        where = self.where(written, node).removesuffix(f": {'.'.join(written)}")
        self.problems.append(Problem(what, where, fix))

    # Secrets

    def find_secrets(self) -> None:
        lines = set()
        for path, node in _scalars(self.root, ()):
            found = secret_in(path, node.raw if node.raw is not None else node.text)
            if found and node.text + (node.raw or "") != "":
                self.add(path, node, *found)
                lines.add(node.line)
        for number, line in enumerate(self.document.text.splitlines(), start=1):
            if number not in lines and TOKEN.search(line):
                where = f"{self.document.name}:{number}"
                what = "an access token: secrets do not belong in recipes, which are copied into run folders"
                self.problems.append(Problem(what, where, "remove it, and revoke it if the file was shared"))


def _scalars(node: Node, path: KeyPath) -> Iterator[tuple[KeyPath, Node]]:
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _scalars(child, (*path, key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from _scalars(child, (*path, str(index)))
    else:
        yield path, node


def _is_below(path: KeyPath, above: KeyPath) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _takes_text(options: Sequence[Mapping[str, Any]]) -> bool:
    """True where free text is the only thing besides null that the key takes."""
    kinds = {"text" if option.get("type") == "string" and "enum" not in option and "const" not in option else "other"
             for option in options if option.get("type") != "null"}  # fmt: skip
    return kinds == {"text"}


def _is_null(node: Node, options: Sequence[Mapping[str, Any]]) -> bool:
    return node.value is None and node.error is None and any(option.get("type") == "null" for option in options)


_PLACEHOLDERS: dict[str, Any] = {
    "model": {"name": "placeholder"},
    "data": {"sources": [{"name": "placeholder"}]},
    "sources": [{"name": "placeholder"}],
    "name": "placeholder",
    "source": "placeholder",
    "output": "placeholder",
}
"""Values for the required keys, with which the search for further findings goes on. No such recipe is ever returned."""
_ITEMS = {"sources": {"name": "placeholder"}, "reward": {"source": "placeholder"}}
"""The same for items of lists of sections."""


def _patch(data: Any, path: KeyPath) -> None:
    """Take the value at `path` out of `data`, or replace it where something must stand."""
    for key in path[:-1]:
        data = data[int(key)] if isinstance(data, list) else data.get(key)
        if not isinstance(data, (dict, list)):
            return
    key = path[-1] if path else ""
    if isinstance(data, list):
        data[int(key)] = _ITEMS.get(path[-2], "placeholder")
    elif key in _PLACEHOLDERS and path[0] != "tracking":
        data[key] = _PLACEHOLDERS[key]
    else:
        data.pop(key, None)


_EXAMPLES = {
    "model": "add `model: {name: google/gemma-3-1b-it}`",
    "model.name": "add `name: google/gemma-3-1b-it`",
    "data": "add `data: {sources: [{name: ultrachat}]}`",
    "data.sources": "add `sources: [{name: ultrachat}]`",
    "output": "add `output: runs/NAME`",
}


def _example(path: KeyPath) -> str:
    return _EXAMPLES.get(".".join(path), f"add `{path[-1]}: ...`")
