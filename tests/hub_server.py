"""A small server on loopback that speaks as much of the Hub's protocol as pushing and pulling need."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from file_server import LoopbackServer

TOKEN = "hf_right"
_LFS_FROM = 1000  # bytes


class HubServer(LoopbackServer):
    """Repositories in memory.

    Attributes:
        repositories: per id: whether private, and per commit (the newest last) its files.
        fails: status that an action answers instead: ``create``, ``preupload``, ``commit``.
        cut: close the connection in the middle of an upload.
        uploads: large files by their sha256.
        num_bytes: of files that were sent.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.fails: dict[str, int] = {}
        self.cut = False
        self.uploads: dict[str, bytes] = {}
        self.num_bytes = 0

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.repositories[repo_id]["commits"][-1][1]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that runs in a thread."""
    server = HubServer()
    with server.running():
        yield server


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        path = path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        if path.startswith("/api/models/"):
            kind = "tree" if "/tree/" in path else "revision"
            repo_id, _, rest = path.removeprefix("/api/models/").partition(f"/{kind}/")
            revision, _, folder = rest.partition("/")
            if folder:  # repositories here have none
                return self._answer(404, {"error": folder}, {"X-Error-Code": "EntryNotFound"})
            self._info(repo_id, revision or "main", tree=kind == "tree")
        elif "/resolve/" in path:
            self._file(path)
        else:
            self._answer(404, {"error": path})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":  # of the card's header
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if "/preupload/" in path:
            return self._preupload(json.loads(body))
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if "/commit/" in path:
            repo_id = path.removeprefix("/api/models/").partition("/commit/")[0]
            return self._commit(repo_id, [json.loads(line) for line in body.splitlines()])
        return self._answer(404, {"error": path})

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self.server.cut:
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(size)
        self.server.uploads[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def _create(self, wanted: dict[str, Any]) -> None:
        if "create" in self.server.fails:
            return self._answer(self.server.fails["create"], {"error": "refused"})
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        if repo_id in self.server.repositories:
            url = f"{self.server.address}/{repo_id}"
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        self.server.repositories[repo_id] = {"private": private, "commits": []}
        self._answer(200, {"url": f"{self.server.address}/{repo_id}"})

    def _preupload(self, wanted: dict[str, Any]) -> None:
        if "preupload" in self.server.fails:
            return self._answer(self.server.fails["preupload"], {"error": "refused"})
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= _LFS_FROM else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        self._answer(200, {"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                "oid": o["oid"],
                "size": o["size"],
                "actions": {"upload": {"href": f"{self.server.address}/upload/{o['oid']}"}},
            }
            for o in wanted["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        if "commit" in self.server.fails:
            return self._answer(self.server.fails["commit"], {"error": "refused"})
        commits = self.server.repositories[repo_id]["commits"]
        files = dict(commits[-1][1]) if commits else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        commits.append((sha, files))
        self._answer(
            200, {"commitUrl": f"{self.server.address}/{repo_id}/commit/{sha}", "commitOid": sha}
        )

    def _info(self, repo_id: str, revision: str, *, tree: bool) -> None:
        repository = self.server.repositories.get(repo_id)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository["private"] and not allowed):
            return self._answer(401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        if repository.get("gated"):
            return self._answer(403, {"error": "no"}, {"X-Error-Code": "GatedRepo"})
        commits = [c for c in repository["commits"] if revision in ("main", c[0])]
        if not commits:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        sha, files = commits[-1]
        if tree:
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in files.items()
            ]
            return self._answer(200, entries)
        siblings = [{"rfilename": name} for name in files]
        self._answer(200, {"id": repo_id, "sha": sha, "siblings": siblings, "private": False})

    def _file(self, path: str) -> None:
        repo_id, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repo_id not in self.server.repositories:
            return self._answer(401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        for sha, files in reversed(self.server.repositories[repo_id]["commits"]):
            if revision in ("main", sha) and name in files:
                content = files[name]
                about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": sha}
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
                if self.command != "HEAD":
                    self.server.num_bytes += len(part)
                return self._send(206 if asked else 200, part, about)
        return self._answer(404, {"error": name}, {"X-Error-Code": "EntryNotFound"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(
            status,
            json.dumps(content).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
