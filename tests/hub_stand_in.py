"""A small stand-in of the Hugging Face hub on this machine: enough of its protocol for the real client.

It serves one folder as one repository. `behaviour` chooses what it does instead of answering well.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Behaviour = Literal[
    "ok",
    "gated",
    "gated_403",
    "bad_token",
    "forbidden",
    "missing",
    "no_revision",
    "busy",
    "fault",
    "drop",  # every connection closes without an answer
    "cut",  # every download of weights breaks off in the middle
    "cut_once",
]


@dataclass
class Hub:
    """The running server.

    Attributes:
        url: what HF_ENDPOINT must be.
        behaviour: may be changed while it runs.
        requests: method and path of every request, in order.
        tokens: values of Authorization headers that arrived.
    """

    url: str
    folder: Path
    repo: str
    behaviour: Behaviour = "ok"
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)


@contextmanager
def serve(folder: Path, repo: str = "acme/tiny-gemma") -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", folder, repo)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_ERRORS: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}),
    "gated_403": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the authorized list."}),
    "bad_token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "Your token lacks a permission"}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "no_revision": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}),
    "busy": (429, {"Retry-After": "7"}),
    "fault": (500, {}),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            hub.tokens.add(token)
        # Listing a gated repository is allowed, its files are not.
        listing = path.startswith("/api/")
        if hub.behaviour in _ERRORS and not (hub.behaviour.startswith("gated") and listing):
            self._misbehave(hub.behaviour)
        elif hub.behaviour == "drop":
            self.close_connection = True
        elif path.startswith(f"/api/models/{hub.repo}/tree/"):
            self._json([self._entry(file) for file in sorted(hub.folder.iterdir())])
        elif path.startswith(f"/api/models/{hub.repo}"):
            names = [{"rfilename": file.name} for file in sorted(hub.folder.iterdir())]
            self._json({"id": hub.repo, "sha": COMMIT, "siblings": names, "private": False, "gated": False, "tags": []})
        elif path.startswith(f"/{hub.repo}/resolve/"):
            self._file(path.rsplit("/", 1)[1])
        else:
            self._misbehave("missing")

    def _misbehave(self, behaviour: str) -> None:
        status, headers = _ERRORS[behaviour]
        self._send(status, b"{}", headers)

    def _entry(self, file: Path) -> dict[str, Any]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)}

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        file = self.hub.folder / name
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        body = file.read_bytes()
        if self.hub.behaviour.startswith("cut") and self.command == "GET" and name.endswith(".safetensors"):
            if self.hub.behaviour == "cut_once":
                self.hub.behaviour = "ok"
            self._break_off(body, headers)
        elif asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206, body[start:], headers)
        else:
            self._send(200, body, headers)

    def _break_off(self, body: bytes, headers: dict[str, str]) -> None:
        """Promise the whole body, send a third of it, and close."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 3])
        self.close_connection = True

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
