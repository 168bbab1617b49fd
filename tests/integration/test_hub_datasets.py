"""A hub set goes through the real client of `datasets`, against a stand-in of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
ROWS = b"".join(
    json.dumps({"id": str(i), "data": [f"q{i}", f"a{i}", f"r{i}", f"b{i}"]}).encode() + b"\n" for i in range(25)
)
FILES = {"train.jsonl": ROWS, "README.md": b"---\nlicense: mit\n---\n"}

Refusal = tuple[int, dict[str, str]]
REFUSALS: dict[str, Refusal] = {
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}),
    "forbidden": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Not in the authorized list."}),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behaviour = "ok"
    asked: list[str] = []  # noqa: RUF012 (one server at a time)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._refused():
            return
        wanted = [part.split("=")[-1] for part in unquote(body.decode()).split("&") if part.startswith("paths")]
        if not wanted:
            wanted = json.loads(body or b"{}").get("paths", [])
        self._json([self._entry(name) for name in wanted if name in FILES])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        Handler.asked.append(path)
        if self._refused():
            return
        name = path.rsplit("/", 1)[1]
        if "/resolve/" in path and name in FILES:
            etag = f'"{hashlib.sha1(FILES[name]).hexdigest()}"'
            self._send(200, FILES[name], {"ETag": etag, "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            self._json([self._entry(file) for file in FILES])
        elif path.startswith("/api/datasets/acme/talks"):
            siblings = [{"rfilename": file} for file in FILES]
            self._json({"id": "acme/talks", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    def _refused(self) -> bool:
        if self.behaviour == "drop":
            self.close_connection = True
            return True
        if self.behaviour in REFUSALS:
            status, headers = REFUSALS[self.behaviour]
            self._send(status, b"{}", headers)
            return True
        return False

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": hashlib.sha1(FILES[name]).hexdigest()}

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    Handler.behaviour = "ok"
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import sys
from gemma_tune.data.sources import open_source
from gemma_tune.errors import GemmaTuneError
try:
    opened = open_source({"name": "acme/talks"}, streaming=sys.argv[1] == "stream")
    rows = [(row.where, opened.to_example(row.value)) for row in opened]
except GemmaTuneError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
print(len(rows), rows[-1][0], [message.content for message in rows[-1][1].messages])
if sys.argv[1] == "commit":
    from gemma_tune.data.content import commit_of
    from huggingface_hub import constants
    print(commit_of("acme/talks", None))
    constants.HF_HUB_OFFLINE = True
    print(commit_of("acme/talks", None))
"""


def read(url: str, home: Path, mode: str = "download") -> subprocess.CompletedProcess[str]:
    """In a process of its own: the endpoint is read when the client is imported."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("mode", ["download", "stream"])
def test_a_hub_set_is_read_with_all_turns(url: str, tmp_path: Path, mode: str) -> None:
    done = read(url, tmp_path, mode)
    assert done.stdout == "25 acme/talks row 25 ['q24', 'a24', 'r24', 'b24']\n", done.stderr


def test_its_commit_is_known_with_the_hub_and_later_without(url: str, tmp_path: Path) -> None:
    done = read(url, tmp_path, "commit")
    assert done.stdout.splitlines()[1:] == [COMMIT, COMMIT], done.stderr


@pytest.mark.parametrize(
    ("behaviour", "code", "what"),
    [
        ("missing", 2, "no such dataset on the hub"),
        ("gated", 2, "https://huggingface.co/datasets/acme/talks"),
        ("forbidden", 2, "https://huggingface.co/datasets/acme/talks"),
        ("drop", 3, "cannot be reached"),
    ],
)
def test_a_refusal_is_explained(url: str, tmp_path: Path, behaviour: str, code: int, what: str) -> None:
    Handler.behaviour = behaviour
    done = read(url, tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr + done.stdout
    assert what in done.stdout and "fix:" in done.stdout
