"""Reading ahead: the bytes that the next blocks need are on their way while a block is copied.

A plan knows every byte before the first one is read, so nothing has to be guessed. The copier gives its blocks, step
by step, as it will copy them, with what each reads of which file. Here the steps are taken in batches of about 8 MiB.
What a batch reads is sorted by file and place, what lies near each other becomes one range of whole pages, and ranges
are read in requests of 1 MiB by threads, many at once. The copier then finds its bytes in memory and writes them from
where they are. Batches are made until the memory of the reader is used up, beyond the end of a task into the next one.

- **Only where reading has to wait.** Of every task one place is tried first. Where its bytes are in the page cache the
  files are read straight into the copier's buffers, which stay in a core's cache: on a warm disk that is the quickest.
- **Past the page cache** (O_DIRECT) where the file system has that: a tenth of the processor's time, and what a job has
  in the page cache stays there. `is_shared` turns it off where other processes read the same bytes.
- **Depth follows from latency.** A thread is started only when all others wait, so a quick disk sees few requests at
  once and a slow one as many as the memory holds.
- **Nothing here can be wrong.** What is not found here, because reading ahead failed or the file has become shorter, is
  read in the ordinary way, which has the error and its message.
"""

from __future__ import annotations

import mmap
import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from mindformers_ckpt.disk.waiting import waits
from mindformers_ckpt.engine import page_cache
from mindformers_ckpt.engine.descriptors import Descriptors, fill
from mindformers_ckpt.engine.requests import Readers, Request
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.objects.reading import Handle, preadv

# What a process holds of bytes that were read ahead, and a step of the work that is read as one.
AHEAD_BYTES = 72 << 20
_BATCH_BYTES = 8 << 20
_MEMORY_BYTES = 9 << 20  # for a batch, with what lies between
# What is looked at to see whether reading has to wait: enough for a place that no header is near to.
_TRIED_BYTES = 512 << 10
REQUEST_BYTES = 1 << 20
_OBJECT_REQUEST_BYTES = 4 << 20
_MOST_REQUESTS = 64
_MOST_PARTS = 1024  # IOV_MAX
PAGE = 4096
# Extents with less between them are read with it, unless that is over a quarter of what is needed.
_GAP_BYTES = 64 << 10
_OVER_READ = 4
# Memory is read in less, a disk takes longer.
_SECONDS_OF_MEMORY = 50e-6

T = TypeVar("T")


