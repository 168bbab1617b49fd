"""The Hugging Face hub: one way to fetch files, and its failures in our words.

`huggingface_hub` and the libraries above it wrap the same few causes in many exceptions (an OSError of transformers
around a LocalEntryNotFoundError around an HTTP 503). `explain` looks for the cause in the whole chain. It never repeats
an upstream message that could hold a token or a signed URL.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from gemma_tune.errors import AccessError, GemmaTuneError, UserError

RepoType = Literal["model", "dataset"]

_SECRET = re.compile(
    r"hf_[a-z0-9]{8,}|bearer\s+\S+|(?<=[?&])[^=&\s]*(?:token|signature|key)[^=&\s]*=[^&\s]+", re.IGNORECASE
)
_SEARCH_SECONDS = 10.0
"""Longest wait for the hub's answer about one file (huggingface_hub's own default)."""


def redact(text: str) -> str:
    """`text` without tokens, authorization headers and signed parts of URLs."""
    return _SECRET.sub("***", text)


def page(repo_id: str, repo_type: RepoType = "model") -> str:
    """Address of the repository's page, where a licence is accepted. Never a mirror's."""
    return f"https://huggingface.co/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"


def has_token() -> bool:
    """Whether huggingface_hub would send a token. The value itself stays where it is."""
    from huggingface_hub import get_token

    return bool(get_token())


def is_offline() -> bool:
    """Whether the user forbade the network: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(
    repo_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    repo_type: RepoType = "model",
) -> tuple[Path, str]:
    """Fetch the files that match `patterns` into huggingface_hub's own cache.

    Offline, or where the hub cannot be reached, a complete cached copy is used.

    Returns:
        The folder of the snapshot, and its commit hash.

    Raises:
        UserError, AccessError: see `explain`.
    """
    from huggingface_hub import snapshot_download

    with explained(repo_id, repo_type=repo_type, revision=revision):
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                repo_type=repo_type,
                allow_patterns=list(patterns),
                etag_timeout=_SEARCH_SECONDS,
            )
        )
    return folder, folder.name


@contextmanager
def explained(repo_id: str, *, repo_type: RepoType = "model", revision: str | None = None) -> Iterator[None]:
    """Turn what the body raises about the hub into our errors; our own pass through."""
    try:
        yield
    except GemmaTuneError:
        raise
    except (OSError, ValueError, RuntimeError) as exc:
        if not (_from_hub(exc) or isinstance(exc, OSError)):
            raise
        raise explain(exc, repo_id, repo_type=repo_type, revision=revision) from exc
    except Exception as exc:
        # httpx's errors are plain Exceptions.
        if not _from_hub(exc):
            raise
        raise explain(exc, repo_id, repo_type=repo_type, revision=revision) from exc


@contextmanager
def pushing(repo_id: str) -> Iterator[None]:
    """Turn what the body, which uploads, raises about the hub into our errors; our own pass through."""
    try:
        yield
    except GemmaTuneError:
        raise
    except Exception as exc:
        # The client raises ValueError and RuntimeError too: about metadata that the hub refuses, around a failed PUT.
        if not (_from_hub(exc) or isinstance(exc, OSError | ValueError | RuntimeError)):
            raise
        raise explain_push(exc, repo_id) from exc


def _chain(exc: BaseException) -> list[BaseException]:
    """The exception and what it was raised from, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def _is_transport(exc: BaseException) -> bool:
    """A connection that could not be made or broke. httpx's class is matched by name: hub 2 brings its own copy."""
    names = {base.__name__ for base in type(exc).__mro__}
    return isinstance(exc, ConnectionError | TimeoutError) or "TransportError" in names


def _from_hub(exc: BaseException) -> bool:
    return any(
        type(link).__module__.split(".")[0] in ("huggingface_hub", "httpx", "httpx2", "hf_xet") or _is_transport(link)
        for link in _chain(exc)
    )


