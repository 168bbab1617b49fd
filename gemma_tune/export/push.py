"""To the hub: one commit of what a model needs, and of nothing else.

What may leave is a list of names. Checkpoints, pickles and files that hold a token are refused, not left out: somebody
who pushes such a folder believes that it is something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune import console
from gemma_tune.errors import AccessError, UserError
from gemma_tune.export.make import RECORD
from gemma_tune.export.papers import PAPERS
from gemma_tune.export.weights import INDEX, CheckpointFiles, header_of
from gemma_tune.gemma import licences
from gemma_tune.models.gguf_files import read_header
from gemma_tune.models.lora import WEIGHTS
from gemma_tune.plan import hub
from gemma_tune.plan.facts import ADAPTER_FILE, read_json
from gemma_tune.plan.starts import REWARD_HEAD
from gemma_tune.train.provenance import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = ("*.safetensors", "*.gguf")
_LEAVES = (
    *_WEIGHTS,
    *PAPERS,
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    ADAPTER_FILE,
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.j*",
    "preprocessor_config.json",
    "processor_config.json",
    "reward_stats.json",
    "Modelfile",
    RECORD,
)
"""All that is ever uploaded, by name."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_OF_CHECKPOINTS = ("checkpoint-*", "optimizer.*", "scheduler.*", "rng_state*", "trainer_state.json", "training_args.*")
_UNFINISHED = (".*.staging", ".staging-*", "*.new", "*.part", "*.incomplete")
_NAMES_A_BASE = {ADAPTER_FILE: "base_model_name_or_path", "config.json": "_name_or_path", "reward_stats.json": "base"}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def push(
    folder: Path,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    message: str,
    papers: Mapping[str, str] | None = None,
) -> str:
    """Upload a folder of weights to a model repository of the hub, in one commit. The repository is made if need be.

    Args:
        folder: what `gemma-tune merge` or `export` wrote, or the result of a run.
        repo: `account/name`.
        private: make the repository private. One that is public already is refused.
        revision: a branch, made if need be; None for main.
        message: of the commit.
        papers: file name -> text of files that go up instead of the folder's own.

    Returns:
        The address of the repository, or of the branch in it.

    Raises:
        UserError: the folder may not leave as it is, the repository's name is wrong, it is public, or holds weights
            that would be mixed with these.
        AccessError: no token, no right to write, no network.
    """
    check_repo(repo)
    contents = collect(folder, papers or {})
    _check_access(repo)
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with hub.pushing(repo), _quiet_client():
        api.create_repo(repo, repo_type="model", private=True if private else None, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        _check_repository(api, repo, revision, contents, private=private)
        api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=redact(message),
            revision=revision,
        )
    return f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else "")


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Without the client's warnings about repeated requests, which quote the signed addresses of uploads."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a repository, before anything is asked.

    Raises:
        UserError: it is none.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith((".git", ".", "-")):
        raise UserError(
            f"{console.quoted(repo)} is no name of a repository",
            where="REPO",
            fix="write `account/name`, of letters, digits, `-`, `_` and `.`, e.g. my-name/gemma-3-1b-cooking",
        )


def collect(folder: Path, papers: Mapping[str, str]) -> dict[str, Path | bytes]:
    """Name in the repository -> file on this disk, or bytes that go up in its place.

    Args:
        folder: holds the weights.
        papers: texts that go up instead of the folder's own.

    Raises:
        UserError: it holds no complete weights, no papers, or something that must not leave.
    """
    if not folder.is_dir():
        raise UserError("there is no such folder", where=str(folder), fix="give a run, or what merge or export wrote")
    names = sorted(path.name for path in folder.iterdir())
    _check_names(folder, names)
    chosen = [name for name in names if _leaves(name) and (folder / name).is_file()]
    _check_weights(folder, chosen)
    if missing := [name for name in PAPERS if name not in papers and not (name in chosen and _says(folder / name))]:
        raise UserError(
            f"missing or empty, and asked for by the licence or the hub: {', '.join(missing)}",
            where=str(folder),
            fix="push the run itself, or make the folder with gemma-tune merge or gemma-tune export, which write them",
        )
    if left := [name for name in names if name not in chosen]:
        console.note(f"left out, as no part of a model: {', '.join(left)}")
    contents: dict[str, Path | bytes] = {name: folder / name for name in chosen}
    contents |= {name: text.encode() for name, text in papers.items()}
    revision = _recorded_revision(folder)
    for name, key in _NAMES_A_BASE.items():
        if name in contents and (changed := _with_public_base(folder / name, key, revision)) is not None:
            contents[name] = changed
    for name, content in contents.items():
        _check_secrets(name, content, folder)
    return contents