class Extent(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    stop: int


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The ranges of whole pages, by file and place, that hold all extents; near ones are one range."""
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for path, start, stop in extents:
        by_file.setdefault(path, []).append((start, stop))
    return [Extent(path, *pages) for path in sorted(by_file) for pages in _pages(sorted(by_file[path]))]


def _pages(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The ranges of whole pages of a file that hold its extents, which are in order."""
    begin = end = needed = 0  # the last range, and how many bytes of it are asked for
    for start, stop in extents:
        first, last = start // PAGE * PAGE, -(-stop // PAGE) * PAGE
        gap = first - end
        if needed and is_near(gap, needed + stop - start):
            end, needed = max(last, end), needed + stop - start
            continue
        if needed:
            yield begin, end
        begin, end, needed = first, last, stop - start
    if needed:
        yield begin, end


def is_near(gap: int, needed: int) -> bool:
    """Whether a gap between extents is read with them, to get `needed` bytes."""
    return gap <= 0 or (gap <= _GAP_BYTES and gap * _OVER_READ <= needed)


class _Range:
    """A range of a file in memory, filled request by request."""

    def __init__(self, extent: Extent, memory: memoryview, requests: Sequence[Request]) -> None:
        self.start, self.stop = extent.start, extent.stop
        self._memory, self._requests, self._size = memory, requests, request_bytes(extent.path)

    def bytes(self, start: int, length: int) -> memoryview | None:
        """Bytes of the range once they are there, None when they could not be read."""
        first, last = start - self.start, start - self.start + length
        for number in range(first // self._size, -(-last // self._size)):
            at = number * self._size
            if self._requests[number].filled() < min(last - at, self._size):
                return None
        return self._memory[first:last]

    def wait(self) -> None:
        for request in self._requests:
            request.wait()


class _Batch(Generic[T]):
    """Some steps, and the ranges of files that they read."""

    def __init__(self, steps: Sequence[T]) -> None:
        self.steps = steps
        self.memory: mmap.mmap | None = None
        self._ranges: dict[Path, tuple[list[int], list[_Range]]] = {}

    def add(self, path: Path, held: _Range) -> None:
        starts, ranges = self._ranges.setdefault(path, ([], []))
        starts.append(held.start)
        ranges.append(held)

    def bytes(self, path: Path, start: int, length: int) -> memoryview | None:
        starts, ranges = self._ranges.get(path, ((), ()))
        number = bisect_right(starts, start) - 1
        if number < 0 or start + length > ranges[number].stop:
            return None
        return ranges[number].bytes(start, length)

    def wait(self) -> None:
        """Until nothing writes into the memory any more."""
        for _, ranges in self._ranges.values():
            for held in ranges:
                held.wait()


class _Line(Generic[T]):
    """The steps of a task, and the batches of them that are on their way."""

    def __init__(self, task: int, steps: Iterator[T]) -> None:
        self.task, self.steps = task, steps
        self.batches: deque[_Batch[T]] = deque()
        self.is_begun = self.is_warm = self.is_taken = False


class Ahead(Generic[T]):
    """Reads ahead for one copier. `needs` says what a step reads."""

    def __init__(self, needs: Callable[[T], Sequence[Extent]], fetcher: Fetcher) -> None:
        self._needs, self._fetcher = needs, fetcher
        self._next: _Line[T] | None = None
        self._current: _Batch[T] | None = None
        self._held = 0
        self._is_slow = False  # as it was found last
        self._free: list[mmap.mmap] = []

    def steps(self, task: int, steps: Iterator[T], following: tuple[int, Iterator[T]] | None) -> Iterator[T]:
        """The steps of a task, each when its bytes are asked for; `following` is the task that is likely to be next."""
        line, self._next = self._next, None
        if line is None or line.task != task:
            if line is not None:
                self._drop(line)
            line = _Line(task, steps)
        self._next = None if following is None else _Line(*following)
        while True:
            self._fill(line, at_least=1)
            if self._next is not None and line.is_taken and not line.is_warm:
                self._fill(self._next, at_least=0)
            if not line.batches:
                break
            self._current = line.batches.popleft()
            yield from self._current.steps
            self._release(self._current)
            self._current = None
        yield from line.steps  # of a warm task

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the present step was read ahead."""
        return self._current is None or self._current.memory is None

    def bytes(self, path: Path, start: int, length: int) -> memoryview | None:
        """Bytes that the present step was said to need; None when they have to be read in the ordinary way."""
        return None if self._current is None else self._current.bytes(path, start, length)

    def fill(self, path: Path, start: int, memory: memoryview) -> None:
        """Fill memory with bytes of a file, read ahead or now. Raises TransferError when reading fails."""
        import numpy as np

        held = self.bytes(path, start, len(memory))
        if held is None:
            self._fetcher.read(path, start, memory)
        elif memory:  # unlike the assignment of a memoryview, this one lets other threads go on
            np.frombuffer(memory, np.uint8)[:] = np.frombuffer(held, np.uint8)

    def _fill(self, line: _Line[T], at_least: int) -> None:
        """Have batches of a line read, as far as the memory goes, and `at_least` so many."""
        most = self._fetcher.budget - _MEMORY_BYTES
        while not (line.is_taken or line.is_warm) and (self._held <= most or len(line.batches) < at_least):
            batch, extents = self._taken(line, _BATCH_BYTES if self._is_slow else _TRIED_BYTES)
            if not line.is_begun:
                line.is_begun, self._is_slow = True, self._fetcher.has_to_wait(extents)
                line.is_warm = not self._is_slow
            if batch.steps:
                line.batches.append(batch)
                if not line.is_warm:
                    self._start(batch, extents)

    def _taken(self, line: _Line[T], enough: int) -> tuple[_Batch[T], list[Extent]]:
        """The next steps of a line, and what they read: `enough` bytes, if there are."""
        steps: list[T] = []
        extents: list[Extent] = []
        size = 0
        for step in line.steps:
            steps.append(step)
            needed = self._needs(step)
            extents += needed
            size += sum(extent.stop - extent.start for extent in needed)
            if size >= enough:
                break
        else:
            line.is_taken = True
        return _Batch(steps), extents

    def _start(self, batch: _Batch[T], extents: Sequence[Extent]) -> None:
        ranges = merged(extents)
        size = sum(extent.stop - extent.start for extent in ranges)
        if not size:
            return
        batch.memory = self._memory(size)
        self._held += len(batch.memory)
        view, at = memoryview(batch.memory), 0
        for extent in ranges:
            memory = view[at : at + extent.stop - extent.start]
            batch.add(extent.path, _Range(extent, memory, self._fetcher.fetch(extent, memory)))
            at += len(memory)

    def _memory(self, size: int) -> mmap.mmap:
        """Memory that begins at a page: such as was used before, where it is large enough."""
        for number, memory in enumerate(self._free):
            if len(memory) >= size:
                return self._free.pop(number)
        if self._free:
            self._free.pop()
        made = mmap.mmap(-1, max(size, _MEMORY_BYTES))
        if hasattr(mmap, "MADV_DONTFORK"):  # a fork must not share pages into which a disk writes
            made.madvise(mmap.MADV_DONTFORK)
        return made

    def _release(self, batch: _Batch[T]) -> None:
        if batch.memory is not None:
            batch.wait()
            self._held -= len(batch.memory)
            self._free.append(batch.memory)
            batch.memory = None

    def _drop(self, line: _Line[T]) -> None:
        for batch in line.batches:
            self._release(batch)


class Fetcher:
    """The source files of a process: opened once, and read by many threads. Its readers share the memory for it."""

    def __init__(self, *, readers: int = 1, is_shared: bool = False, drops: bool = False) -> None:
        """`drops`: nothing of the files is to stay in the page cache."""
        self.budget = AHEAD_BYTES // readers
        self._drops = drops
        self._plain = Descriptors(os.O_RDONLY)
        self._direct = None if is_shared or not hasattr(os, "O_DIRECT") else Descriptors(os.O_RDONLY | os.O_DIRECT)
        self._readers = Readers(_MOST_REQUESTS)
        self._slow: set[Path] = set()

    def read(self, path: Path, start: int, memory: memoryview) -> None:
        """Fill memory with bytes of a file in the ordinary way. Raises TransferError when that fails."""
        with self._plain.borrowed(path) as descriptor:
            fill(descriptor, path, start, memory)
            if self._drops:
                page_cache.drop(descriptor, start, len(memory))

    def stream(self, path: Path, start: int, memory: memoryview, counts: Iterable[int]) -> Iterator[memoryview]:
        """Bytes of a file from `start` on, so many at a time, each in the same memory. Raises TransferError."""
        with self._plain.borrowed(path) as descriptor:
            for count in counts:
                piece = memory[:count]
                fill(descriptor, path, start, piece)
                if self._drops:
                    page_cache.drop(descriptor, start, count)
                yield piece
                start += count

    def scatter(self, path: Path, start: int, parts: Sequence[memoryview]) -> bool:
        """Fill parts of memory with the bytes of a file from `start` on, in one call through the page cache.

        False where that is not how files are read, or not all has come.
        """
        if self._direct is not None or isinstance(path, ObjectPath) or not 0 < len(parts) <= _MOST_PARTS:
            return False
        try:
            with self._plain.borrowed(path) as descriptor:
                assert isinstance(descriptor, int)
                _no_read_ahead(descriptor)
                return os.preadv(descriptor, parts, start) == sum(map(len, parts))
        except (OSError, TransferError):  # whoever reads it in the ordinary way has a message
            return False

    def fill(self, path: Path, start: int, memory: memoryview, needed: int) -> None:
        """Fill whole pages of memory with bytes of a file, of which the first `needed` must be there.

        Raises TransferError when reading fails.
        """
        if self._read(path, start, memory) < needed:  # whoever reads it in the ordinary way has a message
            self.read(path, start, memory[:needed])

    def fetch(self, extent: Extent, memory: memoryview) -> list[Request]:
        """Begin to read a range, request by request."""
        size = request_bytes(extent.path)
        return [
            self._readers.begin(partial(self._read, extent.path, extent.start + at, memory[at : at + size]))
            for at in range(0, len(memory), size)
        ]

    def has_to_wait(self, extents: Sequence[Extent]) -> bool:
        """Whether reading has to wait for a disk: whether the middle of the largest extent is not in memory."""
        if not extents:
            return False
        if self._drops or isinstance(extents[0].path, ObjectPath):
            return True
        path, start, stop = max(extents, key=lambda extent: extent.stop - extent.start)
        if path not in self._slow:
            try:
                with self._plain.borrowed(path) as descriptor:
                    if self._is_in_memory(descriptor, (start + stop) // 2, path):
                        return False
            except (OSError, TransferError):  # whoever reads it in the ordinary way has a message
                return False
        return True

    def _is_in_memory(self, descriptor: Handle, at: int, path: Path) -> bool:
        assert isinstance(descriptor, int)
        buffer = bytearray(1)
        if hasattr(os, "RWF_NOWAIT"):
            try:
                os.preadv(descriptor, [buffer], at, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
            except OSError:  # the file system cannot say
                pass
            else:
                return True
        started, switches = time.perf_counter(), waits()
        os.preadv(descriptor, [buffer], at)
        if waits() == switches or time.perf_counter() - started < _SECONDS_OF_MEMORY:
            return True
        self._slow.add(path)  # the place is in memory from now on, and says nothing more
        return False

    def _read(self, path: Path, start: int, memory: memoryview) -> int:
        """Fill memory with bytes of a file, and say how many have come."""
        for files in (self._direct, self._plain):
            if files is not None and not (files is self._direct and isinstance(path, ObjectPath)):
                try:
                    with files.borrowed(path) as descriptor:
                        if files is self._plain:
                            _no_read_ahead(descriptor)
                        filled = _filled(descriptor, start, memory)
                        if self._drops:
                            page_cache.drop(descriptor, start, len(memory))
                        return filled
                except (OSError, TransferError):
                    continue
        return 0

    def close(self) -> None:
        self._readers.close()
        self._plain.close()
        if self._direct is not None:
            self._direct.close()


def request_bytes(path: Path) -> int:
    """Bytes of a request: more where each costs time of the processor, too."""
    return _OBJECT_REQUEST_BYTES if isinstance(path, ObjectPath) else REQUEST_BYTES


def _no_read_ahead(descriptor: Handle) -> None:
    """Keep the system from reading ahead in a file: what is needed is asked for here."""
    if page_cache.CAN_DROP and isinstance(descriptor, int):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def _filled(descriptor: Handle, start: int, memory: memoryview) -> int:
    filled = 0
    while filled < len(memory):
        count = preadv(descriptor, memory[filled:], start + filled)
        filled += count
        if count % PAGE or not count:  # the end of the file
            break
    return filled
