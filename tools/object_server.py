"""An S3 server for measurements: as much of S3 as the commands use, behind a delay and a link of limited speed.

    with serving(folder, delay_ms=20, link=200e6) as server:
        ...                          # AWS_ENDPOINT_URL=server.endpoint, bucket "bench"
        server.counters()            # gets, puts, lists, others, bytes_out, bytes_in, most_in_flight

Every request is answered `delay_ms` late; all bodies share `link` bytes a second, in each direction. Nothing is
checked, signatures least of all: tests use moto's server. Objects are the files of a folder, uploads are folders beside
them, in which parts of 8 MiB go to their place at once: no storage copies an object when it is completed. Only the last
part of an object may be shorter.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import checkout  # noqa: F401 - finds the package of this checkout
import click

BUCKET = "bench"
_PIECE = 256 << 10
_PART = 8 << 20  # as the commands send them, up to 72 GB
_COUNTERS = "/counters"
_NOTES = "x-amz-meta-mindformers-ckpt-plan"


class Link:
    """Bytes a second that all connections share in one direction; 0 for no limit."""

    def __init__(self, rate: float) -> None:
        self._rate, self._lock, self._free = rate, threading.Lock(), 0.0

    def take(self, count: int) -> None:
        """Wait until so many bytes have had their time."""
        if not self._rate:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + count / self._rate
            wait = self._free - time.monotonic()
        if wait > 0.002:  # shorter sleeps are late
            time.sleep(wait)


class Storage:
    """The objects, and what was asked for."""

    def __init__(self, folder: Path, delay: float, link: float) -> None:
        self.folder, self.delay = folder, delay
        self.out, self.into = Link(link), Link(link)
        self.lock = threading.Lock()
        self.counters: dict[str, int] = {}
        self._in_flight = 0

    def path(self, key: str) -> Path:
        return self.folder / "objects" / key

    def parts(self, upload: str) -> Path:
        return self.folder / "uploads" / upload

    def count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counters[name] = self.counters.get(name, 0) + number

    @contextlib.contextmanager
    def request(self, name: str) -> Iterator[None]:
        self.count(name)
        with self.lock:
            self._in_flight += 1
            self.counters["most_in_flight"] = max(self.counters.get("most_in_flight", 0), self._in_flight)
        try:
            time.sleep(self.delay)
            yield
        finally:
            with self.lock:
                self._in_flight -= 1


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    storage: Storage

    def log_message(self, *_: Any) -> None:
        """Nothing is said."""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def handle_expect_100(self) -> bool:
        """Say at once that the body may come: who sends one waits for that, a second at most."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def ask(self) -> tuple[str, dict[str, str]]:
        """The key and the words of a request."""
        parts = urlsplit(self.path)
        words = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return unquote(parts.path).lstrip("/").partition("/")[2], words

    def do_GET(self) -> None:
        if self.path == _COUNTERS:
            self.answer(200, json.dumps(self.storage.counters).encode())
            self.storage.counters.clear()
            return
        key, words = self.ask()
        if "uploadId" in words:
            with self.storage.request("others"):
                self.list_parts(words["uploadId"])
        elif not key:
            with self.storage.request("lists"):
                self.list_objects(words)
        else:
            with self.storage.request("gets"):
                self.send_object(key)

    def do_HEAD(self) -> None:
        key, _ = self.ask()
        with self.storage.request("others"):
            path = self.storage.path(key)
            if path.is_file():
                self.head(200, path, path.stat().st_size)
            else:
                self.answer(404, b"")

    def do_PUT(self) -> None:
        key, words = self.ask()
        with self.storage.request("puts"):
            size, number = int(self.headers["Content-Length"]), words.get("partNumber")
            self.storage.count("bytes_in", size)
            if number is None:
                path = self.storage.path(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                self.take_body(path, 0, size)
            else:
                folder = self.storage.parts(words["uploadId"])
                if size == _PART:
                    self.take_body(folder / "whole", (int(number) - 1) * _PART, size)
                else:
                    self.take_body(folder / "last", 0, size)
                path = folder / f"{number}.size"
                path.write_text(str(size))
            self.answer(200, b"", ETag=_tag(path))

    def take_body(self, path: Path, start: int, left: int) -> None:
        """Write a body to a file, at a place."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
            file.seek(start)
            while left:
                piece = self.rfile.read(min(left, _PIECE))
                self.storage.into.take(len(piece))
                file.write(piece)
                left -= len(piece)

    def do_POST(self) -> None:
        key, words = self.ask()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.storage.request("others"):
            if "uploads" in words:
                upload = secrets.token_hex(8)
                self.storage.parts(upload).mkdir(parents=True)
                (self.storage.parts(upload) / "notes").write_text(self.headers.get(_NOTES, ""))
                self.xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
            else:
                self.complete(key, words["uploadId"])

    def do_DELETE(self) -> None:
        key, _ = self.ask()
        with self.storage.request("others"):
            self.storage.path(key).unlink(missing_ok=True)
            self.answer(204, b"")

    def complete(self, key: str, upload: str) -> None:
        """Put parts together: all but the last are in their place."""
        folder, path = self.storage.parts(upload), self.storage.path(key)
        *others, (_, size, _) = _parts(folder)
        if any(other != _PART for _, other, _ in others):
            raise ValueError(f"all parts of an object but the last are to have {_PART} bytes")
        whole = folder / "whole"
        if size != _PART:
            with open(os.open(whole, os.O_WRONLY | os.O_CREAT), "wb") as target:
                target.seek(len(others) * _PART)
                target.write((folder / "last").read_bytes())
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.replace(path)
        path.with_name(f"{path.name}.notes").write_text((folder / "notes").read_text())
        self.xml("CompleteMultipartUploadResult", f"<ETag>{_tag(path)}</ETag>")

    def list_parts(self, upload: str) -> None:
        rows = (
            f"<Part><PartNumber>{number}</PartNumber><Size>{size}</Size><ETag>{tag}</ETag></Part>"
            for number, size, tag in _parts(self.storage.parts(upload))
        )
        self.xml("ListPartsResult", f"<IsTruncated>false</IsTruncated>{''.join(rows)}")

    def list_objects(self, words: dict[str, str]) -> None:
        root = self.storage.path("")
        start, marker = words.get("prefix", ""), words.get("marker", "")
        files = (path for path in root.rglob("*") if path.is_file() and not path.name.endswith(".notes"))
        found = {str(path.relative_to(root)): path for path in files}
        names = sorted(key for key in found if key.startswith(start) and key > marker)
        rows = "".join(_entry(key, found[key]) for key in names[:1000])
        self.xml("ListBucketResult", f"<IsTruncated>{str(len(names) > 1000).lower()}</IsTruncated>{rows}")

    def send_object(self, key: str) -> None:
        path = self.storage.path(key)
        if not path.is_file():
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        size = path.stat().st_size
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(span[1]), min(int(span[2]), size - 1)) if span else (0, size - 1)
        self.head(206 if span else 200, path, last + 1 - first, f"bytes {first}-{last}/{size}")
        self.storage.count("bytes_out", last + 1 - first)
        with path.open("rb") as file:
            while first <= last:
                count = min(_PIECE, last + 1 - first)
                self.storage.out.take(count)
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, count)

    def head(self, status: int, path: Path, length: int, span: str = "") -> None:
        notes = path.with_name(f"{path.name}.notes")
        self.send_response_only(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", _tag(path))
        self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
        if notes.is_file():
            self.send_header(_NOTES, notes.read_text())
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        self.wfile.flush()

    def xml(self, name: str, content: str) -> None:
        self.answer(200, f'<?xml version="1.0" encoding="UTF-8"?><{name}>{content}</{name}>'.encode())

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def _parts(folder: Path) -> list[tuple[int, int, str]]:
    """The parts of an upload: number, size, tag."""
    return sorted((int(path.stem), int(path.read_text()), _tag(path)) for path in folder.glob("*.size"))


def _entry(key: str, path: Path) -> str:
    status = path.stat()
    modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(status.st_mtime))
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified><ETag>{escape(_tag(path))}</ETag>"
        f"<Size>{status.st_size}</Size></Contents>"
    )


def _tag(path: Path) -> str:
    status = path.stat()
    return f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'


class Server:
    """A server that runs."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        known = {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1"}
        return {**os.environ, **known, "AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}

    def counters(self) -> dict[str, int]:
        """What was asked for since they were looked at last."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.endpoint + _COUNTERS) as answer:
            found: dict[str, int] = json.load(answer)
            return found


@contextlib.contextmanager
def serving(folder: Path, *, delay_ms: float = 0, link: float = 0) -> Iterator[Server]:
    """Run a server, a process of its own, for the objects under `folder`/objects."""
    command = [sys.executable, __file__, str(folder), "--delay", str(delay_ms), "--link", str(link)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield Server(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--delay", default=0.0, help="Milliseconds before each answer.")
@click.option("--link", default=0.0, help="Bytes a second in each direction; 0 for no limit.")
def main(folder: Path, delay: float, link: float) -> None:
    """Serve the objects under FOLDER/objects; prints the port."""
    Handler.storage = Storage(folder, delay / 1000, link)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    click.echo(server.server_address[1])
    sys.stdout.flush()
    server.serve_forever(0.1)


if __name__ == "__main__":
    main()
