"""Tokenizer, data and weights of a run on this disk. Of several processes, the first of each node fetches them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from gemma_tune.data.build import Prepared
from gemma_tune.data.content import content_of
from gemma_tune.data.prepared import read_prepared, write_prepared
from gemma_tune.errors import AccessError
from gemma_tune.gemma.families import FAMILIES, Family
from gemma_tune.models.reference import ModelSource, resolve
from gemma_tune.models.tokenizer import GemmaEncoder, open_tokenizer
from gemma_tune.plan.types import Plan
from gemma_tune.train import library
from gemma_tune.train.checkpoint import Damaged, disk_errors
from gemma_tune.train.node import node_of

Prepare = Callable[..., Prepared[Any]]
"""(family, encoder, keywords of the plan's data section) -> rows."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What lies on this disk, or in this memory.

    Attributes:
        source: the base's folder, with its weights.
        spoken: the folder of the tokenizer, which may be another model's.
        tokenizer, encoder: what was read there.
        data: its rows, mapped into memory where they are shared.
    """

    source: ModelSource
    spoken: ModelSource
    tokenizer: Any
    encoder: GemmaEncoder
    data: Prepared[Any]


def fetch(plan: Plan, prepare: Prepare, console: Console) -> Parts:
    """Tokenizer and data of `plan`, then its weights: a mistake in the data costs no download of gigabytes.

    Raises:
        UserError, AccessError: as what is done here; and where the nodes read different data, or one waits too long.
        SystemExit: another process failed and says why.
    """
    node = node_of(plan)
    if node is None:
        return fetch_alone(plan, prepare, console)[0]
    if not node.leads:
        return taken(plan, prepare, node.take())
    with node.leading():
        parts, folder = fetch_alone(plan, prepare, console, does=node.does)
        if folder is None and not plan.values("data").get("streaming"):
            node.does("writes the data for the other processes")
            folder = shared_folder(parts.data)
            parts = replace(parts, data=read_prepared(folder))
        node.agree_on(parts.data.fingerprint)
        folders = {"spoken": parts.spoken.path, "data": folder, "path": parts.source.path}
        made = {name: str(path) if path else None for name, path in folders.items()}
        node.hand_over(made | {"revision": parts.source.revision})
        return parts


def fetch_alone(
    plan: Plan, prepare: Prepare, console: Console, does: Callable[[str], None] = lambda what: None
) -> tuple[Parts, Path | None]:
    """What one process does for all, and the folder of the data where it was prepared before."""
    family, chosen = FAMILIES[plan.family], plan.values("model")
    does("fetches the tokenizer")
    other = chosen.get("tokenizer")
    spoken = resolve(other or chosen["name"], None if other else chosen.get("revision"), need="tokenizer")
    tokenizer = open_tokenizer(spoken, family)
    encoder = GemmaEncoder(tokenizer, family)
    does("reads and tokenises the data")
    kept = prepared_before(prepare, family, encoder.sha256, plan.values("data"), console)
    data = kept.prepared if kept else prepare(family, encoder, **plan.values("data"))
    does("fetches the weights")
    source = resolve(chosen["name"], chosen.get("revision"))
    return Parts(source, spoken, tokenizer, encoder, data), kept.folder if kept else None


def taken(plan: Plan, prepare: Prepare, made: dict[str, Any]) -> Parts:
    """The parts that another process of this machine fetched. Nothing is downloaded; a stream everybody reads."""
    family, name = FAMILIES[plan.family], plan.values("model")["name"]
    folder = made["data"]
    shared = read_prepared(Path(folder)) if folder else None  # first: what is mapped outlives its folder
    spoken = ModelSource(plan.values("model").get("tokenizer") or name, Path(made["spoken"]), None)
    tokenizer = open_tokenizer(spoken, family)
    encoder = GemmaEncoder(tokenizer, family)
    data = shared or prepare(family, encoder, **plan.values("data"))
    return Parts(ModelSource(name, Path(made["path"]), made["revision"]), spoken, tokenizer, encoder, data)


def prepared_before(
    prepare: Prepare, family: Family, tokenizer: str, keywords: dict[str, Any], console: Console
) -> library.Kept | None:
    """What `gemma-tune data prepare` made of the same content; None where it did not, or where it is damaged."""
    if not library.library_folder().is_dir():
        return None  # nobody ever prepared anything: no file needs to be hashed
    content = content_of(prepare.__name__, family, tokenizer, keywords)
    if content is None:
        return None
    say = partial(console.print, highlight=False, soft_wrap=True)
    try:
        kept = library.find(content)
    except (Damaged, OSError, ValueError) as exc:
        say(f"the prepared data in {library.place_for(content)} is not used, and all is read again: {exc}")
        return None
    if kept is not None:
        say(f"data: prepared on {kept.made['at']}, read from {kept.folder}")
        for name in content.functions:
            say(f"what {name} reads now is not looked at")
    return kept


def shared_folder(data: Prepared[Any]) -> Path:
    """`data` in a temporary folder of this machine, which is gone with this process."""
    folder = Path(tempfile.mkdtemp(prefix="gemma-tune-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with disk_errors(folder, AccessError, fix="make room, or set TMPDIR to a larger disk of this machine"):
        write_prepared(data, folder)
    return folder
