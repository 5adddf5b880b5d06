"""An S3 server of moto's as a process of its own, and a proxy in front of it that breaks what it passes on."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

BUCKET = "training"


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """Run the server, with one bucket in it; the port on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while True:
            try:
                _request(port, "PUT", f"/{BUCKET}")
                break
            except ConnectionError:
                assert process.poll() is None, "the S3 server ended"
                assert time.monotonic() < until, "the S3 server does not answer"
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def _request(port: int, method: str, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        assert connection.getresponse().status == 200
    finally:
        connection.close()


def environment(port: int) -> dict[str, str]:
    """What a client of the server on this port needs."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


class Fault(NamedTuple):
    """What happens to the next `times` requests of a method whose path holds `path`, after `skip` that do not count.

    `kind`: "500" and "403" are answers, "cut" ends the connection amid the answer's body, "refuse" before an
    answer, "corrupt" changes a byte of the body, "lose" ends the connection in place of the answer, "hold" passes
    nothing on, sets `held` and never answers.
    """

    kind: str
    method: str
    path: str
    times: int = 1
    skip: int = 0


class Answer(NamedTuple):
    """An answer that was passed on: the range of the request, the status, and how much of the body was sent."""

    request: str
    span: str
    status: int
    sent: int


class FlakyProxy:
    """Passes requests on to a server on another port of 127.0.0.1, except for the `faults`."""

    def __init__(self, server: int) -> None:
        self.server = server
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.answers: list[Answer] = []
        self.held = threading.Event()
        self._lock = threading.Lock()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def clear(self) -> None:
        """Pass everything on from now on, and count anew."""
        self.faults.clear()
        self.requests.clear()
        self.answers.clear()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault(self, method: str, path: str) -> str:
        with self._lock:
            self.requests.append(f"{method} {path}")
            for number, fault in enumerate(self.faults):
                if fault.method == method and fault.path in path and fault.skip:
                    self.faults[number] = fault._replace(skip=fault.skip - 1)
                elif fault.method == method and fault.path in path and fault.times:
                    self.faults[number] = fault._replace(times=fault.times - 1)
                    return fault.kind
        return ""

    def _handler(proxy) -> type[http.server.BaseHTTPRequestHandler]:  # noqa: N805 (`self` is the handler's)
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                kind = proxy.fault(self.command, self.path)
                if kind == "hold":
                    proxy.held.set()
                    time.sleep(60)
                if kind in ("refuse", "hold"):
                    self.close_connection = True
                elif kind.isdecimal():
                    self.send_response(int(kind))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                else:
                    self.pass_on(body, kind)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

            def pass_on(self, body: bytes, kind: str) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", proxy.server, timeout=30)
                try:
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    content = answer.read()
                finally:
                    upstream.close()
                if kind == "corrupt":
                    content = content[:-1] + bytes([content[-1] ^ 1])
                if kind == "lose":
                    self.close_connection = True
                    return
                sent = len(content) // 2 if kind == "cut" else len(content)
                span = self.headers.get("Range", "")
                proxy.answers.append(Answer(f"{self.command} {self.path}", span, answer.status, sent))
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                if kind == "cut":
                    self.wfile.write(content[:sent])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(content)

        return Handler


def set_environment(port: int) -> None:
    os.environ.update(environment(port))
