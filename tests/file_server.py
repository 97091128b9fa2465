"""Servers on loopback: one that gives files, or parts of them."""

import hashlib
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler

from loopback import LoopbackServer


class FileServer(LoopbackServer):
    """Files in memory.

    Attributes:
        files: content by path, ``/a.tar``.
        gives_parts: whether it heeds the header Range.
        fails: so many of the next requests for content are answered 503.
        num_bytes: of content that were sent.
        num_parts: answers with a part of a file.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(_Handler)
        self.files = files
        self.gives_parts = True
        self.fails = self.num_bytes = self.num_parts = 0


def file_server(files: dict[str, bytes]) -> AbstractContextManager[FileServer]:
    """A server that runs in a thread."""
    return FileServer(files).serving()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            return self._answer(404, b"")
        tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        self._answer(200, b"", tag, length=len(content))

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            return self._answer(404, b"")
        if self.server.fails:
            self.server.fails -= 1
            return self._answer(503, b"")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not self.server.gives_parts:
            return self._answer(200, content)
        first, last = int(asked[1]), int(asked[2])
        if first >= len(content):
            return self._answer(416, b"")
        part = content[first : last + 1]
        self.server.num_parts += 1
        where = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        self._answer(206, part, {"Content-Range": where})

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int = -1
    ) -> None:
        self.server.num_bytes += len(body)
        self.send_response(status)
        self.send_header("Content-Length", str(length if length >= 0 else len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
