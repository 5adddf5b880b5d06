"""Small pieces of a file, asked for in time where the disk lets a reader wait; and guesses of which will be needed.

The heads of a `.ckpt` file are a chain: where the next record begins is known when the one before has been read. On
storage with latency that is one round trip a tensor. But layers repeat, and the moments of an optimizer repeat the
weights: after a few records it can be guessed where the next hundred begin. A guess only decides what is read early.
Where one is wrong, the head is read as if there had been none.

Of a file on a disk the system is told what will be needed (`POSIX_FADV_WILLNEED`), and sends all requests at once: no
threads are needed, which would take more time than such small reads. An object storage is asked by threads.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ckpt.disk.waiting import each, has_waited, mount_of, read_at_once, waits
from mindformers_ckpt.objects.reading import Handle, pread

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

_AT_ONCE = 64
_GUESSES, _GUESSED_OBJECTS = 128, 64  # heads that are on their way at once; each of an object takes the processor, too
_TRIED = 32  # pieces after which it is known whether asking for them has an effect
_CAN_ASK = hasattr(os, "posix_fadvise")
# A guess may be wrong by a byte a record, where the numbers in names get longer.
_BEFORE, _WINDOW = 256, 4096
# Where nothing tells what comes next: records as long as the last one, so many in a row, or as one of those before it.
_RUN, _LENGTHS = 8, 8
# Heads that are tried so in vain, at most; each that is right allows some more.
_TRIES, _TRIES_MORE = 64, 16
# What is read of the chain itself, at least.
_QUICK_BYTES, _SLOW_BYTES = 512, 16 << 10
# A read that takes longer has waited for the disk. From the third one on it is worth while to read several at once.
_QUICK_SECONDS = 0.0004
_WAITS = 3
_REMEMBERED = 4096  # records, for guesses that are made when it turns out later that reading has to wait
# So many small records in a row are no layers, and dozens of them come with one read: there is nothing to guess.
_SMALL_BYTES, _MANY_SMALL = 256, 1000
# Of a layer or an expert, but not that of `w1`.
_NUMBER = re.compile(r"(?<![A-Za-z\d])\d+")


class _Kind(NamedTuple):
    """A record as it was met last, by its name, and by its name without the numbers: its bytes, and what came then."""

    head: int
    content: int
    following: str = ""


class _Pool:
    """Threads that all objects share which are looked at; they end with the last of these."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._threads: ThreadPoolExecutor | None = None

    def enter(self) -> ThreadPoolExecutor:
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            self._users += 1
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_AT_ONCE, "heads")
            return self._threads

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            threads = None if self._users else self._threads
            if threads is not None:
                self._threads = None
        if threads is not None:
            threads.shutdown(wait=True)


_pool = _Pool()


