"""`gemma-tune data`: tokenise a recipe's data once, for all processes and runs that need the same; and what is there.

Needs the tokenizer and the data, never the weights, and no GPU: a login node will do.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.train import quieten
from gemma_tune.errors import AccessError, UserError
from gemma_tune.plan.choices_data import data_choices
from gemma_tune.plan.facts import model_facts
from gemma_tune.recipe.reader import read_recipe
from gemma_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    from gemma_tune.data.build import Prepared
    from gemma_tune.data.content import Content
    from gemma_tune.gemma.families import Family
    from gemma_tune.models.tokenizer import GemmaEncoder
    from gemma_tune.train.library import Kept


def prepare(recipe: str, overrides: list[str], out: str | None) -> int:
    """Tokenise what `recipe` says into a folder that its runs find by what it was made of.

    Args:
        recipe: path of the recipe.
        overrides: `a.b=c`, in order.
        out: another root than the library's.

    Raises:
        UserError: the recipe, the data; a stream; or data that cannot be told from any other.
        AccessError: the hub, or the disk.
    """
    read = read_recipe(recipe, overrides)
    if read.data.streaming:
        raise UserError(
            "a stream is read while it is trained on, and never prepared",
            where="data.streaming",
            fix="set data.streaming: false",
        )
    quieten()
    from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
    from gemma_tune.train import library

    family, _ = model_facts(read.model.name, read.model.revision)
    other = read.model.tokenizer
    tokenizer = load_tokenizer(other or read.model.name, None if other else read.model.revision, family)
    encoder = GemmaEncoder(tokenizer, family)
    keywords = {key: choice.value for key, choice in data_choices(read).items()}
    root = Path(out).expanduser() if out else library.library_folder()
    content = _content(read, family, encoder, keywords)
    kept = None if content and content.functions else _whole(content, root)
    if kept is None:
        _try_folder(root)
        kept = _make(read, recipe, family, encoder, keywords, content, root)
        console.out(f"prepared: {kept.folder}")
    else:
        console.out(f"it is prepared already: {kept.folder}")
    for line in kept.prepared.report.lines():
        console.out(f"  {console.escaped(line)}")
    _say_who_finds_it(read, recipe, kept.folder, content, out)
    return 0


def list_(out: str | None) -> int:
    """Print what is prepared: folder, size, when and by which recipe.

    Raises:
        UserError: `out` is no folder, or holds folders and no prepared data.
        AccessError: the folder cannot be read.
    """
    from gemma_tune.train import library

    root = Path(out).expanduser() if out else library.library_folder()
    if out and not root.is_dir():
        raise UserError("there is no such folder", where=str(root), fix="the --out of gemma-tune data prepare")
    total = 0
    try:
        told = dict(_told(root))
        if out and told and not any(sound for sound, _ in told.values()):
            fix = "the --out of gemma-tune data prepare: the folder above those that it names"
            raise UserError("holds no prepared data", where=str(root), fix=fix)
        for folder, size in library.shelves(root):
            total += size
            text = told[folder][1] if folder in told else "made just now"
            console.out(f"{folder}  {size / 1e6:,.2f} MB  {console.escaped(text)}")
    except OSError as exc:
        raise AccessError(f"cannot be read: {exc.strerror}", where=str(exc.filename or root)) from exc
    console.out(f"{total / 1e6:,.2f} MB in {root}; what is not needed any more may be removed: rm -r FOLDER")
    return 0


def _told(root: Path) -> Iterator[tuple[Path, tuple[bool, str]]]:
    """(folder, (whether it is prepared data, what to say of it)) of every folder in `root`; sizes are not looked at."""
    from gemma_tune.train import library
    from gemma_tune.train.checkpoint import Damaged

    for folder in root.iterdir() if root.is_dir() else ():
        if folder.is_dir():
            try:
                made = library.made_of(folder)
            except Damaged as exc:
                yield folder, (False, f"of no use: {exc}")
            else:
                yield folder, (True, f"{made['at']}  {made['stage']}, {made['rows']:,} rows, {made['recipe']}")


def _try_folder(root: Path) -> None:
    """Find out before the work whether `root` can be made and written; leaves nothing.

    Raises:
        AccessError: it cannot.
    """
    made: list[Path] = []
    try:
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            made.append(folder)
        if not root.is_dir() or not os.access(root, os.W_OK):
            raise AccessError("cannot be written", where=str(root), fix="choose another folder with --out")
    except FileExistsError:  # another process makes it too
        pass
    except OSError as exc:
        what = f"cannot be made: {exc.strerror}"
        raise AccessError(what, where=str(root), fix="choose another folder with --out") from exc
    finally:
        with suppress(OSError):  # another process already works there
            for folder in reversed(made):
                folder.rmdir()


def builder_of(stage: str) -> Callable[..., Prepared[Any]]:
    """The function that makes the rows of `stage`, as `train.run.Stage.prepare`, without importing its trainer."""
    from gemma_tune.data.build import build
    from gemma_tune.data.judged import build_judged
    from gemma_tune.data.pairs import build_pairs
    from gemma_tune.data.prompts import build_prompts

    builders: dict[str, Callable[..., Prepared[Any]]] = {
        "sft": build,
        "reward": build_pairs,
        "dpo": build_pairs,
        "kto": build_judged,
        "ppo": build_prompts,
    }
    return builders[stage]


def _content(recipe: Recipe, family: Family, encoder: GemmaEncoder, keywords: dict[str, Any]) -> Content | None:
    from gemma_tune.data.content import content_of

    return content_of(builder_of(recipe.stage).__name__, family, encoder.sha256, keywords)


def _whole(content: Content | None, root: Path, *, say: bool = True) -> Kept | None:
    """What is there already; None where nothing is, or nothing that may be used."""
    from gemma_tune.train import library
    from gemma_tune.train.checkpoint import Damaged

    try:
        return library.find(content, root) if content else None
    except (Damaged, OSError, ValueError) as exc:
        if say:
            console.note(f"what was prepared before is damaged, and made again: {exc}")
        return None


class _MadeMeanwhile(Exception):
    """Another process has made the same folder: what was made here is dropped."""


def _make(
    recipe: Recipe,
    path: str,
    family: Family,
    encoder: GemmaEncoder,
    keywords: dict[str, Any],
    content: Content | None,
    root: Path,
) -> Kept:
    from gemma_tune.export.staging import staged
    from gemma_tune.train import library
    from gemma_tune.train.session import now

    prepared = builder_of(recipe.stage)(family, encoder, **keywords)
    again = _content(recipe, family, encoder, keywords)
    if again is None:
        raise UserError(
            "the commit of a hub dataset is not known here, so that no run could tell whether it is the same",
            where="data.sources",
            fix="set its revision to a commit, or prepare it where the hub can be reached",
        )
    if content is None or again.key != content.key:
        raise UserError("the data changed while it was read", where="data.sources", fix="run the same command again")
    folder = library.place_for(content, root)
    made = {"at": now(), "recipe": path, "stage": recipe.stage, "rows": prepared.report.rows}
    # What stands there is damaged, or by a function: whoever has mapped it keeps what it has.
    with suppress(_MadeMeanwhile), staged(folder, replace=True) as staging:
        # Under the lock: another process may have ended while this one read its data.
        if not content.functions and _whole(content, root, say=False) is not None:
            raise _MadeMeanwhile
        library.keep(prepared, staging, content, made)
    kept = library.find(content, root)
    assert kept is not None
    return kept


def _say_who_finds_it(recipe: Recipe, path: str, folder: Path, content: Content | None, out: str | None) -> None:
    variable = ""
    if out:
        from gemma_tune.train.library import VARIABLE

        variable = f"{VARIABLE}={shlex.quote(str(folder.parent.absolute()))} "
    console.out(f"runs of this recipe use it: {variable}gemma-tune {recipe.stage} {shlex.quote(path)}")
    for name in content.functions if content else ():
        console.note(f"runs use the rows of {name} as they are now; prepare again when what it reads has changed")
    for name, commit in content.commits.items() if content else ():
        console.note(f"{name} is at commit {commit}; a machine without network finds it by `revision: {commit}`")
