"""A model hub on 127.0.0.1: the endpoints that huggingface_hub 2.4 uses; it notes every request, and can misbehave."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_thisIsTheSecretOfTheTests"
Files = dict[str, bytes]


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Repo:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, files: Files) -> str:
        seed = repr((len(self.commits), sorted(files.items()))).encode()
        oid = hashlib.sha1(seed).hexdigest()
        self.commits[oid] = dict(files)
        return oid


@dataclass
class FakeHub:
    """What the server holds; a test reads it, and bends `listing`, `bodies` or `redirects`."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: Files = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    listing: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda entries: entries
    bodies: Files = field(default_factory=dict)
    """Other bytes than the repository lists, by path."""
    redirects: dict[str, str] = field(default_factory=dict)
    """Where the content of a path is said to be."""
    endless: set[str] = field(default_factory=set)
    refuse: dict[str, int] = field(default_factory=dict)
    """Status to answer instead, by a piece of the path."""

    def make(self, repo: str, files: Files, private: bool = True) -> str:
        """Create a repository that somebody else filled."""
        self.repos[repo] = Repo(private)
        return self.repos[repo].commit(files)

    def files(self, repo: str) -> Files:
        return self.repos[repo].commits[self.repos[repo].head]

    def sent(self) -> bytes:
        """Everything that any request carried, decoded where it was base64."""
        found = [request.path.encode() + request.body for request in self.requests]
        for request in self.requests:
            for line in request.body.splitlines():
                found += _decoded(line)
        return b"\n".join(found)

    def asked(self, method: str = "GET") -> list[str]:
        return [request.path for request in self.requests if request.method == method]


def _decoded(line: bytes) -> Iterator[bytes]:
    try:
        value = json.loads(line)
    except ValueError:
        return
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, str):
            try:
                yield base64.b64decode(item, validate=True)
            except ValueError:
                continue


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet: two wait for each other's acknowledgement
    disable_nagle_algorithm = True
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, dict(self.headers.items()), body))
        for piece, status in self.hub.refuse.items():
            if piece in path:
                return self._send(status, {"error": f"refused with {status}"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if path.startswith("/objects/"):
            return self._object(path.removeprefix("/objects/"), body)
        if path.startswith("/api/models/"):
            return self._model(path.removeprefix("/api/models/"), body)
        if "/resolve/" in path:
            return self._resolve(path)
        return self._send(404, {"error": "no such endpoint"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _trusted(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if not self._trusted():
            return self._send(401, {"error": "who are you?"})
        if repo in self.hub.repos:
            return self._send(409, {"error": "exists"})
        self.hub.make(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, wanted.get("visibility") == "private")
        return self._send(200, {"url": f"{self.hub.url}/{repo}"})

    def _model(self, rest: str, body: bytes) -> None:
        owner, name, *more = rest.split("/")
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and not self._trusted()):
            return self._send(404, {"error": "no repository"}, {"X-Error-Code": "RepoNotFound"})
        verb, revision = (more[0], more[1]) if more else ("info", "main")
        if verb in ("preupload", "commit"):
            return self._preupload(repo, body) if verb == "preupload" else self._commit(f"{owner}/{name}", body)
        commit = repo.head if revision == "main" else revision
        if commit not in repo.commits:
            return self._send(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        if verb == "tree":
            return self._send(200, self.hub.listing(_entries(repo.commits[commit])))
        return self._send(200, {"id": f"{owner}/{name}", "sha": commit, "private": repo.private})

    def _preupload(self, repo: Repo, body: bytes) -> None:
        known = repo.commits[repo.head]
        answer = [
            {"path": file["path"], "uploadMode": "lfs" if is_large(file["path"]) else "regular", "shouldIgnore": False}
            | ({"oid": git_id(known[file["path"]])} if file["path"] in known and not is_large(file["path"]) else {})
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": answer})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}", "header": {}}}}
            for each in wanted["objects"]
        ]
        self._send(200, {"objects": objects, "transfer": "basic"})

    def _object(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.objects[oid] = body
        self._send(200, {} if self.command == "PUT" else self.hub.objects[oid])

    def _commit(self, name: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        if not self._trusted():
            return self._send(401, {"error": "who are you?"})
        files = dict(repo.commits[repo.head])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", repo.head) != repo.head:
                return self._send(412, {"error": "the branch moved"})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(files)
        return self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        commit, _, file = rest.partition("/")
        data = self.hub.repos[name].commits[commit][file]
        digest = hashlib.sha256(data).hexdigest()
        etag = digest if is_large(file) else git_id(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}
        if target := self.hub.redirects.get(file):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag}"', "Location": target}
            return self._send(302, b"", headers)
        sent = self.hub.bodies.get(file, data) if self.command == "GET" else data
        if file in self.hub.endless and self.command == "GET":
            return self._send_endless(headers)
        return self._send(200, sent, headers)

    def _send_endless(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {**headers, "Transfer-Encoding": "chunked"}.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
        except OSError:
            self.close_connection = True

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entries(files: Files) -> list[dict[str, Any]]:
    entries = []
    for path, data in sorted(files.items()):
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_id(data)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        entries.append(entry)
    return entries


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    server_bind = TCPServer.server_bind  # HTTPServer's own asks a name server what 127.0.0.1 is called


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a hub on a free port of 127.0.0.1."""
    hub = FakeHub()
    server = _Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