def explain(
    exc: BaseException, what: str, *, repo_type: RepoType = "model", revision: str | None = None
) -> GemmaTuneError:
    """The error that a user can act on.

    Exit code 2 where the name, the revision or the licence is the user's to mend; 3 where the token, the network or the
    hub stands in the way. A gated repository without access counts as the user's to mend: the message names the page.

    Args:
        exc: what the hub client, transformers or datasets raised.
        what: the repository id, as the user wrote it.
    """
    from huggingface_hub import errors

    chain = _chain(exc)

    def link(*kinds: type[BaseException]) -> BaseException | None:
        return next((one for one in chain if isinstance(one, kinds)), None)

    kind = "dataset" if repo_type == "dataset" else "model"
    if link(errors.GatedRepoError):
        return _gated(what, repo_type)
    http = link(errors.HfHubHTTPError)
    status = _status(http)
    if link(errors.RevisionNotFoundError):
        return UserError(
            f"the {kind} has no revision '{revision or 'main'}'",
            where=what,
            fix=f"choose a branch, tag or commit from {page(what, repo_type)}/commits",
        )
    if link(errors.RepositoryNotFoundError) and not (status == 401 and has_token()):
        return UserError(
            f"no such {kind} on the hub, or it is private",
            where=what,
            fix="check the spelling; for a private repository set HF_TOKEN or run `hf auth login`",
        )
    if link(errors.RemoteEntryNotFoundError):
        return UserError(
            f"the {kind} repository lacks a file that is needed",
            where=what,
            fix="choose a repository in the transformers format (config.json and *.safetensors)",
        )
    if link(errors.HFValidationError):
        return UserError(
            f"'{what}' is neither a folder nor a hub id",
            fix="write `organisation/name` for the hub, or the path of an existing folder",
        )
    if link(errors.OfflineModeIsEnabled):
        return _offline(what, repo_type)
    if status is not None:
        return _http(status, http, what)
    if full := next((one for one in chain if isinstance(one, OSError) and one.errno in _DISK), None):
        assert isinstance(full, OSError) and full.errno is not None
        return AccessError(
            f"the download could not be written: {os.strerror(full.errno)}",
            where=str(full.filename or what),
            fix="free space there, or set HF_HOME to a folder on another disk",
        )
    if any(map(_is_transport, chain)):
        return AccessError(
            "the hub cannot be reached, or the connection broke off",
            where=what,
            fix="check the network and run the same command again: finished files are kept. "
            "With a complete cached copy, HF_HUB_OFFLINE=1 skips the look-up",
        )
    if link(errors.LocalEntryNotFoundError):
        return _offline(what, repo_type) if is_offline() else _incomplete(what, repo_type)
    return AccessError(redact(_first_line(exc)), where=what, fix="see the cause with --debug")


