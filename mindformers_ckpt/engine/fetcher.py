"""The source files of a process, open once and read by many threads.

Past the page cache (O_DIRECT) where the file system has that: a tenth of the processor's time, and what a job has in
the page cache stays there. `is_shared` turns it off where other processes read the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.disk.waiting import read_at_once, waits
from mindformers_ckpt.engine import page_cache
from mindformers_ckpt.engine.descriptors import Descriptors, fill
from mindformers_ckpt.engine.requests import Readers, Request
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.objects.path import ObjectPath
from mindformers_ckpt.objects.reading import Handle, preadv

# What a process holds of bytes that were read ahead.
AHEAD_BYTES = 72 << 20
REQUEST_BYTES = 1 << 20
_OBJECT_REQUEST_BYTES = 4 << 20
_MOST_REQUESTS = 64
_OPENED_EARLY = 32
_MOST_PARTS = 1024  # IOV_MAX
PAGE = 4096
# Memory is read in less, a disk takes longer.
_SECONDS_OF_MEMORY = 50e-6


class Extent(NamedTuple):
    """Bytes of a file."""

    path: Path
    start: int
    stop: int


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
        self._untold: set[Path] = set()  # of which nobody can say what is in memory

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
        return self._direct is None and self._scattered(path, start, parts, os.preadv)

    def scatter_warm(self, path: Path, start: int, parts: Sequence[memoryview]) -> bool:
        """`scatter`, if all the bytes are in the page cache: nobody waits for a disk. False where they are not."""
        return path not in self._untold and self._scattered(path, start, parts, read_at_once)

    def _scattered(
        self,
        path: Path,
        start: int,
        parts: Sequence[memoryview],
        read: Callable[[int, Sequence[memoryview], int], int | None],
    ) -> bool:
        if isinstance(path, ObjectPath) or not 0 < len(parts) <= _MOST_PARTS:
            return False
        try:
            with self._plain.borrowed(path) as descriptor:
                assert isinstance(descriptor, int)
                _no_read_ahead(descriptor)
                count = read(descriptor, parts, start)
                if count is None:
                    self._untold.add(path)
                return count == sum(map(len, parts))
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

    def open_early(self, paths: Sequence[Path]) -> None:
        """Begin to open files that will be read soon: on a network disk each is a round trip, or two."""
        for path in paths[:_OPENED_EARLY]:
            for files in (self._plain, self._direct):
                if files is not None and not isinstance(path, ObjectPath):
                    self._readers.begin(partial(self._open, files, path))

    def has_to_wait(self, extents: Sequence[Extent]) -> bool:
        """Whether reading has to wait for a disk: whether the middle of the largest extent is not in memory."""
        if not extents:
            return False
        if self._drops or isinstance(extents[0].path, ObjectPath):
            return True
        path, start, stop = max(extents, key=lambda extent: extent.stop - extent.start)
        if path not in self._slow:
            try:
                opening = time.perf_counter()
                with self._plain.borrowed(path) as descriptor:
                    if self._direct is not None and time.perf_counter() - opening > _SECONDS_OF_MEMORY:
                        self._readers.begin(partial(self._open, self._direct, path))  # meanwhile
                    if self._is_in_memory(descriptor, (start + stop) // 2, path):
                        return False
            except (OSError, TransferError):  # whoever reads it in the ordinary way has a message
                return False
        return True

    def _open(self, files: Descriptors, path: Path) -> int:
        """Open a file that will be read; whoever reads it has the error."""
        with contextlib.suppress(TransferError), files.borrowed(path):
            pass
        return 0

    def _is_in_memory(self, descriptor: Handle, at: int, path: Path) -> bool:
        assert isinstance(descriptor, int)
        buffer = bytearray(1)
        held = read_at_once(descriptor, [buffer], at)
        if held is not None:
            return held > 0
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
