"""The light floors stay light: a fresh process imports each and shows what came with it.

import-linter reads the import statements; this sees what really happens, lazy packages and __init__ files included.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_tune

PACKAGE = Path(gemma_tune.__file__).parent
HEAVY = (
    *("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes"),
    *("numpy", "wandb", "huggingface_hub"),
)


def imported_by(code: str) -> set[str]:
    """The names in sys.modules after `code` ran in a fresh process."""
    program = f"{code}\nimport sys\nprint('\\n'.join(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def modules_of(folder: str) -> list[str]:
    paths = sorted((PACKAGE / folder).rglob("*.py"))
    return [".".join(("gemma_tune", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in paths]


LIGHT = {
    "errors and console": ["gemma_tune.errors", "gemma_tune.console", "gemma_tune.privacy"],
    "recipe": modules_of("recipe"),
    "gemma": modules_of("gemma"),
    "plan": modules_of("plan"),
    "launch": modules_of("launch"),
    "the pure half of data": [
        f"gemma_tune.data.{name}"
        for name in ("rows", "policies", "pack", "sources")
        if importlib.util.find_spec(f"gemma_tune.data.{name}")
    ],
}


@pytest.mark.parametrize("floor", LIGHT)
def test_light_floors_import_no_deep_learning_library(floor: str) -> None:
    modules = LIGHT[floor]
    assert modules, floor
    found = imported_by("\n".join(f"import {module}" for module in modules))
    assert not found & set(HEAVY)


def test_the_list_of_heavy_libraries_can_fail() -> None:
    assert "numpy" in imported_by("import numpy") & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sft", "--help"], ["recipes", "--help"]])
def test_help_imports_next_to_nothing(arguments: list[str]) -> None:
    found = imported_by(f"from gemma_tune.cli import main\nassert main({arguments!r}) == 0")
    # typer itself brings pydantic as soon as a command with options is parsed.
    ours = {"yaml", "gemma_tune.recipe.schema"} | ({"pydantic"} if len(arguments) == 1 else set())
    assert not found & {*HEAVY, *ours}


@pytest.mark.parametrize("module", ["gemma_tune", "gemma_tune.cli"])
def test_importing_the_package_imports_no_command(module: str) -> None:
    found = imported_by(f"import {module}")
    assert not found & {*HEAVY, "pydantic", "yaml", "rich"}
    assert not any(name.startswith("gemma_tune.commands.") for name in found)
