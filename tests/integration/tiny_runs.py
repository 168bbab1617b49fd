"""Recipes of a few seconds on a tiny Gemma, for the tests of whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("sea", "fox", "lamp", "town", "egg", "ship", "dog", "street")


def write_rows(path: Path, count: int = 60) -> Path:
    """Two-turn conversations with a pattern that a tiny model can learn; all different."""
    rows = []
    for number in range(count):
        colour, thing = COLOURS[number % len(COLOURS)], THINGS[number % len(THINGS)]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"What is the colour of the {thing} number {number}?"},
                    {"role": "assistant", "content": f"The {thing} is {colour}."},
                ]
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, base: Path, **changes: Any) -> Path:
    """`folder/recipe.yaml`, which trains `base` for eight steps. Sections in `changes` are merged in."""
    recipe: dict[str, Any] = {
        "stage": "sft",
        "model": {"name": str(base), "quantization": "none", "precision": "fp32"},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"name": str(write_rows(folder / "rows.jsonl"))}], "max_length": 128, "holdout": 8},
        "optim": {"learning_rate": 1e-2, "epochs": 1, "max_steps": 8},
        "batch": {"size": 4, "micro": 2},
        "evaluation": {"every": 4},
        "samples": {"prompts": ["What is the capital of France?"], "held_out": 2, "max_new_tokens": 8},
        "checkpoint": {"every": 2},
        "output": str(folder / "run"),
    }
    for section, values in changes.items():
        known = recipe.get(section)
        recipe[section] = {**known, **values} if isinstance(known, dict) and isinstance(values, dict) else values
    if recipe["evaluation"] is None:
        del recipe["evaluation"]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def document(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
