"""The recipes that come with gemma-tune, and the schema beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gemma_tune
from gemma_tune.commands import recipes as command
from gemma_tune.errors import AccessError, UserError
from gemma_tune.recipe import shipped
from gemma_tune.recipe.reader import read_recipe, recipe_schema
from gemma_tune.recipe.shipped import (
    copy_shipped,
    find_shipped,
    read_header,
    sample_file,
    shipped_folder,
    shipped_recipes,
)

ROOT = Path(gemma_tune.__file__).parents[1]

HEADER = """\
# yaml-language-server: $schema=recipe.schema.json
# What:     QLoRA of a small model
#           on quotes
# Run:      gemma-tune sft recipes/x.yaml
# Measured: not yet measured
# A remark.
#           of two lines
stage: sft
# What: not this
"""


def test_header_fields() -> None:
    assert read_header(HEADER) == {
        "what": "QLoRA of a small model on quotes",
        "run": "gemma-tune sft recipes/x.yaml",
        "measured": "not yet measured",
    }
    assert read_header("stage: sft\n# What: late\n") == {}


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_every_shipped_recipe_is_read_and_says_what_it_is(recipe: shipped.Shipped) -> None:
    read_recipe(recipe.path)
    assert recipe.what and recipe.measured
    assert f"{recipe.name}.yaml" in recipe.run
    assert recipe.path.read_text("utf-8").startswith(f"# yaml-language-server: $schema={command.SCHEMA_FILE}\n")


def test_the_schema_beside_the_recipes_is_the_current_one() -> None:
    # After a change of the schema: gemma-tune recipes schema > recipes/recipe.schema.json
    path = shipped_folder("recipes") / command.SCHEMA_FILE
    assert json.loads(path.read_text("utf-8")) == recipe_schema()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "quickstart.yaml").write_text(HEADER)
    (folder / "other.yaml").write_text("stage: sft\n")
    (folder / "notes.txt").write_text("no recipe")
    return folder


def test_listing(folder: Path) -> None:
    assert [(recipe.name, recipe.what) for recipe in shipped_recipes(folder)] == [
        ("other", ""),
        ("quickstart", "QLoRA of a small model on quotes"),
    ]


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml"])
def test_found_by_any_form_of_its_name(name: str, folder: Path) -> None:
    assert find_shipped(name, folder).path == folder / "quickstart.yaml"


def test_an_unknown_name_gets_a_hint(folder: Path) -> None:
    with pytest.raises(UserError, match=r"there is no shipped recipe 'quikstart'\n  fix: did you mean 'quickstart'\?"):
        find_shipped("quikstart", folder)
    with pytest.raises(UserError, match="gemma-tune recipes list"):
        find_shipped("zzz", folder)


def test_copies(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert copy_shipped("quickstart", folder=folder) == Path("quickstart.yaml")
    assert (here / "quickstart.yaml").read_text() == HEADER
    assert copy_shipped("quickstart", "mine.yaml", folder) == Path("mine.yaml")
    (here / "sub").mkdir()
    assert copy_shipped("quickstart", "sub", folder) == Path("sub/quickstart.yaml")


def test_an_existing_file_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        copy_shipped("quickstart", mine, folder)
    assert mine.read_text() == "precious"


def test_a_missing_target_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its folder does not exist\n  fix: mkdir -p"):
        copy_shipped("quickstart", tmp_path / "a" / "b.yaml", folder)


def test_a_target_below_a_file(folder: Path) -> None:
    with pytest.raises(AccessError, match="cannot be written"):
        copy_shipped("quickstart", folder / "other.yaml" / "x.yaml", folder)


def test_an_installed_package_has_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "gemma_tune"
    package.mkdir()
    monkeypatch.setattr(shipped.gemma_tune, "__file__", str(package / "__init__.py"))
    with pytest.raises(AccessError, match="has no recipes"):
        shipped_folder("recipes")
    (tmp_path / "recipes").mkdir()
    assert shipped_folder("recipes") == tmp_path / "recipes"
    (package / "_recipes").mkdir()
    assert shipped_folder("recipes") == package / "_recipes"


def test_a_sample_is_found_by_its_name() -> None:
    assert sample_file("ultrachat_200k") == ROOT / "data" / "ultrachat_200k.jsonl"
    with pytest.raises(UserError, match="no sample 'ultrachat_200'") as error:
        sample_file("ultrachat_200")
    assert "ultrachat_200k" in error.value.problems[0].fix


def test_the_wheel_carries_the_recipes_and_the_samples() -> None:
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "gemma_tune/_recipes", "data": "gemma_tune/_data"}


def test_the_commands(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shipped, "shipped_folder", lambda name: folder)
    assert command.list_() == 0
    listed = capsys.readouterr().out
    assert "quickstart" in listed and "QLoRA of a small model on quotes" in listed and "not yet measured" in listed
    assert command.copy("quickstart", str(tmp_path)) == 0
    assert f"gemma-tune sft {tmp_path}/quickstart.yaml" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((tmp_path / command.SCHEMA_FILE).read_text()) == recipe_schema()
    assert command.schema() == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()
