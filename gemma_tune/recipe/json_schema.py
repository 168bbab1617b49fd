"""The recipe's JSON Schema: for editors, and for the reader, which takes from it what each key wants."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from gemma_tune.recipe.schema import Recipe

Schema = Mapping[str, Any]


@functools.cache
def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors. Do not change the returned dict."""
    schema = Recipe.model_json_schema()
    _repair_bounds(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "gemma-tune recipe",
    }


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _repair_bounds(schema: Any) -> None:
    """Behind a validator function pydantic writes bounds under its own names; JSON Schema has others."""
    if isinstance(schema, list):
        for item in schema:
            _repair_bounds(item)
    elif isinstance(schema, dict):
        if schema.get("type") == "number":
            for ours, theirs in _BOUNDS.items():
                if ours in schema:
                    schema[theirs] = schema.pop(ours)
        for item in schema.values():
            _repair_bounds(item)


def resolve_schema(schema: Schema) -> list[Schema]:
    """The alternatives of a part of the recipe's schema, with references followed; usually one."""
    if "$ref" in schema:
        return resolve_schema(recipe_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return [option for choice in schema["anyOf"] for option in resolve_schema(choice)]
    return [schema]


def schema_at(path: tuple[str, ...]) -> Schema:
    """The part of the schema for the key at `path`; empty where there is none."""
    schema: Schema = recipe_schema()
    for key in path:
        options = resolve_schema(schema)
        schema = {}
        for option in options:
            if key in option.get("properties", {}):
                schema = option["properties"][key]
            elif "items" in option:
                schema = option["items"]
            elif isinstance(option.get("additionalProperties"), dict):
                schema = option["additionalProperties"]
    return schema
