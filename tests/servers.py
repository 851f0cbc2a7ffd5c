"""A web server on this machine that answers as told, and notes what it was asked."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Page:
    """What is under an address."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    """Whether parts can be asked for."""
    breaks_after: list[int] = field(default_factory=list)
    """Of the answers, in order: the connection ends after so many bytes of the body."""
    wait_s: float = 0.0
    """Before the answer, and before each byte of a body that drips."""
    drips: bool = False
    sized: bool = True
    """Whether the answer tells its length."""


@dataclass
class Site:
    """A running server."""

    address: str
    pages: dict[str, Page] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """(path, headers) of each request."""

    def put(self, path: str, body: bytes = b"", **more: Any) -> str:
        """Put a page under a path; its address."""
        self.pages[path] = Page(body, **more)
        return self.address + path

    def ranges(self, path: str) -> list[str | None]:
        """The parts that were asked for."""
        return [headers.get("Range") for asked, headers in self.asked if asked == path]


@contextmanager
def serve() -> Iterator[Site]:
    """A server that answers while the block runs."""
    site = Site("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append((self.path, dict(self.headers)))
            page = site.pages.get(self.path, Page(status=404))
            time.sleep(0 if page.drips else page.wait_s)
            self._answer(page)

        def _answer(self, page: Page) -> None:
            body, status, headers = page.body, page.status, dict(page.headers)
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            same = self.headers.get("If-Range") in (None, page.headers.get("ETag"))
            if wanted and page.ranges and same and status == 200:
                start = int(wanted[1])
                if start >= len(body):
                    status, body = 416, b""
                    headers["Content-Range"] = f"bytes */{len(page.body)}"
                else:
                    status, body = 206, body[start:]
                    headers["Content-Range"] = f"bytes {start}-{len(page.body) - 1}/{len(page.body)}"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if page.sized:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            end = page.breaks_after.pop(0) if page.breaks_after else len(body)
            try:
                for start in range(0, end, 1 if page.drips else max(1, end)):
                    time.sleep(page.wait_s if page.drips else 0)
                    self.wfile.write(body[start : start + 1] if page.drips else body[:end])
            except OSError:
                pass  # the other side has left
            self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
