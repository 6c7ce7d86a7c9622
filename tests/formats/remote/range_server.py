"""A web server on the loopback interface that serves ranges of bytes in memory, and misbehaves as it is told to."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Site:
    """files: path -> bytes; etags: path -> ETag. log: (path, first, last) of every request, as asked.

    answer: called with a handler, its path and the number of the request on that path (from 0); what it gives is True
    where it has answered by itself."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, int, int]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: Callable[[Any, str, int], bool] = lambda handler, path, count: False
    base: str = ""

    def url(self, path: str) -> str:
        return f"{self.base}/{path}"

    def requests(self, path: str | None = None) -> int:
        return sum(path is None or asked == f"/{path}" for asked, _, _ in self.log)

    def sent(self) -> int:
        """Bytes of all ranges that were asked for, and are there."""
        return sum(max(0, min(last + 1, len(self.files.get(path, b""))) - first) for path, first, last in self.log)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    site: Site

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = RANGE.fullmatch(self.headers.get("Range", ""))
        first, last = (int(found[1]), int(found[2])) if found else (0, 1 << 60)
        count = self.site.requests(path[1:])
        self.site.log.append((path, first, last))
        self.site.headers.append(dict(self.headers.items()))
        if not self.site.answer(self, path, count):
            self.send_part(path, first, last)

    def send_part(self, path: str, first: int, last: int, **changes: Any) -> None:
        """The range, with changes: status, headers (of the same names, None: left out) and body."""
        data = self.site.files.get(path)
        if data is None:
            return self.send_plain(404)
        last = min(last, len(data) - 1)
        if first > last:
            return self.send_plain(416, {"Content-Range": f"bytes */{len(data)}"})
        body = changes.get("body", data[first : last + 1])
        headers = {
            "Content-Range": f"bytes {first}-{last}/{len(data)}",
            "Content-Length": str(len(body)),
            "ETag": self.site.etags.get(path, '"1"'),
            **changes.get("headers", {}),
        }
        self.send_plain(changes.get("status", 206), headers, body)
        return None

    def send_plain(self, status: int, headers: dict[str, Any] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def break_off(self, path: str, first: int, last: int, after: int) -> None:
        """Promises the range, sends `after` bytes of it and closes the connection."""
        data = self.site.files[path][first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{len(self.site.files[path])}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", self.site.etags.get(path, '"1"'))
        self.end_headers()
        self.wfile.write(data[:after])
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    handler = type("SiteHandler", (Handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # a client that has gone
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    site.base = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
