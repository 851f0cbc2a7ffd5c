"""A web server on this machine that gives files of a folder, and misbehaves where it is told to."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class ShardServer:
    """What the server does, and what it was asked for.

    Args:
        folder: whose files it gives.
        port: of this machine.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{port}"
        self.asked: Counter[str] = Counter()
        """Name -> whole files asked for."""
        self.refuse: dict[str, list[int]] = {}
        """Name -> HTTP codes of the next answers, 200 gives the file; the last one stays."""
        self.cut: dict[str, int] = {}
        """Name -> answers that break off in the middle."""
        self.sized = True
        """Whether answers tell their size."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        server: ShardServer = self.server.shards  # type: ignore[attr-defined]
        name = unquote(self.path.partition("?")[0].lstrip("/"))
        if codes := server.refuse.get(name):
            code = codes.pop(0) if len(codes) > 1 else codes[0]
            if code != 200:
                self.send_error(code)
                return
        path = server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if "Range" not in self.headers:
            server.asked[name] += 1
        self.send_response(200)
        if server.sized:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if server.cut.get(name, 0) and "Range" not in self.headers:
            server.cut[name] -= 1
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    """A server of the files in a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler)) as server:
        server.shards = ShardServer(folder, server.server_address[1])  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server.shards  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()
