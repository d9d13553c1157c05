"""A small Hub on loopback: the HTTP endpoints that huggingface_hub's client uses for model repositories.

Files live in memory, one mapping of paths to bytes a commit. What a real Hub or a real network does wrong is done
wrong on demand: see `Faults`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    """One model repository."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: Files, message: str) -> str:
        """Put files on a branch, in place of those that it has."""
        self.messages.append(message)
        sha = hashlib.sha1(f"{message} {len(self.messages)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit's own name."""
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.find(revision) or ""]


@dataclass
class Faults:
    """What goes wrong, and how often.

    Attributes:
        server_errors: So many of the next downloads get status 503.
        cuts: So many of the next downloads end in the middle, without a word.
        conflicts: So many of the next commits find that somebody else was faster; `edit` says what that one changed.
        seconds_a_block: Waits between blocks of a download.
    """

    server_errors: int = 0
    cuts: int = 0
    conflicts: int = 0
    edit: Files = field(default_factory=dict)
    seconds_a_block: float = 0.0


class Hub:
    """The state of the server.

    Attributes:
        url: Where it listens.
        log: (method, path) of every request.
        ranges: The `Range` header of every download that had one.
    """

    TOKENS: ClassVar = {"secret": "user", "other": "other"}

    def __init__(self, url: str) -> None:
        self.url = url
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults = Faults()
        self.log: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.lock = threading.RLock()

    def __getitem__(self, name: str) -> Repository:
        return self.repositories[name]


