"""Reading ahead: the bytes that the next blocks need are on their way while a block is copied.

A plan knows every byte before the first one is read, so nothing has to be guessed. The copier gives its blocks, step
by step, as it will copy them, with what each reads of which file. Here the steps are taken in batches of about 8 MiB.
What a batch reads is sorted by file and place, what lies near each other becomes one range of whole pages, and ranges
are read in requests of 1 MiB by threads, many at once. The copier then finds its bytes in memory and writes them from
where they are. Batches are made until the memory of the reader is used up, beyond the end of a task into the next one.

- **Only where reading has to wait.** Of every task one place is tried first. Where its bytes are in the page cache the
  files are read straight into the copier's buffers, which stay in a core's cache: on a warm disk that is the quickest.
- **Depth follows from latency.** A thread is started only when all others wait, so a quick disk sees few requests at
  once and a slow one as many as the memory holds.
- **Nothing here can be wrong.** What is not found here, because reading ahead failed or the file has become shorter, is
  read in the ordinary way, which has the error and its message.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from mindformers_ckpt.engine.fetcher import PAGE, Extent, Fetcher, request_bytes
from mindformers_ckpt.engine.requests import Request

# A step of the work that is read as one.
_BATCH_BYTES = 8 << 20
_MEMORY_BYTES = 9 << 20  # for a batch, with what lies between
# What is looked at to see whether reading has to wait: enough for a place that no header is near to.
_TRIED_BYTES = 512 << 10
# Extents with less between them are read with it, unless that is over a quarter of what is needed.
_GAP_BYTES = 64 << 10
_OVER_READ = 4

T = TypeVar("T")


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
