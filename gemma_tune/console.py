"""How we speak: results go to stdout, errors and notes to stderr, and nothing that we print can drive a terminal.

rich is imported when something is printed, so that importing this module costs nothing.
Colour follows rich: off when the stream is no terminal or NO_COLOR is set, on when FORCE_COLOR is set.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import GemmaTuneError

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120
"""Columns of a table whose reader is a file or a pipe, unless COLUMNS says otherwise."""

SHOWN_PROBLEMS = 20
"""Findings that are printed in full; the rest is counted."""

TOKEN = re.compile(
    r"\b(hf_(?=\w{16})|wandb_v\d+_(?=\w{16})"
    r"|sk-(?=[A-Za-z0-9]{20})|sk-(?:proj|svcacct|admin|ant|or)-(?=[\w-]{20})"
    r"|gh[pousr]_(?=[A-Za-z0-9]{20})|github_pat_(?=\w{22})"
    r"|A[KS]IA(?=[A-Z0-9]{16}\b)|AIza(?=[\w-]{35}))[\w-]+",
    re.ASCII,
)
"""What access tokens look like: the Hugging Face hub, W&B, OpenAI and those alike, GitHub, AWS and Google.

Group 1 is the kind, which may be shown.
"""

SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Environment variables whose value must never be printed."""

# Format characters that reorder text or cannot be seen. The joiners of emoji and of Indic scripts are not among them.
_HIDDEN = frozenset("\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            # rich would end the process with the code of a bug; `cli.main` knows better.
            raise

    stream = sys.stderr if stderr else sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    return PipeConsole(stderr=stderr, width=PIPE_WIDTH if wide else None, highlight=False, markup=False, emoji=False)


@functools.cache
def stdout() -> Console:
    """The rich console of stdout, for tables and progress bars."""
    return _console(stderr=False)


@functools.cache
def stderr() -> Console:
    """The rich console of stderr."""
    return _console(stderr=True)


def out(*objects: Any) -> None:
    """Print text or rich objects to stdout. Text is printed as it is: no markup, no wrapping."""
    stdout().print(*objects, soft_wrap=all(isinstance(item, str) for item in objects))


def err(*objects: Any) -> None:
    """Print text or rich objects to stderr. Text is printed as it is: no markup, no wrapping."""
    stderr().print(*objects, soft_wrap=all(isinstance(item, str) for item in objects))


def note(text: str) -> None:
    """Something that the user should know and that stops nothing: one line on stderr."""
    err(f"note: {printable(text)}")


def masked(text: str) -> str:
    """`text` without access tokens: neither what looks like one nor the values of SECRET_VARIABLES."""
    text = TOKEN.sub(lambda found: f"{found[1]}***", text)
    for variable in SECRET_VARIABLES:
        value = os.environ.get(variable, "").strip()
        if len(value) >= 8:
            text = text.replace(value, "***")
    return text


def escaped(text: str) -> str:
    """`text` with control, bidirectional and lone-surrogate characters written as `\\x1b` or `\\u202e`.

    Line breaks and tabs stay. What a dataset or a recipe contains can thereby neither move the cursor nor hide itself.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped_character(character) for character in text)


def _escaped_character(character: str) -> str:
    if character in "\n\t":
        return character
    if character in _HIDDEN or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character


def printable(text: object) -> str:
    """`text` as it may be printed: tokens masked, control characters escaped."""
    return escaped(masked(str(text)))


def quoted(value: object, limit: int = 80) -> str:
    """A value for an error message: text in quotes on one line, cut after `limit` characters."""
    if not isinstance(value, str):
        return printable(value)[:limit]
    text = printable(value).replace("\n", "\\n").replace("\t", "\\t")
    return f"'{text}'" if len(text) <= limit else f"'{text[:limit]}...' ({len(value):,} characters)"


def print_error(error: GemmaTuneError) -> None:
    """Print every problem of `error` to stderr: `error: WHERE: WHAT`, then `  fix: ...`."""
    for problem in error.problems[:SHOWN_PROBLEMS]:
        place = f"{problem.where}: " if problem.where else ""
        _print_labelled("error:", "bold red", f"{place}{problem.what}")
        if problem.fix:
            _print_labelled("  fix:", "bold cyan", problem.fix)
    if len(error.problems) > SHOWN_PROBLEMS:
        err(f"... and {len(error.problems) - SHOWN_PROBLEMS} more")


def _print_labelled(label: str, style: str, text: str) -> None:
    from rich.text import Text

    stderr().print(Text.assemble((label, style), " ", printable(text)), soft_wrap=True)
