"""A hub id goes through the real hub client: what is fetched, and what the user reads when the hub refuses or fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub_stand_in import COMMIT, Hub, serve

TOKEN = "hf_CanaryCanaryCanaryCanary1234"

RECIPE = """
model: {name: acme/tiny-gemma, quantization: none, precision: fp32}
data: {sources: [{name: rows.jsonl}], max_length: 128, holdout: 1}
output: runs/x
"""

RESOLVE = """
import sys, time
time.sleep = lambda seconds: None  # the client's pauses between attempts
from gemma_tune.errors import GemmaTuneError
from gemma_tune.models.reference import resolve
try:
    source = resolve("acme/tiny-gemma", sys.argv[1] if len(sys.argv) > 1 else None)
except GemmaTuneError as exc:
    print(exc, file=sys.stderr)
    raise SystemExit(exc.exit_code)
print(source.path, source.revision)
"""


@dataclass
class Desk:
    """A working directory and an empty cache, with the stand-in as the hub."""

    hub: Hub
    folder: Path

    def run(self, *command: str, token: str = TOKEN, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), "HF_TOKEN": token}
        return subprocess.run(
            [sys.executable, *command],
            env=kept | settings | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def resolve(self, *revision: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", RESOLVE, *revision, **environment)


@pytest.fixture
def desk(tiny: Callable[..., Path], tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 3))
    with serve(tiny("gemma3_text")) as hub:
        yield Desk(hub, tmp_path)


def test_a_hub_model_is_fetched_and_answers(desk: Desk) -> None:
    done = desk.run("-m", "gemma_tune", "chat", "acme/tiny-gemma", "--prompt", "Hi", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert f"GET /acme/tiny-gemma/resolve/{COMMIT}/model.safetensors" in desk.hub.requests
    assert desk.hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr
    # Nothing is reported home: the client's look-up of the calling program is off.
    assert "GET /api/agent-harnesses" not in desk.hub.requests


def test_the_commit_is_known_and_the_cache_serves_offline(desk: Desk) -> None:
    first = desk.resolve()
    assert first.returncode == 0, first.stderr
    path, revision = first.stdout.split()
    assert revision == COMMIT
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in Path(path).iterdir()}
    desk.hub.requests.clear()
    assert desk.resolve(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert not desk.hub.requests


def test_only_what_is_needed_is_fetched(desk: Desk) -> None:
    done = desk.run("-m", "gemma_tune", "check", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    fetched = {request.rsplit("/", 1)[1] for request in desk.hub.requests if "GET /acme" in request}
    assert fetched == {"config.json"}


def test_a_broken_download_is_resumed(desk: Desk) -> None:
    desk.hub.behaviour = "cut_once"
    done = desk.resolve()
    assert done.returncode == 0, done.stderr
    downloaded = Path(done.stdout.split()[0]) / "model.safetensors"
    assert downloaded.read_bytes() == (desk.hub.folder / "model.safetensors").read_bytes()
    assert sum("GET" in request and "model.safetensors" in request for request in desk.hub.requests) == 2


PAGE = "https://huggingface.co/acme/tiny-gemma"

FAILURES = [
    # behaviour, exit code, what the message says, what its fix says
    ("gated", 2, "is gated, and the account of your token has no access", f"accept the licence at {PAGE}"),
    ("gated_403", 2, "is gated, and the account of your token has no access", f"accept the licence at {PAGE}"),
    ("missing", 2, "no such model on the hub, or it is private", "check the spelling"),
    ("bad_token", 3, "refuses the token (401)", "hf auth login"),
    ("forbidden", 3, "forbids it (403)", "read access"),
    ("busy", 3, "limits the rate of requests (429)", "wait 7 seconds"),
    ("fault", 3, "fault of its own (500)", "try again later"),
    ("drop", 3, "cannot be reached, or the connection broke off", "run the same command again"),
]


@pytest.mark.parametrize(("behaviour", "code", "what", "fix"), FAILURES, ids=[case[0] for case in FAILURES])
def test_a_refusal_is_explained(desk: Desk, behaviour: str, code: int, what: str, fix: str) -> None:
    desk.hub.behaviour = behaviour  # type: ignore[assignment]
    before = set(desk.folder.iterdir())
    done = desk.run("-m", "gemma_tune", "check", "recipe.yaml")
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert what in done.stderr
    assert fix in done.stderr.split("fix:", 1)[1]
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert set(desk.folder.iterdir()) - before <= {desk.folder / "hf"}


def test_a_gated_model_without_token_names_the_page(desk: Desk) -> None:
    desk.hub.behaviour = "gated"
    done = desk.run("-m", "gemma_tune", "check", "recipe.yaml", token="")
    assert done.returncode == 2
    assert "no hub token is set" in done.stderr
    assert f"accept the licence at {PAGE}, then run `hf auth login`" in done.stderr


def test_a_wrong_revision_is_named(desk: Desk) -> None:
    desk.hub.behaviour = "no_revision"
    done = desk.resolve("v9")
    assert done.returncode == 2
    assert "no revision 'v9'" in done.stderr


def test_a_download_that_keeps_breaking_is_given_up(desk: Desk) -> None:
    desk.hub.behaviour = "cut"
    done = desk.resolve()
    assert done.returncode == 3
    assert "connection broke off" in done.stderr
    assert TOKEN not in done.stderr


def test_no_server_at_all(desk: Desk) -> None:
    done = desk.resolve(HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 3
    assert "cannot be reached" in done.stderr


def test_offline_without_a_cached_copy(desk: Desk) -> None:
    done = desk.resolve(HF_HUB_OFFLINE="1")
    assert done.returncode == 3
    assert "offline mode is set" in done.stderr
    assert "hf download acme/tiny-gemma" in done.stderr
    assert not desk.hub.requests


def test_a_hub_in_trouble_does_not_stop_a_cached_model(desk: Desk) -> None:
    first = desk.resolve()
    assert first.returncode == 0
    desk.hub.behaviour = "fault"
    second = desk.resolve()
    assert (second.returncode, second.stdout) == (0, first.stdout)
