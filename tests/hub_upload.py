"""A stand-in of the hub that takes uploads: what huggingface_hub 2.4 asks for on the way to a commit, without Xet.

    POST /api/repos/create, /api/models/R/branch/B, /api/validate-yaml, /api/models/R/preupload/B
    POST /R.git/info/lfs/objects/batch, PUT /lfs/OID, POST /lfs/verify, POST /api/models/R/commit/B
    GET  /api/models/R, /api/models/R/revision/B

It keeps what it was given, and knows nothing of users: any token is good unless `behaviour` says otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import yaml

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"

Behaviour = Literal[
    "ok",
    "bad_token",
    "forbidden",
    "missing",
    "conflict",  # somebody else's commit came first
    "busy",
    "fault",
    "fault_once",
    "drop",  # every connection closes without an answer
    "drop_weights",  # each PUT breaks off in the middle
    "echo",  # refuses the commit, and repeats the token in its words
]
_ERRORS: dict[str, tuple[int, dict[str, str]]] = {
    "bad_token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {"X-Error-Message": "You don't have the rights to write to this namespace"}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "busy": (429, {"Retry-After": "7"}),
    "fault": (500, {}),
}


@dataclass
class Repo:
    """One repository: branch -> name -> content."""

    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    messages: list[str] = field(default_factory=list)


@dataclass
class UploadHub:
    """The running server.

    Attributes:
        url: what HF_ENDPOINT must be.
        behaviour: may be changed while it runs.
        repos: by id.
        requests: method and path of every request, in order.
        bodies: what came with them.
        tokens: values of Authorization headers that arrived.
        objects: large files by sha256.
    """

    url: str
    behaviour: Behaviour = "ok"
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What the branch holds, without what the hub puts there itself."""
        held = self.repos[repo].branches[branch]
        return {name: content for name, content in held.items() if name != ".gitattributes"}


@contextmanager
def serve_uploads() -> Iterator[UploadHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = UploadHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> UploadHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._take(b"")

    def do_POST(self) -> None:
        self._take(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        if self.hub.behaviour == "drop_weights":
            self.hub.requests.append(f"PUT {self.path}")
            self.close_connection = True
            return
        self._take(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _take(self, body: bytes) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        hub.bodies.append(body)
        if token := self.headers.get("Authorization"):
            hub.tokens.add(token)
        if hub.behaviour == "drop":
            self.close_connection = True
        elif hub.behaviour in _ERRORS:
            status, headers = _ERRORS[hub.behaviour]
            self._send(status, b"{}", headers)
        elif hub.behaviour == "fault_once" and self.command == "PUT":
            hub.behaviour = "ok"
            self._send(500, b"{}")
        else:
            self._route(path, body)

    def _route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif path == "/lfs/verify":
            asked = json.loads(body)
            self._send(200 if len(hub.objects.get(asked["oid"], b"")) == asked["size"] else 404, b"{}")
        elif found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            good = hashlib.sha256(body).hexdigest() == found[1]
            if good:
                hub.objects[found[1]] = body
            self._send(200 if good else 400, b"")
        elif (found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path)) and found[1] in hub.repos:
            self._json({"transfer": "basic", "objects": [self._object(one) for one in json.loads(body)["objects"]]})
        elif (found := re.match(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?$", path)) and found[1] in hub.repos:
            self._repository(found[1], found[2], found[3] or "main", body)
        else:
            self._send(404, b"{}", _ERRORS["missing"][1])

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private")
        self._json({"url": url, "id": name})

    def _validate(self, content: str) -> None:
        front = content.split("---\n")[1] if content.startswith("---\n") else ""
        good = isinstance(yaml.safe_load(front), dict) and "license" in yaml.safe_load(front)
        problems = [] if good else [{"message": '"license" is required'}]
        self._json({"errors": problems, "warnings": []}, 200 if good else 400)

    def _object(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.hub.objects:
            return dict(asked)
        put = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
        return asked | {"actions": {"upload": put, "verify": {"href": f"{self.hub.url}/lfs/verify"}}}

    def _repository(self, name: str, verb: str | None, branch: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        if verb == "branch":
            taken = branch in repo.branches
            repo.branches.setdefault(branch, dict(repo.branches["main"]))
            self._json({}, 409 if taken else 200)
        elif branch not in repo.branches:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif verb in (None, "revision"):
            held = [{"rfilename": file} for file in repo.branches[branch]]
            self._json({"id": name, "sha": COMMIT, "siblings": held, "private": repo.private, "tags": []})
        elif verb == "preupload":
            files = json.loads(body)["files"]
            self._json({"files": [self._mode(file) for file in files]})
        elif verb == "commit":
            self._commit(name, branch, body)
        else:
            self._send(404, b"{}")

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".gguf")) or file["size"] > 10_000_000
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        if self.hub.behaviour == "conflict":
            self._json({"error": "A commit has happened since."}, 409)
            return
        if self.hub.behaviour == "echo":
            self._json({"error": f"not for {self.headers['Authorization']}"}, 403)
            return
        lines = [json.loads(line) for line in body.splitlines()]
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.objects[value["oid"]]
        repo.branches[branch] |= changed
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
