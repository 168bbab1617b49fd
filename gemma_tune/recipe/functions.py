"""A function of the user's own, which a recipe names by its file: `./mine.py:rows`."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.errors import Problem, UserError


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function and where it stands.

    Attributes:
        call: the function.
        path: of its file, as the recipe writes it.
        name: of the function.
    """

    call: Callable[..., Any]
    path: Path
    name: str


def is_function(name: str) -> bool:
    """Whether what a recipe names is a function by its file."""
    return ".py:" in name or name.endswith(".py")


def load_user_function(name: str) -> UserFunction:
    """Run the file and take the function. It is the user's own code, named in the user's own recipe.

    Raises:
        UserError: there is no such file or function, or the file fails.
    """
    path_text, _, function_name = name.partition(".py")
    path, function_name = Path(path_text + ".py").expanduser(), function_name.lstrip(":")
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="paths are relative to the working directory")
    if not function_name:
        raise UserError("which function of the file?", where=name, fix=f"write {path}:NAME")
    module = _module(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, defined, 1) or defined[:3]
        raise UserError(
            f"has no function {function_name!r}",
            where=str(path),
            fix=f"did you mean {', '.join(near)}?" if near else "",
        )
    return UserFunction(function, path, function_name)


def failure(error: Exception | SystemExit, path: Path) -> Problem:
    """What the user's file raised, at which of its lines, and what to do about it."""
    file = str(path.resolve())
    if isinstance(error, SyntaxError) and error.filename == file:
        return Problem(f"SyntaxError: {error.msg}", f"{path}:{error.lineno}", "correct the file")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0].replace("_", "-")
        return Problem(f"it imports {error.name}, which is not installed", place, f"pip install {package}")
    return Problem(f"{type(error).__name__}: {error}", place, "correct the function")


def _module(path: Path) -> Any:
    """The file as a module under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"_gemma_tune_user_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise UserError("cannot be imported", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by its name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError.of([failure(error, path)]) from error
    return module
