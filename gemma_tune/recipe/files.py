"""A recipe file -> its text. Whatever the path names, reading ends soon and never takes more than a limit."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from gemma_tune.errors import GemmaTuneError, UserError
from gemma_tune.recipe.names import did_you_mean, nearest

MAX_BYTES = 1 << 20


def read_bytes(name: str, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes. A pipe or a device is refused before it is read."""
    try:
        # Opening a pipe without O_NONBLOCK would wait for its writer for ever.
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise UserError("no such file", where=name, fix=_nearest_files(name)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {_reason(error)}", where=name, fix="check the path and its rights") from None
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        if stat.S_ISDIR(kind):
            raise UserError("is a folder, not a recipe", where=name, fix=_recipes_in(Path(name)))
        raise UserError("is a pipe or a device, not a file", where=name, fix="save the recipe in a file first")
    with os.fdopen(descriptor, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"is larger than {limit:,} bytes", where=name, fix="a recipe is a short YAML file")
    return data


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _recipes_in(folder: Path) -> str:
    names = sorted(str(path) for path in folder.glob("*.y*ml"))[:5]
    return f"name one file in it: {', '.join(names)}" if names else "name a .yaml file"


def _nearest_files(name: str) -> str:
    folder = Path(name).parent
    try:
        names = [path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml")]
    except OSError:
        names = []
    near = nearest(Path(name).name, names)
    if near:
        return did_you_mean([str(folder / other) for other in near])
    shipped = _shipped_name(name)
    if shipped:
        return f"gemma-tune recipes copy {shipped}"
    return "check the path; `gemma-tune recipes list` shows the recipes that come with gemma-tune"


def _shipped_name(name: str) -> str:
    """The shipped recipe of this name, for somebody who is not in a checkout; empty where there is none."""
    from gemma_tune.recipe.shipped import find_shipped

    try:
        return find_shipped(Path(name).name).name
    except GemmaTuneError:
        return ""


_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes, name: str) -> str:
    """Text of `data`: UTF-8, or UTF-16 and UTF-32 where a byte order mark says so."""
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise UserError(
            f"byte {error.start} (0x{byte:02x}) is not {encoding.removesuffix('-sig').upper()}",
            where=f"{name}:{line}",
            fix="save the file as UTF-8",
        ) from None
