"""What comes with gemma-tune beside its code: recipes, sample rows, and accelerate's files.

In a checkout they are the folders recipes/, data/ and accelerate_configs/; an installed package has them as
gemma_tune/_recipes, _data and _accelerate_configs.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gemma_tune
from gemma_tune.errors import AccessError, UserError
from gemma_tune.recipe.names import did_you_mean, nearest

_FIELD = re.compile(r"#\s*(What|Run|Measured):\s*(.*)")
_CONTINUATION = re.compile(r"#\s{3,}(\S.*)")


@dataclass(frozen=True, slots=True)
class Shipped:
    """A recipe that comes with gemma-tune. The last three are its header comments, empty where it has none.

    Attributes:
        name: the file's name without `.yaml`.
        path: the file.
        what: what it does, one sentence.
        run: the command that runs it.
        measured: what somebody measured, or that nobody did.
    """

    name: str
    path: Path
    what: str = ""
    run: str = ""
    measured: str = ""


Folder = Literal["recipes", "data", "accelerate_configs"]
"""What is shipped beside the code. The wheel has each under `_` and its name."""


def shipped_folder(name: Folder) -> Path:
    """The folder of the shipped recipes, of the sample rows, or of accelerate's files.

    Raises:
        AccessError: the installation has none.
    """
    package = Path(gemma_tune.__file__).resolve().parent
    for folder in (package / f"_{name}", package.parent / name):
        if folder.is_dir():
            return folder
    raise AccessError(f"this installation has no {name}", where=str(package), fix="install gemma-tune again")


def sample_file(name: str) -> Path:
    """The file of sample rows that a recipe calls `sample:NAME`.

    Raises:
        UserError: there is none of this name.
    """
    files = {path.stem: path for path in shipped_folder("data").glob("*.jsonl")}
    if name in files:
        return files[name]
    hint = did_you_mean(nearest(name, files)) or f"there are: {', '.join(sorted(files))}"
    raise UserError(f"there is no sample {name!r}", where="data.sources", fix=hint)


def shipped_recipes(folder: Path | None = None) -> list[Shipped]:
    """All shipped recipes, by name."""
    paths = sorted((folder or shipped_folder("recipes")).glob("*.yaml"))
    return [Shipped(path.stem, path, **read_header(path.read_text("utf-8"))) for path in paths]


def read_header(text: str) -> dict[str, str]:
    """The fields of the comment block at the top: `# What: ...`, `# Run: ...`, `# Measured: ...`.

    A comment that is indented by three or more blanks goes on with the field above it.
    """
    fields: dict[str, str] = {}
    last = ""
    for line in text.removeprefix("\ufeff").splitlines():
        if not line.startswith("#"):
            break
        if found := _FIELD.match(line):
            last = found[1].lower()
            fields[last] = found[2].strip()
        elif last and (more := _CONTINUATION.match(line)):
            fields[last] = f"{fields[last]} {more[1].strip()}"
        else:
            last = ""
    return fields


def find_shipped(name: str, folder: Path | None = None) -> Shipped:
    """The shipped recipe `name`, with or without `.yaml` and a leading `recipes/`.

    Raises:
        UserError: there is none of this name.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes(folder)}
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    if wanted in recipes:
        return recipes[wanted]
    hint = did_you_mean(nearest(wanted, recipes)) or "see: gemma-tune recipes list"
    raise UserError(f"there is no shipped recipe {name!r}", fix=hint)


def copy_shipped(name: str, destination: str | Path | None = None, folder: Path | None = None) -> list[Path]:
    """Copy the shipped recipe `name` to a file or into a folder (default: the working directory).

    A Python file that the recipe, or such a file, names as `recipes/FILE.py` goes along, and what the recipe calls
    `recipes/FILE` is called by its new path in the copy, so that the copy runs where there is no recipes/ folder.

    Returns:
        The new recipe first, then the files that it needs.

    Raises:
        UserError: no such recipe, or a file exists already.
        AccessError: a file cannot be written.
    """
    recipe = find_shipped(name, folder)
    target = Path(destination) if destination else Path(recipe.path.name)
    if target.is_dir():
        target = target / recipe.path.name
    elif str(destination or "").endswith("/"):
        raise UserError("there is no such folder", where=str(destination), fix=f"mkdir -p {destination}")
    text = recipe.path.read_text("utf-8")
    beside = _needed(text, sorted(recipe.path.parent.glob("*.py")))
    contents = {target.with_name(file.name): file.read_bytes() for file in beside}
    for path in (target, *contents):
        old = recipe.path.name if path == target else path.name
        text = _renamed(text, f"recipes/{old}", str(path))
    # A file that is there already and the same is no reason to stop: another copy has brought it.
    files = {target: text.encode("utf-8", "surrogateescape")}
    files |= {path: content for path, content in contents.items() if not _holds(path, content)}
    for path in files:
        if path.exists():  # it is the user's own and must not be lost
            raise UserError("exists already", where=str(path), fix="name another file, or remove this one")
    for path, content in files.items():
        _write_new(path, content)
    return [target, *contents]


def _needed(text: str, files: Sequence[Path]) -> list[Path]:
    """Those of `files` that a recipe names, and those that they name themselves."""
    named = [file for file in files if f"recipes/{file.name}" in text]
    more = "".join(file.read_text("utf-8") for file in named)
    return [file for file in files if file in named or f"recipes/{file.name}" in more]


def _renamed(text: str, old: str, new: str) -> str:
    """`old` -> `new` in a recipe: as a shell word in its comments, as in a double-quoted text elsewhere."""
    shell, quoted = shlex.quote(new), json.dumps(new, ensure_ascii=False)[1:-1]
    return "".join(
        line.replace(old, shell if line.startswith("#") else quoted) for line in text.splitlines(keepends=True)
    )


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _write_new(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileNotFoundError:
        raise UserError("its folder does not exist", where=str(path), fix=f"mkdir -p {path.parent}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AccessError(f"cannot be written: {reason}", where=str(path), fix="name another folder") from None
