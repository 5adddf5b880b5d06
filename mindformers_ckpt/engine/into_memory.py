"""Parts of shards into arrays in memory, in the order of the files.

Memory can be filled in any order, so a file is read from its beginning to its end, by requests of 1 MiB of whole pages,
and what nobody takes of it is left out. Through the page cache one call has what is contiguous read to its place in the
arrays; past it (O_DIRECT), where places would have to lie as in the file, a thread reads into a buffer of its own, and
copies while that is in the cache of its core. So requests are large also where a file has many small tensors, and no
thread waits for another one.

One thread reads as long as it need not wait: on a warm disk more would only wait for each other, and what is in the
page cache is read as such, however busy the machine is. Where reading has to wait there are 16 threads, and up to 64
the longer a request takes; more than are needed would only wait for the interpreter. After the first request that
waited there are but 4, unless looking at the files had to wait, too: of a warm file the system may have given up pages.
"""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.disk.waiting import has_waited, waits
from mindformers_ckpt.engine.ahead import is_near
from mindformers_ckpt.engine.fetcher import AHEAD_BYTES, PAGE, Fetcher, request_bytes

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.uint8]]

# Of a piece that cannot be cut at any byte: small, so that a request is nearly full when the next does not fit.
LEAST_BYTES = 256 << 10
_FEW_THREADS, _THREADS, _MOST_THREADS = 4, 16, 64
_QUICK_SECONDS = 500e-6  # memory is read in less
_REQUESTS_PER_SECOND = 3000  # that threads are started for, by how long one takes
_SECONDS_BETWEEN_CHECKS = 0.05


class Piece(NamedTuple):
    """Bytes of a file, and where they go.

    `strides` are those of the bytes in the file, for an array of the shape of `target`; none where both are one run.
    """

    path: Path
    start: int
    stop: int
    target: Array
    strides: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cut(self, count: int) -> tuple[Piece, Piece]:
        """The first `count` bytes of a run, and the others."""
        path, start, stop, target, _ = self
        return Piece(path, start, start + count, target[:count]), Piece(path, start + count, stop, target[count:])

    def copy(self, memory: Array, at: int) -> None:
        """Copy to the target what is in `memory` from `at` on."""
        import numpy as np

        # Unlike the assignment of a memoryview, this one lets other threads go on.
        self.target[...] = np.ndarray(self.target.shape, np.uint8, memory, at, self.strides or None)


class Request(NamedTuple):
    """What is read at once: pieces in the order of a file. Requests are numbered from 0.

    Reading begins with a page, at `start`, and ends at `stop`.
    """

    number: int
    pieces: list[Piece]
    start: int
    stop: int

    @property
    def path(self) -> Path:
        return self.pieces[0].path

    @property
    def size(self) -> int:
        """The bytes that go to targets, without what lies between them in the file."""
        return sum(piece.target.size for piece in self.pieces)

    def parts(self, memory: Array) -> list[memoryview]:
        """Where the bytes from the first piece on may be read to: runs to their targets, what else there is to memory.

        `memory` has room for all pages of the request. No parts where pieces overlap.
        """
        parts: list[memoryview] = []
        at, origin = self.pieces[0].start, self.start
        for _, start, stop, target, strides in self.pieces:
            if start < at:
                return []
            if start > at:
                parts.append(memory[at - origin : start - origin].data)
            if start < stop:
                parts.append((memory[start - origin : stop - origin] if strides else target).data)
            at = stop
        return parts

    def content(self, memory: Array) -> memoryview:
        """The bytes of the targets, one after the other: where they are, if they are one run, else in `memory`."""
        if len(self.pieces) == 1 and not self.pieces[0].strides:
            return self.pieces[0].target.data
        at = 0
        for piece in self.pieces:
            memory[at : at + piece.target.size].reshape(piece.target.shape)[...] = piece.target
            at += piece.target.size
        return memory[:at].data

    def take(self, memory: Array) -> None:
        """Copy to the targets what `content` gave of them elsewhere."""
        at = 0
        for piece in self.pieces:
            piece.target[...] = memory[at : at + piece.target.size].reshape(piece.target.shape)
            at += piece.target.size


def requests_of(pieces: Iterable[Piece]) -> Iterator[Request]:
    """Put pieces, in the order of their files, together to requests."""
    held: list[Piece] = []
    begin = end = limit = needed = room = number = 0
    for piece in pieces:
        left: Piece | None = piece
        while left is not None:
            path, start, stop, _, strides = left
            size = stop - start
            if held:
                room = begin + limit - start if _is_next(held[-1], left, begin, needed + size) else 0
                if room <= 0 or (strides and size > room):
                    yield Request(number, held, begin, end)
                    held, number = [], number + 1
            if not held:
                begin, end, limit, needed = start // PAGE * PAGE, 0, request_bytes(path), 0
                room = begin + limit - start
            now, left = (left, None) if strides or size <= room else left.cut(room)
            held.append(now)
            end, needed = max(end, now.stop), needed + now.stop - start
    if held:
        yield Request(number, held, begin, end)