class _FromDisk:
    """What is read early of a file on a disk: the system is asked to have it in memory."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def ask(self, start: int, length: int) -> None:
        """Have bytes read that will be needed."""
        if _CAN_ASK:
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def ask_all(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have several ranges (start, length) read."""
        for start, length in ranges:
            self.ask(start, length)

    def get(self, start: int, length: int) -> bytes:
        """Bytes that were asked for."""
        return os.pread(self._descriptor, length, start)

    def drop(self, start: int, length: int) -> None:
        """The system forgets by itself what it has read."""

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Bytes of several ranges (start, length), in their order."""
        asked = late = 0
        for number, piece in enumerate(ranges):
            if number == _TRIED and late > _TRIED // 2:  # asking has no effect, as on a mount that caches nothing
                yield from each(lambda piece: self.get(*piece), ranges[number:], at_once=_AT_ONCE)
                return
            self.ask_all(ranges[max(asked, number) : number + _GUESSES])
            asked = number + _GUESSES
            data, is_late = _timed(self._descriptor, *piece)
            late += is_late
            yield data

    def close(self) -> None:
        """Nothing was opened."""


class _FromStorage:
    """What is read early of an object: by threads."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._pool: ThreadPoolExecutor | None = None
        self._asked: dict[tuple[int, int], Future[list[bytes]]] = {}

    def ask(self, start: int, length: int) -> None:
        """Have bytes read that will be needed."""
        self._asked[start, length] = self._submit([(start, length)])

    def get(self, start: int, length: int) -> bytes:
        """Bytes that were asked for."""
        return self._asked[start, length].result()[0]

    def drop(self, start: int, length: int) -> None:
        """What was asked for is not needed, or not any more."""
        self._asked.pop((start, length)).cancel()

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Bytes of several ranges (start, length), in their order."""
        share = -(-len(ranges) // _AT_ONCE)
        for pieces in [self._submit(ranges[at : at + share]) for at in range(0, len(ranges), share)]:
            yield from pieces.result()

    def close(self) -> None:
        """Nothing is needed any more."""
        for piece in self._asked.values():
            piece.cancel()
        self._asked.clear()
        if self._pool is not None:
            _pool.leave()
            self._pool = None

    def _submit(self, ranges: Sequence[tuple[int, int]]) -> Future[list[bytes]]:
        """Have ranges read by a thread, one after the other."""
        if self._pool is None:
            self._pool = _pool.enter()
        return self._pool.submit(lambda: [pread(self._handle, length, start) for start, length in ranges])


def _timed(handle: Handle, start: int, length: int) -> tuple[bytes, bool]:
    """Bytes of a file, and whether the disk had to be waited for."""
    started, before = time.perf_counter(), waits()
    data = pread(handle, length, start)
    return data, time.perf_counter() - started > _QUICK_SECONDS and waits() > before


_NO_DEVICE = -1  # of an object
_slow_devices: set[int] = set()  # on which reading had to wait


class Pieces:
    """Reads small pieces of an open file. Those of an object storage always have to be waited for."""

    def __init__(self, handle: Handle, size: int = 0) -> None:
        """`size`: bytes of the file, where records are met."""
        self._handle, self._size = handle, size
        self._early: _FromDisk | _FromStorage
        if isinstance(handle, int):
            self._early, self._device, self._most = _FromDisk(handle), mount_of(handle), _GUESSES
            # A file on a disk that was slow may be in memory all the same: its own first read decides.
            self._waits = _WAITS - 1 if self._device in _slow_devices or has_waited() else 0
        else:
            self._early, self._device, self._most = _FromStorage(handle), _NO_DEVICE, _GUESSED_OBJECTS
            self._waits = _WAITS
        self._switches = waits()
        self._can_tell = isinstance(handle, int)  # what is in memory
        # What no guess was made of so far.
        self._met: deque[tuple[str, int, int, int]] = deque(maxlen=_REMEMBERED)
        self._small = 0  # records in a row
        self._kinds: dict[str, _Kind] = {}
        self._first = ""
        self._last: tuple[str, ...] = ()
        self._lengths: deque[int] = deque(maxlen=_LENGTHS)  # of records, those that differ from one another
        self._tries = _TRIES
        self._guessed: deque[int] = deque()
        self._next: tuple[str, int, int, int] | None = None

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file, fewer at its end."""
        if self.is_slow:
            return pread(self._handle, length, start)
        held = self._held(start, length)
        if held is not None:
            return held
        started = time.perf_counter()
        data = pread(self._handle, length, start)
        if time.perf_counter() - started > _QUICK_SECONDS and self._has_waited():
            self._waits += 1
            if self.is_slow:
                _slow_devices.add(self._device)
        return data

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Bytes of several ranges (start, length), in their order."""
        if self._waits and isinstance(self._early, _FromDisk):  # it is likely that they have to be waited for
            self._early.ask_all(ranges[:_GUESSES])
        for number, piece in enumerate(ranges):
            if self.is_slow:
                yield from self._early.read_all(ranges[number:])
                return
            yield self.read(*piece)

    def _held(self, start: int, length: int) -> bytes | None:
        """Bytes that are in memory; None where they are not, or the file system cannot say.

        They count as no wait, however long a busy machine takes.
        """
        if not self._can_tell or not isinstance(self._handle, int):
            return None
        memory = bytearray(length)
        count = read_at_once(self._handle, [memory], start)
        self._can_tell = count is not None
        return bytes(memory) if count == length else None

    def _has_waited(self) -> bool:
        """Whether this thread has waited since this was asked last: only for reads that took long, as it costs more."""
        before, self._switches = self._switches, waits()
        return self._switches > before

    @property
    def is_slow(self) -> bool:
        """Whether reading has to wait."""
        return self._waits >= _WAITS

    def met(self, name: str, start: int, content: int, end: int) -> None:
        """A record was read that begins at `start`, its content at `content`; guess the next ones."""
        self._small = self._small + 1 if end - start < _SMALL_BYTES else 0
        if self._small > _MANY_SMALL:
            return
        self._met.append((name, start, content, end))
        if self.is_slow:
            for record in self._met:
                kind = self._learn(*record)
            self._met.clear()
            self._guess(name, kind, end)

    def window(self, position: int) -> bytes:
        """What was read early of the file from `position` on; nothing, where no guess was right."""
        while self._guessed:
            start = self._guessed[0]
            if position < start:
                if self._next is None:  # it is what comes after this record that was tried
                    return b""
                break  # the guesses have gone astray
            if position < start + _WINDOW:
                if self._next is None:
                    self._tries = min(_TRIES, self._tries + _TRIES_MORE)
                return self._early.get(start, _WINDOW)[position - start :]
            self._early.drop(self._guessed.popleft(), _WINDOW)
        self._forget()
        self._next = None
        if self.is_slow:
            self._try_lengths(position)
        return b""

    @property
    def least(self) -> int:
        """How many bytes of the chain are read at once, at least: more where many records are in them."""
        return _SLOW_BYTES if self.is_slow or self._small > _MANY_SMALL else _QUICK_BYTES

    def close(self) -> None:
        """Nothing is needed any more of what was asked for."""
        self._early.close()

    def _learn(self, name: str, start: int, content: int, end: int) -> str:
        """Note how long a record is, and that it came after the one before it; its kind."""
        self._first = self._first or name
        is_moment = name.partition(".")[2] in self._kinds
        kind = _NUMBER.sub("#", name) + "#"
        for last, this in zip(self._last, (name, kind)):
            if this == kind or not is_moment:  # what comes after the last weight does not come after its moments
                self._kinds[last] = self._kinds[last]._replace(following=this)
        for this in (name, kind):
            known = self._kinds.get(this)
            self._kinds[this] = _Kind(content - start, end - content, known.following if known else "")
        self._last = name, kind
        for length in [known for known in self._lengths if abs(end - start - known) < _BEFORE]:
            self._lengths.remove(length)
        self._lengths.append(end - start)
        return kind

    def _guess(self, name: str, kind: str, end: int) -> None:
        """Have the heads read that are expected after a record, which ends at `end`."""
        if self._next is not None and not self._next[0] and end + _BEFORE > self._next[1]:
            self._next = None  # this was the last one that was expected
        if self._next is None:
            self._next = self._expected(name, kind, end)
            if self._next is None:
                self._try_lengths(end)
                return
            self._forget()
        model, position, factor, longer = self._next
        while len(self._guessed) < self._most and model and position < self._size:
            if not self._guessed or position + _BEFORE > self._guessed[-1] + _WINDOW:
                self._ask(position)
            model = self._kinds[model].following or (self._first if longer > 0 else "")  # the next moments are alike
            if model:
                guessed = self._kinds[model]
                position += guessed.head + longer + guessed.content * factor
        self._next = model, position, factor, longer

    def _expected(self, name: str, kind: str, end: int) -> tuple[str, int, int, int] | None:
        """What is known of the records that come after one, by its kind or that of the weight that it belongs to."""
        # The moments of `wq` are named `adam_m.wq`: what follows them is known from the weights.
        likely = (name.partition(".")[2], kind, kind.partition(".")[2])
        model = next((other for other in likely if other in self._kinds and self._kinds[other].following), None)
        if model is None:
            return None
        own, its = self._kinds[kind], self._kinds[model]
        if own.content % max(its.content, 1):
            return None
        return model, end, own.content // max(its.content, 1), own.head - its.head

    def _try_lengths(self, end: int) -> None:
        """Have heads read after the next record, of which nothing is known: it may be as long as others were."""
        lengths = {length * times for length in list(self._lengths)[-1:] for times in range(1, _RUN + 1)}
        asked, self._guessed = self._guessed, deque()
        for position in sorted(end + length for length in lengths.union(self._lengths) if end + length < self._size):
            while asked and asked[0] < position:
                self._guessed.append(asked.popleft())
            is_new = not self._guessed or position + _BEFORE > self._guessed[-1] + _WINDOW
            if is_new and self._tries > 0:
                self._tries -= 1
                self._ask(position)
        self._guessed.extend(asked)

    def _ask(self, position: int) -> None:
        """Have a head read that may begin at a position."""
        start = max(0, position - _BEFORE)
        self._early.ask(start, _WINDOW)
        self._guessed.append(start)

    def _forget(self) -> None:
        """What was asked for early is not needed."""
        for start in self._guessed:
            self._early.drop(start, _WINDOW)
        self._guessed.clear()
