"""The pages that people read, in parts that tests can hold to the code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import gemma_tune

ROOT = Path(gemma_tune.__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md")
}
"""Path from the root -> text."""

_FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [match[3] for match in _FENCE.finditer(text) if match[2] == language]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in backticks outside of blocks, without redirections."""
    return [" ".join(span.split(" > ")[0].split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def command_lines(text: str) -> list[str]:
    """The commands of the bash blocks: continued lines joined; comments, redirections and variables set before gone."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    bare = (re.sub(r"(^|\s)#.*|\s>\s\S+\s*$", "", line).strip() for line in lines)
    return [re.sub(r"^(?:\w+=\S*\s+)+", "", line) for line in bare if line]


def written_out(line: str) -> list[str]:
    """A synopsis as commands: `[--x A|B|...]` is `--x A` and `--x B`."""
    words = re.sub(r"[\[\]]", "", line).split()
    choices = [[choice for choice in word.split("|") if choice != "..."] for word in words if word != "..."]
    most = max(map(len, choices), default=0)
    every = list(product(*choices))
    return [" ".join(words) for words in every[: 4 * most]]


def filled(page: str, tables: Mapping[str, str], command: str) -> str:
    """A page with its generated tables as they are now: each stands between two comments, the first with its name."""
    for name, table in tables.items():
        place = re.search(rf"<!-- {name}: .*?<!-- end -->\n", page, re.DOTALL)
        assert place, name
        page = page.replace(place[0], f"<!-- {name}: {command} -->\n\n{table}\n<!-- end -->\n")
    return page


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a table; a `|` in one is written so that it is none of the table's."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    found = set()
    for title in re.findall(r"(?m)^#+ (.+)$", prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        found.add(re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-"))
    return found