def explain_push(exc: BaseException, repo_id: str) -> GemmaTuneError:
    """As `explain`, for an upload to a model repository: here a 404 or 403 is about the right to write.

    Args:
        exc: what the hub client raised.
        repo_id: the repository, as the user wrote it.
    """
    from huggingface_hub import errors

    chain = _chain(exc)
    http = next((one for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    status = _status(http)
    said = f": {words}" if (words := _server_words(http)) else ""
    again = "run the same command again: what has arrived is not sent twice"
    if any(isinstance(one, errors.OfflineModeIsEnabled) for one in chain):
        return AccessError("offline mode is set", where=repo_id, fix="unset HF_HUB_OFFLINE")
    if status == 401:
        return AccessError(
            "the hub refuses the token (401)",
            where=repo_id,
            fix="run `hf auth login` with a token of https://huggingface.co/settings/tokens that may write",
        )
    if status == 403:
        return AccessError(
            f"the hub forbids it (403){said}",
            where=repo_id,
            fix="use a token with write access to this account or organisation, or push to one of your own",
        )
    if status == 404:
        return UserError(
            "the hub knows no such account or repository, or hides it from this token (404)",
            where=repo_id,
            fix="check the spelling: before the slash stands your user name, or an organisation that you may write to",
        )
    if status == 409:
        return AccessError(
            f"the repository was changed by somebody else meanwhile (409){said}", where=repo_id, fix=again
        )
    if status == 429:
        return AccessError(
            "the hub limits the rate of requests (429)",
            where=repo_id,
            fix=f"wait {_wait(http) or 'some hundred'} seconds, then {again}",
        )
    if status is not None and status >= 500:
        return AccessError(f"the hub has a fault of its own ({status})", where=repo_id, fix=f"later, {again}")
    if status in (400, 422):
        return UserError(
            f"the hub refuses it ({status}){said}",
            where=repo_id,
            fix="correct the name, the branch, or the lines between --- at the head of README.md",
        )
    if status is not None:
        return AccessError(f"the hub refuses it ({status}){said}", where=repo_id, fix="see the cause with --debug")
    if any(map(_is_transport, chain)):
        return AccessError("the hub cannot be reached, or the connection broke off", where=repo_id, fix=again)
    return AccessError(redact(_first_line(exc)), where=repo_id, fix="see the cause with --debug")


def _server_words(exc: BaseException | None) -> str:
    """What the hub says itself about a refusal, on one line and without secrets."""
    return redact(" ".join(str(getattr(exc, "server_message", None) or "").split()))[:200]


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _gated(what: str, repo_type: RepoType) -> GemmaTuneError:
    if has_token():
        return UserError(
            "this repository is gated, and the account of your token has no access to it",
            where=what,
            fix=f"accept the licence at {page(what, repo_type)} with the account that owns the token; a fine-grained "
            "token also needs the permission to read gated repositories",
        )
    return UserError(
        "this repository is gated, and no hub token is set",
        where=what,
        fix=f"accept the licence at {page(what, repo_type)}, then run `hf auth login`",
    )


def _http(status: int, exc: BaseException | None, what: str) -> GemmaTuneError:
    if status == 401:
        return AccessError(
            "the hub refuses the token (401)" if has_token() else "the hub wants a token (401)",
            where=what,
            fix="run `hf auth login` with a valid token of https://huggingface.co/settings/tokens, or unset HF_TOKEN",
        )
    if status == 403:
        return AccessError(
            "the hub forbids it (403): the token lacks a permission",
            where=what,
            fix="give the token read access to this repository at https://huggingface.co/settings/tokens",
        )
    if status == 429:
        wait = _wait(exc)
        return AccessError(
            "the hub limits the rate of requests (429)",
            where=what,
            fix=f"wait {wait or 'some hundred'} seconds and try again; a token raises the limit",
        )
    if status >= 500:
        return AccessError(
            f"the hub has a fault of its own ({status})",
            where=what,
            fix="try again later; with a complete cached copy set HF_HUB_OFFLINE=1",
        )
    return AccessError(f"the hub answered {status}", where=what, fix="see the cause with --debug")


def _offline(what: str, repo_type: RepoType) -> GemmaTuneError:
    flag = " --repo-type dataset" if repo_type == "dataset" else ""
    return AccessError(
        "offline mode is set, and the files are not (all) in the cache",
        where=what,
        fix=f"unset HF_HUB_OFFLINE, or fetch them where there is a network: hf download {what}{flag}",
    )


def _incomplete(what: str, repo_type: RepoType) -> GemmaTuneError:
    return AccessError(
        "the hub cannot be reached, and the cache holds no complete copy",
        where=what,
        fix=f"check the network; `hf download {what}` fetches what is missing",
    )


def _status(exc: BaseException | None) -> int | None:
    response = getattr(exc, "response", None)
    code = getattr(response, "status_code", None)
    return code if isinstance(code, int) else None


def _wait(exc: BaseException | None) -> str:
    """Seconds from the Retry-After header, if the hub sent one."""
    headers = getattr(getattr(exc, "response", None), "headers", None) or {}
    value = str(headers.get("retry-after", ""))
    return value if value.isdigit() else ""


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:200]}" if lines else type(exc).__name__
