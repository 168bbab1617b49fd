"""The hub's failures in our words, without a hub."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from gemma_tune.errors import AccessError, GemmaTuneError, UserError
from gemma_tune.plan import hub


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnop",
        "Authorization: Bearer something.secret",
        "https://cdn.example/x?X-Amz-Signature=abc123&y=1",
        "https://cdn.example/x?access_token=abc123",
    ],
)
def test_secrets_are_taken_out(secret: str) -> None:
    clean = hub.redact(f"failed at {secret} now")
    assert "***" in clean
    assert not any(part in clean for part in ("abcdefgh", "something.secret", "abc123"))
    assert clean.startswith("failed at ")


def test_harmless_text_stays() -> None:
    text = "https://huggingface.co/google/gemma-3-1b-it/resolve/main/config.json?download=true"
    assert hub.redact(text) == text


def test_page_of_models_and_data_sets() -> None:
    assert hub.page("google/gemma-3-1b-it") == "https://huggingface.co/google/gemma-3-1b-it"
    assert hub.page("a/b", "dataset") == "https://huggingface.co/datasets/a/b"


def gated() -> BaseException:
    from huggingface_hub.errors import GatedRepoError

    response = SimpleNamespace(status_code=403, headers={}, request=None)
    return GatedRepoError("403 hf_secretsecretsecret", response=response)  # type: ignore[arg-type]


def wrapped(cause: BaseException) -> OSError:
    """As transformers does."""
    try:
        try:
            raise cause
        except BaseException as exc:
            raise OSError("You are trying to access a gated repo, hf_secretsecretsecret") from exc
    except OSError as outer:
        return outer


def test_the_cause_is_found_inside_other_errors() -> None:
    error = hub.explain(wrapped(gated()), "google/gemma-3-1b-it")
    assert isinstance(error, UserError)
    assert "https://huggingface.co/google/gemma-3-1b-it" in str(error)
    assert "secret" not in str(error)


def test_a_gated_data_set_names_its_own_page() -> None:
    assert "https://huggingface.co/datasets/acme/rows" in str(hub.explain(gated(), "acme/rows", repo_type="dataset"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_disk_that_is_full_or_closed(number: int) -> None:
    error = hub.explain(OSError(number, "x", "/data/hf/blob"), "a/b")
    assert isinstance(error, AccessError)
    assert error.problems[0].where == "/data/hf/blob"
    assert "HF_HOME" in error.problems[0].fix


def test_a_name_that_is_none() -> None:
    from huggingface_hub.errors import HFValidationError

    error = hub.explain(HFValidationError("Repo id must be ..."), "a//b")
    assert isinstance(error, UserError)
    assert "'a//b' is neither a folder nor a hub id" in str(error)


def test_an_unknown_failure_is_told_without_secrets() -> None:
    error = hub.explain(OSError("strange hf_secretsecretsecret"), "a/b")
    assert isinstance(error, AccessError)
    assert "OSError: strange ***" in str(error)


def test_our_own_errors_and_bugs_pass_through() -> None:
    with pytest.raises(UserError, match="ours"), hub.explained("a/b"):
        raise UserError("ours")
    with pytest.raises(KeyError), hub.explained("a/b"):
        raise KeyError("a bug")
    with pytest.raises(ValueError, match="a bug"), hub.explained("a/b"):
        raise ValueError("a bug")
    with pytest.raises(GemmaTuneError, match="gated") as caught, hub.explained("a/b"):
        raise gated()
    assert caught.value.__cause__ is not None
