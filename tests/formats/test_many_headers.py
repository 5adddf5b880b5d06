"""Headers of many files: how many requests they take, how many are under way at once, and what is reported."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import Tensor, write_tensors

from mindformers_ckpt.disk import waiting
from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import Header, ckpt, guesses, read_header
from mindformers_ckpt.formats import headers as headers_module
from mindformers_ckpt.formats.ckpt import scan
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.headers import read_headers

FILES = 40


class Requests:
    """Counts what is read, and how many requests are under way at once; each takes a moment."""

    def __init__(self) -> None:
        self.count = self.under_way = self.most = 0
        self._lock = threading.Lock()
        self._read = os.pread

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        with self._lock:
            self.count += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(0.002)
        try:
            return self._read(descriptor, length, offset)
        finally:
            with self._lock:
                self.under_way -= 1


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    counted = Requests()
    monkeypatch.setattr(headers_module, "_WAIT", 0.001)
    monkeypatch.setattr(guesses, "_slow_devices", set())
    monkeypatch.setattr(os, "pread", counted.pread)
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)  # all is read by it then
    return counted


def write_files(folder: Path, suffix: str, elements: int, tensors: int = 20) -> list[Path]:
    """Files with the same tensors of other contents."""
    paths = []
    for number in range(FILES):
        bits = np.full((elements,), number, np.uint32)
        path = folder / f"file_{number:02}.{suffix}"
        write_tensors(path, {f"w{name}": Tensor(by_name("float32"), bits) for name in range(tensors)})
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("suffix", "elements", "most"),
    [("ckpt", 64, 1), ("ckpt", 1024, 1), ("ckpt", 8192, 20), ("safetensors", 64, 2), ("safetensors", 8192, 2)],
)
def test_few_requests_and_several_at_once(
    suffix: str, elements: int, most: int, tmp_path: Path, requests: Requests
) -> None:
    """Heads with little between them take one request together. The first file, and one a thread, may be parsed."""
    paths = write_files(tmp_path, suffix, elements)
    headers = dict(read_headers(paths))
    assert list(headers) == paths
    assert requests.count <= FILES * most + 9 * 30
    assert 2 <= requests.most <= 64 + 8
    requests.count = 0
    first = headers[paths[0]]
    assert isinstance(first, Header)
    ckpt._spans.cache_clear()
    for path in paths:
        os.utime(path, ns=(1, 1))  # else it would not be read again
        read_header(path, first)
    assert FILES <= requests.count <= FILES * most


@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_headers_are_those_of_files_read_alone(wait: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that differ by a byte of a head, anywhere in it, have headers of their own."""
    monkeypatch.setattr(headers_module, "_WAIT", wait)
    paths = write_files(tmp_path, "ckpt", 64)
    original = paths[0].read_bytes()
    for number in range(1, FILES):
        at = original.index(f"w{number % 20}".encode())
        changed = bytearray(original)
        changed[at : at + 1] = b"x"
        paths[number].write_bytes(changed)
    for path, header in read_headers(paths):
        alone = ckpt.scan(path)
        assert isinstance(header, Header)
        assert (header.tensors, header.frames, header.size) == (alone.tensors, alone.frames, alone.size)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kinds", [1, 2, 4])
def test_files_of_several_kinds_in_turn(suffix: str, kinds: int, tmp_path: Path) -> None:
    """Ranks have files of weights and of states, say: those of a kind share their tensors, and are parsed once."""
    for number in range(FILES):
        name = f"w{number % kinds}"
        bits = np.full((64,), number, np.uint32)
        write_tensors(tmp_path / f"file_{number:02}.{suffix}", {name: Tensor(by_name("float32"), bits)})
    found = dict(read_headers(sorted(tmp_path.iterdir())))
    headers = [header for header in found.values() if isinstance(header, Header)]
    assert len(headers) == FILES
    shared = {(name, id(header.tensors)) for header in headers for name in header.tensors}
    assert sorted(name for name, _ in shared) == [f"w{kind}" for kind in range(kinds)]


@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_all_damaged_files_are_reported_in_order(wait: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers_module, "_WAIT", wait)
    paths = write_files(tmp_path, "ckpt", 64)
    damaged = {paths[0], paths[7], paths[39]}
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    found = list(read_headers(paths))
    assert [path for path, _ in found] == paths
    assert {path for path, header in found if isinstance(header, FormatError)} == damaged


def test_no_thread_is_left_when_nobody_wants_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    monkeypatch.setattr(headers_module, "_WAIT", 0.0)
    headers = read_headers(write_files(tmp_path, "ckpt", 64))
    next(headers)
    next(headers)
    headers.close()
    assert set(threading.enumerate()) <= before


def test_what_is_in_memory_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is."""
    (path, *_) = write_files(tmp_path, "ckpt", 4096)
    monkeypatch.setattr(guesses, "_QUICK_SECONDS", -1)
    monkeypatch.setattr(guesses, "waits", itertools.count().__next__)
    monkeypatch.setattr(guesses, "_slow_devices", set())
    with path.open("rb") as stream:
        pieces = guesses.Pieces(stream.fileno())
        content = [pieces.read(start, 100) for start in range(10)]
        if not pieces._can_tell:
            pytest.skip("this file system does not say what is in memory")
        assert content == [path.read_bytes()[start : start + 100] for start in range(10)]
        assert not pieces.is_slow


def test_a_quick_disk_needs_no_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers_module, "_WAIT", 60.0)
    monkeypatch.setattr(waiting, "_waited", 0.0)
    monkeypatch.setattr(guesses, "_QUICK_SECONDS", 60.0)
    monkeypatch.setattr(guesses, "_slow_devices", set())
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread was started"))
    assert len(list(read_headers(write_files(tmp_path, "ckpt", 64)))) == FILES


def test_nothing_is_learned_of_many_small_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a million of them, on a slow disk, would take as long again; what comes after them is guessed."""
    learned: list[str] = []
    real = guesses.Pieces._learn

    def learn(self: Any, name: str, *place: int) -> str:
        learned.append(name)
        return real(self, name, *place)

    monkeypatch.setattr(guesses.Pieces, "_learn", learn)
    monkeypatch.setattr(guesses.Pieces, "is_slow", True)
    kind, numbers = by_name("float32"), range(3000)
    small = {f"s{number}": Tensor(kind, np.zeros((1,), np.uint32)) for number in numbers}
    path = write_tensors(tmp_path / "a.ckpt", {**small, "large": Tensor(kind, np.zeros((999,), np.uint32))})
    assert list(scan(path).tensors) == [*small, "large"]
    assert learned == [*[f"s{number}" for number in numbers[:1000]], "large"]
