"""The recipes that come with gemma-tune, and the schema beside them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

import gemma_tune
from gemma_tune.commands import recipes as command
from gemma_tune.errors import AccessError, UserError
from gemma_tune.recipe import shipped, yaml
from gemma_tune.recipe.reader import read_recipe, read_recipe_text, recipe_schema
from gemma_tune.recipe.schema import Ppo
from gemma_tune.recipe.shipped import (
    Folder,
    copy_shipped,
    find_shipped,
    read_header,
    sample_file,
    shipped_folder,
    shipped_recipes,
)

ROOT = Path(gemma_tune.__file__).parents[1]
GUIDE = ROOT / "docs" / "rlhf.md"

HEADER = """\
# yaml-language-server: $schema=recipe.schema.json
# What:     QLoRA of a small model
#           on quotes
# Run:      gemma-tune sft recipes/quickstart.yaml
# Measured: not yet measured
# A remark.
#           of two lines
stage: sft
# What: not this
"""


def test_header_fields() -> None:
    assert read_header(HEADER) == {
        "what": "QLoRA of a small model on quotes",
        "run": "gemma-tune sft recipes/quickstart.yaml",
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
    assert copy_shipped("quickstart", folder=folder) == [Path("quickstart.yaml")]
    assert (here / "quickstart.yaml").read_text() == HEADER.replace("recipes/quickstart", "quickstart")
    assert copy_shipped("quickstart", "mine.yaml", folder) == [Path("mine.yaml")]
    assert "Run:      gemma-tune sft mine.yaml\n" in (here / "mine.yaml").read_text()
    (here / "sub").mkdir()
    assert copy_shipped("quickstart", "sub", folder) == [Path("sub/quickstart.yaml")]
    assert copy_shipped("other", "sub/", folder) == [Path("sub/other.yaml")]


def test_a_copy_brings_the_function_that_it_names(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "rows.py").write_text("def rows(): ...\n")
    (folder / "unrelated.py").write_text("")
    (folder / "own.yaml").write_text('# Run: gemma-tune sft recipes/own.yaml\nname: "recipes/rows.py:rows"\n')
    here = tmp_path / 'my "new" place'
    here.mkdir()
    monkeypatch.chdir(tmp_path)
    assert copy_shipped("own", here.name, folder) == [Path(here.name, "own.yaml"), Path(here.name, "rows.py")]
    assert sorted(file.name for file in here.iterdir()) == ["own.yaml", "rows.py"]
    text = (here / "own.yaml").read_text()
    assert yaml.load(here / "own.yaml").root.value["name"].value == 'my "new" place/rows.py:rows'  # type: ignore[index]
    assert shlex.split(text.splitlines()[0])[-1] == 'my "new" place/own.yaml'
    # A second copy shares it; another file of that name is the user's, and then nothing is written.
    assert copy_shipped("own", here / "second.yaml", folder)[1] == here / "rows.py"
    (here / "rows.py").write_text("precious")
    with pytest.raises(UserError, match=r"rows\.py: exists already"):
        copy_shipped("own", here / "third.yaml", folder)
    assert (here / "rows.py").read_text() == "precious" and not (here / "third.yaml").exists()


def test_a_copy_brings_what_its_function_needs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "talks.py").write_text("")
    (folder / "rows.py").write_text('"""Reads recipes/talks.py."""\n')
    (folder / "own.yaml").write_text('name: "recipes/rows.py:rows"\n')
    monkeypatch.chdir(tmp_path)
    assert copy_shipped("own", folder=folder) == [Path("own.yaml"), Path("rows.py"), Path("talks.py")]


@pytest.mark.parametrize("recipe", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_a_copy_of_any_recipe_needs_no_checkout(
    recipe: shipped.Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target, *_ = copy_shipped(recipe.name)
    assert "recipes/" not in target.read_text("utf-8")
    copied = read_recipe(target)
    names = [source.name for source in copied.data.sources] + [source.source for source in copied.ppo.reward]
    for file in (name.partition(":")[0] for name in names):
        assert not file.endswith(".py") or Path(file).is_file()


def test_an_existing_file_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        copy_shipped("quickstart", mine, folder)
    assert mine.read_text() == "precious"


def test_a_missing_target_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its folder does not exist\n  fix: mkdir -p"):
        copy_shipped("quickstart", tmp_path / "a" / "b.yaml", folder)
    with pytest.raises(UserError, match=r"there is no such folder\n  fix: mkdir -p"):
        copy_shipped("quickstart", f"{tmp_path}/a/", folder)
    assert not (tmp_path / "a").exists()


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


def test_the_wheel_carries_what_is_shipped() -> None:
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {name: f"gemma_tune/_{name}" for name in get_args(Folder)}


def test_the_recipes_of_the_readme_are_read() -> None:
    whole, dpo, ppo = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    recipe = read_recipe_text(whole)
    assert recipe.model == read_recipe(shipped_folder("recipes") / "ultrachat_qlora.yaml").model
    preferences = read_recipe_text(dpo)
    assert (preferences.stage, preferences.model.adapter) == ("dpo", "runs/my-sft")
    rewarded = read_recipe_text(ppo)
    assert (rewarded.stage, rewarded.ppo.models) == ("ppo", ("runs/my-reward",))


def test_the_recipes_of_the_guide_are_read() -> None:
    whole, watched, without_critic = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert read_recipe_text(whole).ppo.models == ("runs/my-reward",)
    section = r"(?m)^ppo:\n(?:  .*\n)+"
    assert [one.weight for one in read_recipe_text(re.sub(section, watched, whole)).ppo.reward] == [1, 0]
    in_groups = re.sub(r"(?m)^batch:.*\n", "", re.sub(section, without_critic, whole))
    assert read_recipe_text(in_groups).ppo.estimator == "rloo"


def test_the_guide_has_every_key_of_ppo_with_its_default() -> None:
    settings = GUIDE.read_text("utf-8").partition("\n## Settings\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| ([^|]+?) \|", settings))
    for key, field in Ppo.model_fields.items():
        default = field.get_default()
        number = f"{default:,}" if type(default) in (int, float) else str(default).lower()
        assert rows[key] == ("-" if default == () else number), key


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
