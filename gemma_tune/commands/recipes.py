"""`gemma-tune recipes list | copy | schema | reference`."""

from __future__ import annotations

import json
import shlex

from gemma_tune import console
from gemma_tune.recipe.shipped import copy_shipped, read_header, shipped_recipes

SCHEMA_FILE = "recipe.schema.json"
"""What the first line of each recipe calls the schema."""


def list_() -> int:
    """Print the shipped recipes with what they do and what was measured."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("recipe", no_wrap=True)
    table.add_column("what", ratio=3)
    table.add_column("measured", ratio=2)
    for recipe in shipped_recipes():
        table.add_row(recipe.name, console.printable(recipe.what), console.printable(recipe.measured))
    console.out(table)
    return 0


def copy(name: str, destination: str | None) -> int:
    """Copy one shipped recipe with what it needs and the schema that its first line points editors to.

    Prints the new files and what comes next.
    """
    target, *beside = copy_shipped(name, destination)
    schema = target.with_name(SCHEMA_FILE)
    if not schema.exists():
        schema.write_text(_schema_text(), "utf-8")
    for file in (target, *beside):
        console.out(str(file))
    header = read_header(target.read_text("utf-8", "surrogateescape"))
    console.out(f"look at it:  gemma-tune check {shlex.quote(str(target))}\nrun it:      {header['run']}")
    return 0


def schema() -> int:
    """Print the JSON Schema of a recipe."""
    console.out(_schema_text().rstrip())
    return 0


def reference() -> int:
    """Print docs/recipes.md: every key with its type, default and meaning."""
    from gemma_tune.plan.reference import recipe_reference

    console.out(recipe_reference().rstrip())
    return 0


def _schema_text() -> str:
    from gemma_tune.recipe.reader import recipe_schema

    return json.dumps(recipe_schema(), indent=2) + "\n"