def _is_next(last: Piece, piece: Piece, begin: int, needed: int) -> bool:
    """Whether a piece is read with those up to the last, from `begin` on, to get `needed` bytes: whether it is near."""
    if (piece.path is not last.path and piece.path != last.path) or piece.start < begin:
        return False
    return is_near(piece.start - last.stop, needed)


class _Filling:
    """Requests that several threads take, and the first failure."""

    def __init__(self, fetcher: Fetcher, requests: Iterator[Request], done: Callable[[Request], None]) -> None:
        self._fetcher, self._requests, self._done = fetcher, requests, done
        self._is_slow = has_waited()  # what was looked at last of the files
        self._least = math.inf  # seconds of a request that had to wait
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._is_stopped = False

    def run(self, check: Callable[[], None]) -> None:
        """Read all in this thread, and in others where reading has to wait."""
        try:
            self._work(check, self._grow)
            for thread in self._threads:
                while thread.is_alive():
                    check()
                    thread.join(_SECONDS_BETWEEN_CHECKS)
        finally:
            self._is_stopped = True
            for thread in self._threads:
                thread.join()
        if self._failure is not None:
            raise self._failure

    def _help(self) -> None:
        try:
            self._work(lambda: None, lambda seconds, size: None)
        except BaseException as error:  # whatever it is, the caller raises it
            self._failure = self._failure or error

    def _work(self, check: Callable[[], None], waited: Callable[[float, int], None]) -> None:
        """Take requests until there are none; `waited` is told how long one had to wait, and its bytes."""
        import numpy as np

        memory: Array | None = None
        due = 0.0  # the time of the next check: it costs as much as reading a small request
        for request in self._taken():
            if time.monotonic() >= due:
                check()
                due = time.monotonic() + _SECONDS_BETWEEN_CHECKS
            _, pieces, start, stop = request
            path, needed = request.path, -(-(stop - start) // PAGE) * PAGE
            if memory is None or len(memory) < needed:
                memory = np.frombuffer(mmap.mmap(-1, max(needed, request_bytes(path))), np.uint8)  # whole pages
            parts = request.parts(memory)
            is_copied = self._fetcher.scatter_warm(path, pieces[0].start, parts)
            if not is_copied:
                started, before = time.perf_counter(), waits()
                is_copied = self._fetcher.scatter(path, pieces[0].start, parts)
                if not is_copied:
                    self._fetcher.fill(path, start, memory.data[:needed], stop - start)
                if waits() > before:
                    waited(time.perf_counter() - started, len(memory))
            for piece in pieces:
                if piece.strides or not is_copied:
                    piece.copy(memory, piece.start - start)
            self._done(request)

    def _taken(self) -> Iterator[Request]:
        """The requests that a thread takes."""
        while not self._is_stopped and self._failure is None:
            with self._lock:
                request = next(self._requests, None)
            if request is None:
                return
            yield request

    def _grow(self, seconds: float, size: int) -> None:
        """Have other threads read, too: a request of so many bytes had to wait."""
        if seconds < _QUICK_SECONDS:
            return
        wanted = _THREADS if self._is_slow else _FEW_THREADS
        if self._threads:  # the first request may have waited for a file to be opened, too
            self._least = min(self._least, seconds)
            wanted = max(_THREADS, min(_MOST_THREADS, round(self._least * _REQUESTS_PER_SECOND)))
        wanted = min(wanted, AHEAD_BYTES // size)
        while len(self._threads) < wanted - 1:
            thread = threading.Thread(target=self._help, name="reader")
            try:
                thread.start()
            except RuntimeError:  # the system gives this process no more: those that are there read all
                return
            self._threads.append(thread)


Fill = Callable[[Fetcher, Iterable[Piece], Callable[[], None]], None]


def fill_arrays(fetcher: Fetcher, pieces: Iterable[Piece], check: Callable[[], None]) -> None:
    """Read pieces, which are in the order of their files, to their targets.

    `check` is called between requests and may raise to stop. Raises TransferError when reading fails.
    """
    fill_requests(fetcher, requests_of(pieces), check, lambda request: None)


def fill_requests(
    fetcher: Fetcher, requests: Iterator[Request], check: Callable[[], None], done: Callable[[Request], None]
) -> None:
    """Read requests to the targets of their pieces; `done` is told of each, by the thread that has read it.

    Several threads take requests, one at a time. `check` and errors are as for `fill_arrays`.
    """
    _Filling(fetcher, requests, done).run(check)