def _leaves(name: str) -> bool:
    """A hidden file is something that a program left behind, whatever its name ends with."""
    return not name.startswith(".") and any(fnmatch(name, allowed) for allowed in _LEAVES)


def _says(file: Path) -> bool:
    return bool(file.read_bytes().strip())


def _check_names(folder: Path, names: list[str]) -> None:
    def first(patterns: tuple[str, ...]) -> str | None:
        return next((name for name in names if any(fnmatch(name, one) for one in patterns)), None)

    where = str(folder)
    if any(fnmatch(folder.absolute().name, one) for one in _UNFINISHED):
        raise UserError("this folder was not finished", where=where, fix="run the merge or the export again")
    if name := first(_UNFINISHED):
        raise UserError(f"{name} is left of something unfinished", where=where, fix="make the folder again")
    if fnmatch(folder.absolute().name, "checkpoint-*") or (name := first(_OF_CHECKPOINTS)):
        raise UserError(
            "this is a checkpoint, with the state of an optimizer", where=where, fix="push the run, or its adapter/"
        )
    if name := first(_PICKLES):
        raise UserError(
            f"{name} is a pickle, which can run code on the machine that opens it",
            where=where,
            fix="save the weights as safetensors, and remove it",
        )


def _check_weights(folder: Path, names: list[str]) -> None:
    """One adapter, one model or GGUF files, with what is needed to open it, and whole as far as headers tell."""
    weights = [name for name in names if any(fnmatch(name, one) for one in _WEIGHTS)]
    if not weights:
        raise UserError(
            "there are no weights in it", where=str(folder), fix="give a run, or what merge or export wrote"
        )
    of_model = [name for name in weights if name.endswith(".safetensors") and name not in (WEIGHTS, REWARD_HEAD)]
    if of_model and (mixed := [name for name in (WEIGHTS, ADAPTER_FILE) if name in names]):
        raise UserError(
            f"it holds a model ({of_model[0]}) and an adapter ({mixed[0]}): whoever opens it gets one of them",
            where=str(folder),
            fix="push them to two repositories, from two folders",
        )
    _check_companion(folder, names, (WEIGHTS, ADAPTER_FILE))
    if REWARD_HEAD in names:
        _check_companion(folder, names, (REWARD_HEAD, WEIGHTS))
    if of_model:
        _check_companion(folder, names, (of_model[0], "config.json"))
        shards = CheckpointFiles(folder).shards()
        if stray := [name for name in of_model if name not in shards]:
            raise UserError(
                f"{', '.join(stray)} belongs to another model than {shards[0]}",
                where=str(folder),
                fix="remove what is old, or make the folder again",
            )
    for name in weights:
        if name.endswith(".safetensors"):
            header_of(folder / name)
        else:
            read_header(folder / name)


def _check_companion(folder: Path, names: list[str], pair: tuple[str, str]) -> None:
    """Where there is one of a pair, there are both."""
    there, missing = [name for name in pair if name in names], [name for name in pair if name not in names]
    if there and missing:
        raise UserError(
            f"{missing[0]} is missing, without which {there[0]} cannot be opened",
            where=str(folder),
            fix="push the run itself, or make the folder again",
        )


