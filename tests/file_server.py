"""Servers on loopback: one that gives files, or parts of them."""

import contextlib
import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """A server whose threads end with it, also those that wait on open connections."""

    daemon_threads = False  # then they are joined
    disable_nagle_algorithm = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self._connections: set[socket.socket] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """Whoever goes away in the middle of an answer is no news."""

    def server_close(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):  # closed meanwhile
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    @contextlib.contextmanager
    def running(self) -> Iterator["LoopbackServer"]:
        """Serves in a thread."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()


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


@contextlib.contextmanager
def file_server(files: dict[str, bytes]) -> Iterator[FileServer]:
    """A server that runs in a thread."""
    server = FileServer(files)
    with server.running():
        yield server


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
