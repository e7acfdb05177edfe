"""`ssr-monitor serve`: the page of runs that go on, kept up to date, for a browser on this machine.

The server reads the runs' records and answers GET of two paths; it writes nothing and takes no other request. On the
loopback address it answers only to names of this machine, so that no web page elsewhere can read it by a name of
its own that leads here.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ssr_deepspeed.monitor.figures import page_data
from ssr_deepspeed.monitor.page import data_json, page
from ssr_deepspeed.monitor.records import RunLog

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*))(?::\d+)?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", type=Path, help="folder of a run or its JSON lines file; several: compared")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8642, help="0: any that is free; default: %(default)s")


def main(arguments: argparse.Namespace) -> int:
    with MonitorServer([RunLog(path) for path in arguments.run], arguments.host, arguments.port) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


class MonitorServer(ThreadingHTTPServer):
    """Serves the page of some runs.

    Args:
        logs: of the runs.
        host: address to listen at.
        port: 0: any that is free.
    """

    daemon_threads = True

    def __init__(self, logs: Sequence[RunLog], host: str = "127.0.0.1", port: int = 8642) -> None:
        self.logs = logs
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise ValueError(f"cannot listen at {host}, port {port}: {error}; try another --port") from None
        address, self.port = self.server_address[:2]
        # None: any.
        self.names = {"localhost", "127.0.0.1", "::1", host.lower()} if ip_address(str(address)).is_loopback else None
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"
        self.page = page(None).encode()
        self._lock = threading.Lock()
        self._version = 0
        self._data: bytes | None = None

    def data(self) -> tuple[str, bytes]:
        """What the page shows now, and a tag that changes when it does."""
        with self._lock:
            if any([log.refresh() for log in self.logs]):
                self._data = None  # until the new one is there: it may fail
            if self._data is None:
                self._data = data_json(page_data(self.logs)).encode()
                self._version += 1
            return f'"{id(self)}-{self._version}"', self._data

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: MonitorServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        if self.server.names is not None and self._named_host() not in self.server.names:
            self.send_error(HTTPStatus.FORBIDDEN, "This server answers to localhost alone")
        elif self.path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif self.path == "/data.json":
            self._send_data()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _named_host(self) -> str:
        """The host that the request names, without its port; empty where that is no host's name."""
        found = _HOST.fullmatch(self.headers.get("Host", "").lower())
        return (found[1] or found[2]) if found else ""

    def _send_data(self) -> None:
        try:
            tag, data = self.server.data()
        except (OSError, ValueError) as error:  # the run's file is gone or unreadable; it may come back
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, b"", "application/json", ETag=tag)
        else:
            self._send(HTTPStatus.OK, data, "application/json", ETag=tag)

    def _send(self, status: HTTPStatus, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        shields = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        for name, value in (fixed | shields | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: a line every few seconds would bury the address."""