def _recorded_revision(folder: Path) -> str | None:
    """The base's, as an export or the run that this folder is in recorded it; None where nothing did."""

    def recorded(file: Path, key: str) -> tuple[str, str] | None:
        said = read_json(file).get(key) if file.is_file() else None
        found = (said.get("name"), said.get("revision")) if isinstance(said, Mapping) else (None, None)
        return (str(found[0]), found[1]) if isinstance(found[1], str) else None

    exported = recorded(folder / RECORD, "base")
    if exported and licences.hub_id(exported[0]) is None:  # an export says `gemma (a local folder)` of a folder
        return exported[1]
    in_run = folder.absolute().name in ("adapter", "model")
    trained = recorded(folder.absolute().parent / "run.json", "model") if in_run else None
    return trained[1] if trained else None


def _with_public_base(file: Path, key: str, revision: str | None) -> bytes | None:
    """A JSON file with a base that means something elsewhere; None where it names such a one already.

    Of a path the last part is kept. PEFT and transformers know no packaged weights: the repository these came from is
    named in their place, and the card says what was trained.
    """
    content = dict(read_json(file))
    base = content.get(key)
    if not isinstance(base, str) or not base or licences.hub_id(base, revision) == base:
        return None
    if base in licences.BASE_OF_PACKAGE:
        content[key] = licences.BASE_OF_PACKAGE[base]
        console.note(f"{file.name} names the base {base}: it goes up with {content[key]}, which these weights are of")
    else:
        content[key] = licences.last_name(base)
        console.note(f"{file.name} names a base on this machine: it goes up with the last part of the path only")
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _check_secrets(name: str, content: Path | bytes, folder: Path) -> None:
    """Refuse a text that holds a token. Which one is never said."""
    if any(fnmatch(name, one) for one in _WEIGHTS):
        return
    raw = content if isinstance(content, bytes) else content.read_bytes()
    text = raw.decode("utf-8", errors="replace")
    own = _token()
    # A vocabulary holds every short word, also those that somebody's environment calls a password.
    found = console.TOKEN.search(text) if name.startswith("tokenizer") else redact(text) != text
    if found or (own and own in text):
        raise UserError(
            "it holds what looks like an access token or a password",
            where=str(folder / name),
            fix="take it out, and make the token invalid if this file was ever shared",
        )


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _check_access(repo: str) -> None:
    if hub.is_offline():
        raise AccessError("offline mode is set", where=repo, fix="unset HF_HUB_OFFLINE")
    if not hub.has_token():
        raise AccessError(
            "no hub token is set",
            where=repo,
            fix="run `hf auth login` with a token of https://huggingface.co/settings/tokens that may write",
        )


def _check_repository(
    api: HfApi, repo: str, revision: str | None, contents: Mapping[str, Any], *, private: bool
) -> None:
    """What is there already: not public where it must not be, and no weights that would be mixed with these."""
    info = api.model_info(repo, revision=revision)
    if private and not info.private:
        raise UserError(
            "this repository is public, and --private asks for a private one; nothing was uploaded",
            where=repo,
            fix=f"make it private at {api.endpoint}/{repo}/settings, or push to another name",
        )
    there = [file.rfilename for file in info.siblings or ()]
    if other := list(_mixed(there, contents)):
        raise UserError(
            f"the repository holds {', '.join(other)}, which would be mixed with these weights; nothing was uploaded",
            where=repo,
            fix="push to another name or --revision, or delete what is there first",
        )


def _mixed(there: list[str], contents: Mapping[str, Any]) -> Iterator[str]:
    """Files of another model in the same form: old shards, or an adapter that would be put on a whole model.

    Several GGUF files in one repository are usual.
    """
    if any(name.endswith(".gguf") for name in contents):
        return
    for name in there:
        decides = name in (INDEX, ADAPTER_FILE, "config.json") or name.endswith(".safetensors")
        if "/" not in name and decides and name not in contents:
            yield name
