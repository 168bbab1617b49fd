"""Tokenizer, data and weights of a run on this disk. Of several processes, the first of each node fetches them."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
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
from gemma_tune.train.node import Node, node_of

Prepare = Callable[..., Prepared[Any]]
"""(family, encoder, keywords of the plan's data section) -> rows."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What lies on this disk, or in this memory.

    Attributes:
        source: the base's folder, with its weights.
        tokenizer, encoder: of the base, or of what the recipe names.
        data: its rows, mapped into memory where they are shared.
        shared: the folder of the data where this process made it for the others of its machine. It may go when all
            have opened it (`remove_shared`): what is mapped stays readable.
    """

    source: ModelSource
    tokenizer: Any
    encoder: GemmaEncoder
    data: Prepared[Any]
    shared: Path | None = None


def fetch(plan: Plan, prepare: Prepare, console: Console) -> Parts:
    """Tokenizer and data of `plan`, then its weights: a mistake in the data costs no download of gigabytes.

    Raises:
        UserError, AccessError: as what is done here; and where the nodes read different data, or one waits too long.
        SystemExit: another process failed and says why.
    """
    node = node_of(plan)
    if node is not None and not node.leads:
        return taken(plan, prepare, node)
    with node.leading() if node else nullcontext():
        return made(plan, prepare, console, node)


def made(plan: Plan, prepare: Prepare, console: Console, node: Node | None) -> Parts:
    """The parts, fetched by this process; those of `node` that wait get each as soon as it is there."""
    family, chosen = FAMILIES[plan.family], plan.values("model")
    say = node.does if node else lambda what: None
    say("fetches the tokenizer")
    other = chosen.get("tokenizer")
    spoken = resolve(other or chosen["name"], None if other else chosen.get("revision"), need="tokenizer")
    if node:
        node.hand_over("tokenizer", {"path": str(spoken.path)})
    tokenizer = open_tokenizer(spoken, family)
    encoder = GemmaEncoder(tokenizer, family)
    say("reads and tokenises the data")
    kept = prepared_before(prepare, family, encoder.sha256, plan.values("data"), console)
    data = kept.prepared if kept else prepare(family, encoder, **plan.values("data"))
    shared, folder = None, kept.folder if kept else None
    if node:
        if folder is None and not plan.values("data").get("streaming"):
            say("writes the data for the other processes")
            shared = folder = shared_folder(data)
            data = read_prepared(folder)
            pyarrow.default_memory_pool().release_unused()  # what was built lies in the folder now
        node.agree_on(data.fingerprint)
        node.hand_over("data", {"path": str(folder) if folder else None})
    say("fetches the weights")
    source = resolve(chosen["name"], chosen.get("revision"))
    if node:
        node.hand_over("weights", {"path": str(source.path), "revision": source.revision})
    return Parts(source, tokenizer, encoder, data, shared)


def taken(plan: Plan, prepare: Prepare, node: Node) -> Parts:
    """The parts that another process of this machine fetches. Nothing is downloaded; a stream everybody reads."""
    family, chosen = FAMILIES[plan.family], plan.values("model")
    path = Path(node.take("tokenizer")["path"])
    tokenizer = open_tokenizer(ModelSource(chosen.get("tokenizer") or chosen["name"], path, None), family)
    encoder = GemmaEncoder(tokenizer, family)
    folder = node.take("data")["path"]
    data = read_prepared(Path(folder)) if folder else prepare(family, encoder, **plan.values("data"))
    weights = node.take("weights")
    return Parts(ModelSource(chosen["name"], Path(weights["path"]), weights["revision"]), tokenizer, encoder, data)


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
    """`data` in a temporary folder of this machine, which at the latest goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix="gemma-tune-data-"))
    atexit.register(remove_shared, folder)
    with disk_errors(folder, AccessError, fix="make room, or set TMPDIR to a larger disk of this machine"):
        write_prepared(data, folder)
    return folder


def remove_shared(folder: Path | None) -> None:
    """Remove what `shared_folder` made, if anything. Call it when all processes of the machine have opened it."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
