"""`gemma-tune data`: tokenise a recipe's data once, for all processes and runs that need the same; and what is there.

Needs the tokenizer and the data, never the weights, and no GPU: a login node will do.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.commands.train import quieten
from gemma_tune.errors import UserError
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
        kept = _make(read, recipe, family, encoder, keywords, content, root)
        console.out(f"prepared: {kept.folder}")
    else:
        console.out(f"it is prepared already: {kept.folder}")
    for line in kept.prepared.report.lines():
        console.out(f"  {console.escaped(line)}")
    _say_who_finds_it(read, recipe, kept.folder, content, out)
    return 0


def list_(out: str | None) -> int:
    """Print what is prepared: folder, size, when and by which recipe."""
    from gemma_tune.train import library
    from gemma_tune.train.checkpoint import Damaged, read_manifest

    root = Path(out).expanduser() if out else library.library_folder()
    total = 0
    for folder, size in library.shelves(root):
        total += size
        try:
            made = read_manifest(folder)["made"]
            told = f"{made['at']}  {made['stage']}, {made['rows']:,} rows, {made['recipe']}"
        except Damaged as exc:
            told = f"of no use: {exc}"
        console.out(f"{folder}  {size / 1e6:,.2f} MB  {console.escaped(told)}")
    console.out(f"{total / 1e6:,.2f} MB in {root}; what is not needed any more may be removed: rm -r FOLDER")
    return 0


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


def _whole(content: Content | None, root: Path) -> Kept | None:
    """What is there already; None where nothing is, or nothing that may be used."""
    from gemma_tune.train import library
    from gemma_tune.train.checkpoint import Damaged

    try:
        return library.find(content, root) if content else None
    except (Damaged, OSError, ValueError) as exc:
        console.note(f"what was prepared before is damaged, and made again: {exc}")
        return None


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
    if folder.exists():  # damaged, or by a function: whoever has mapped it keeps what it has
        shutil.rmtree(folder)
    with staged(folder) as staging:
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
