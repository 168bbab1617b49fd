"""The recipe reference in Markdown (`docs/recipes.md`): every key with its type, default and meaning."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from gemma_tune.plan.stages import written
from gemma_tune.recipe.json_schema import Schema, recipe_schema
from gemma_tune.recipe.schema import Data, Model, Recipe, Section, Source

_STAGES: tuple[str, ...] = get_args(Recipe.model_fields["stage"].annotation)

_HEAD = """\
# Recipe reference

Every key that a recipe may have. This page is made from the schema: `gemma-tune recipes reference > docs/recipes.md`.
`gemma-tune recipes schema` prints the same as JSON Schema, which completes and checks in an editor; `gemma-tune check`
says what becomes of `auto` on a machine. A key that is not here is refused, with its line and the nearest known key.

A recipe is a YAML file with the keys of the top level, and a section for each of the others. On the command line a key
is written with its section, as `optim.learning_rate=1e-4`. Where a stage has another default than `sft`, it stands
behind the default. *Required* keys have none.

"""


def recipe_reference() -> str:
    """The whole page, a newline at its end."""
    schema = recipe_schema()
    sections = list(_sections("", schema))
    plain = [key for key, part in schema["properties"].items() if not _referred(part)]
    lines = ["Sections: " + ", ".join(f"[`{path}`](#{_anchor(path)})" for path, _, _ in sections) + ".", ""]
    lines += ["## Top level", "", *_table(schema, plain, "")]
    for path, name, listed in sections:
        section = schema["$defs"][name]
        lines += ["", f"## {path}", ""]
        if listed:
            lines += [f"Keys of one item of the list `{path}`.", ""]
        elif section.get("description"):
            lines += [_prose(section["description"]), ""]
        lines += _table(section, list(section["properties"]), path)
    text = textwrap.fill(lines[0], 120, break_long_words=False, break_on_hyphens=False)
    return _HEAD + "\n".join([text, *lines[1:]]) + "\n"


def _sections(path: str, section: Schema) -> Iterator[tuple[str, str, bool]]:
    """(path, name of its definition, whether it is the item of a list) of each section, those inside one behind it."""
    for key, part in section["properties"].items():
        name = _referred(part)
        if name:
            below = f"{path}.{key}".lstrip(".")
            yield below, name, '"items":' in json.dumps(part)
            yield from _sections(below, recipe_schema()["$defs"][name])


def _referred(part: Schema) -> str:
    """Name of the section that a key holds, by itself or as an item of a list; empty where it holds plain values."""
    found = re.search(r'"#/\$defs/(\w+)"', json.dumps(part))
    return found[1] if found else ""


def _table(section: Schema, keys: Sequence[str], path: str) -> Iterator[str]:
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for key in keys:
        part, where = section["properties"][key], f"{path}.{key}".lstrip(".")
        default = "*required*" if key in section.get("required", []) else _default(where, part)
        cells = (f"`{key}`", _type(part, where), default, _prose(part.get("description", "")))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(path: str, part: Schema) -> str:
    """The default, and behind it those of stages that have another one."""
    value = part.get("default", {} if part.get("type") == "object" else None)
    others: dict[str, list[str]] = {}
    for stage in _STAGES if path != "stage" and _has_value(path) else ():
        found = _value(_written(stage, path))
        if found != _value(value):
            others.setdefault(found, []).append(f"`{stage}`")
    return "; ".join([f"`{_value(value)}`", *(f"{', '.join(stages)}: `{it}`" for it, stages in others.items())])


def _has_value(path: str) -> bool:
    """Whether a recipe has exactly one value there: no item of a list, and no key of a section that is null."""
    section: Any = _plain("sft")
    for key in path.split(".")[:-1]:
        section = getattr(section, key)
        if not isinstance(section, Section):
            return False
    return True


def _plain(stage: str) -> Recipe:
    return Recipe(
        stage=stage,  # type: ignore[arg-type]  # one of its own
        model=Model(name="m"),
        data=Data(sources=(Source(name="d"),)),
        output="o",
    )


def _written(stage: str, path: str) -> Any:
    value = written(_plain(stage), path).value
    return list(value) if isinstance(value, tuple) else value


def _value(value: Any) -> str:
    """A value as a recipe writes it."""
    if isinstance(value, float) and value and (abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _type(part: Schema, path: str) -> str:
    if "anyOf" in part:
        return " or ".join(dict.fromkeys(_type(option, path) for option in part["anyOf"]))
    if "$ref" in part:
        return f"[section](#{_anchor(path)})"
    if "enum" in part or "const" in part:
        return ", ".join(f"`{choice}`" for choice in part.get("enum", [part.get("const")]))
    kind = part["type"]
    if kind == "array":
        return f"list of {_type(part['items'], path)}"
    if kind in ("integer", "number"):
        return f"{kind}{_bounds(part)}"
    return {"string": "text", "boolean": "`true`, `false`", "null": "`null`", "object": "mapping"}[kind]


def _bounds(part: Schema) -> str:
    signs = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    found = [f"{sign} {_value(part[name])}" for name, sign in signs if name in part]
    return (" " + ", ".join(found)) if found else ""


def _anchor(path: str) -> str:
    """What GitHub makes of a heading that is a path."""
    return path.replace(".", "").lower()


def _prose(text: str) -> str:
    """A docstring on one line; what looks like HTML is none."""
    return " ".join(text.split()).replace("<", "&lt;")