class Refusal(Exception):
    def __init__(
        self, status: int, message: str, code: str | None = None, more: dict[str, str] | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.more, self.headers = status, message, more or {}, headers
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "tag"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/refs", "list_refs"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<path>/.*)?", "tree"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)", "info"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )  # fmt: skip

    def do_GET(self) -> None:
        self.answer("GET")

    do_HEAD = do_POST = do_PUT = do_GET  # all the same but for `self.command`

    def answer(self, _: str) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self.is_chunked else self.chunks()
        self.hub.log.append((self.command, url.path))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if verb == method and match:
                    found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    with self.hub.lock:
                        reply = getattr(self, name)(body=body, **found)
                    if reply is not None:
                        self.send(200, json.dumps(reply).encode(), {"Content-Type": "application/json"})
                    return
            raise Refusal(404, f"no such endpoint: {self.command} {url.path}")
        except Refusal as refusal:
            text = json.dumps({"error": refusal.message} | refusal.more).encode()
            headers = {"X-Error-Message": refusal.message, "Content-Type": "application/json", **refusal.headers}
            self.send(refusal.status, text, headers)

    @property
    def is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "") == "chunked"

    def chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # Who asks, and for what

    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.TOKENS.get(token)

    def find(self, name: str, write: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(name)
        is_own = user == name.split("/")[0]
        if repository is None or (repository.private and not is_own):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not is_own:
            raise Refusal(403 if user else 401, "You don't have the right to write here")
        return repository

    def find_commit(self, repository: Repository, revision: str) -> str:
        sha = repository.find(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Endpoints

    def whoami(self, body: bytes) -> Any:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": []}

    def validate_yaml(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        return {"errors": errors, "warnings": []}

    def create(self, body: bytes) -> Any:
        wanted, user = json.loads(body), self.user()
        owner = wanted.get("organization") or user
        if user is None or owner != user:
            raise Refusal(403 if user else 401, "You don't have the right to create a model under this namespace")
        name = f"{owner}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repositories:
            raise Refusal(409, "You already created this model repo", more=url)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        return url

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        repository = self.find(name, write=self.query.get("create_pr") != "1")
        files = repository.commits[self.find_commit(repository, revision)]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": _remote_oid(files.get(file["path"]), file["path"]),
                }
                for file in json.loads(body)["files"]
            ]
        }

    def lfs_batch(self, body: bytes, name: str) -> Any:
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body: bytes, oid: str) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content has another hash")
        self.hub.large[oid] = body
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> Any:
        is_request = self.query.get("create_pr") == "1"
        repository = self.find(name, write=not is_request)
        parent = self.find_commit(repository, revision)
        if self.hub.faults.conflicts:
            self.hub.faults.conflicts -= 1
            parent = repository.commit(revision, repository.files(revision) | self.hub.faults.edit, "somebody else")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {line['key']}")
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        branch = f"refs/pr/{number}" if is_request else revision
        sha = repository.commit(branch, files, header["summary"])
        url = f"{self.hub.url}/{name}"
        request = {"pullRequestUrl": f"{url}/discussions/{branch.split('/')[-1]}"} if is_request else {}
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""} | request

    def branch(self, body: bytes, name: str, branch: str) -> Any:
        repository = self.find(name, write=True)
        if branch in repository.refs:
            raise Refusal(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repository.refs[branch] = self.find_commit(repository, start)
        return {}

    def tag(self, body: bytes, name: str, revision: str) -> Any:
        repository = self.find(name, write=True)
        repository.tags[json.loads(body)["tag"]] = self.find_commit(repository, revision)
        return {}

    def list_refs(self, body: bytes, name: str) -> Any:
        repository = self.find(name)
        return {
            "branches": _describe_refs("heads", {k: v for k, v in repository.refs.items() if "/" not in k}),
            "converts": [],
            "tags": _describe_refs("tags", repository.tags),
        }

    def tree(self, body: bytes, name: str, revision: str, path: str = "") -> Any:
        repository = self.find(name)
        files = repository.commits[self.find_commit(repository, revision)]
        below = f"{path.strip('/')}/" if path.strip("/") else ""
        return [
            {"type": "file", "oid": _blob_oid(data), "size": len(data), "path": file}
            | ({"lfs": {"oid": _etag(data, file), "size": len(data), "pointerSize": 130}} if _is_large(file) else {})
            for file, data in sorted(files.items())
            if file.startswith(below)
        ]

    def info(self, body: bytes, name: str, revision: str = "main") -> Any:
        repository = self.find(name)
        sha = self.find_commit(repository, revision)
        card = repository.commits[sha].get("README.md", b"").decode()
        found = re.search(r"^pipeline_tag: (\S+)$", card, re.MULTILINE)
        return {
            "_id": "0",
            "id": name,
            "modelId": name,
            "sha": sha,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "pipeline_tag": found.group(1) if found else None,
            "library_name": "mend_hf",
            "siblings": [{"rfilename": path} for path in sorted(repository.commits[sha])],
        }

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Any:
        repository = self.find(name)
        if repository.gated and self.user() != name.split("/")[0]:
            raise Refusal(403, f"Access to model {name} is restricted: ask for it on its page.", "GatedRepo")
        sha = self.find_commit(repository, revision)
        if path not in repository.commits[sha]:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        if self.hub.faults.server_errors:
            self.hub.faults.server_errors -= 1
            raise Refusal(503, "The server is busy")
        data = repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_etag(data, path)}"', "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.hub.ranges.append(self.headers["Range"])
            start, status = int(wanted.group(1)), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.command == "HEAD":
            self.send(status, data, headers)
        else:
            self.send_slowly(status, data[start:], headers)
        return None

    def send_slowly(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        is_cut = self.hub.faults.cuts > 0 and len(data) > 1
        self.hub.faults.cuts -= is_cut
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        for block in _split(data[: len(data) // 2] if is_cut else data):
            time.sleep(self.hub.faults.seconds_a_block)
            self.wfile.write(block)
        self.close_connection = is_cut

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _split(data: bytes, size: int = 4096) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(data: bytes, path: str) -> str:
    return hashlib.sha256(data).hexdigest() if _is_large(path) else _blob_oid(data)


def _remote_oid(data: bytes | None, path: str) -> str | None:
    return None if data is None else _etag(data, path)


def _describe_refs(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Listen on a free port of loopback for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("HandlerOfOneHub", (Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
