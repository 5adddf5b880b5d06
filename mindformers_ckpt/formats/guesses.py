"""Small pieces of a file, asked for in time where the disk lets a reader wait; and guesses of which will be needed.

The heads of a `.ckpt` file are a chain: where the next record begins is known when the one before has been read. On
storage with latency that is one round trip a tensor. But layers repeat, and the moments of an optimizer repeat the
weights: after a few records it can be guessed where the next hundred begin. A guess only decides what is read early.
Where one is wrong, the head is read as if there had been none.

The system is told what will be needed (`POSIX_FADV_WILLNEED`), and sends all requests at once: no threads are needed,
which would take more time than such small reads.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mindformers_ckpt.disk.waiting import each, waits

_AT_ONCE = 64
_TRIED = 32  # pieces after which it is known whether asking for them has an effect
_CAN_ASK = hasattr(os, "posix_fadvise")
# A guess may be wrong by a byte a record, where the numbers in names get longer.
_BEFORE, _WINDOW = 256, 4096
# What is read of the chain itself, at least.
_QUICK_BYTES, _SLOW_BYTES = 512, 16 << 10
# A read that takes longer has waited for the disk. From the third one on it is worth while to read several at once.
_QUICK_SECONDS = 0.0004
_WAITS = 3
# Of a layer or an expert, but not that of `w1`.
_NUMBER = re.compile(r"(?<![A-Za-z\d])\d+")


class _Kind(NamedTuple):
    """A record as it was met last, by its name, and by its name without the numbers: its bytes, and what came then."""

    head: int
    content: int
    following: str = ""


_slow_devices: set[int] = set()  # on which reading had to wait


class Pieces:
    """Reads small pieces of an open file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._device = os.fstat(descriptor).st_dev
        # A file on a disk that was slow may be in memory all the same: its own first read decides.
        self._waits = _WAITS - 1 if self._device in _slow_devices else 0
        self._kinds: dict[str, _Kind] = {}
        self._last: tuple[str, ...] = ()
        self._guessed: deque[int] = deque()
        self._next: tuple[str, int, int, int] | None = None

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file, fewer at its end."""
        if self.is_slow:
            return os.pread(self._descriptor, length, start)
        data, has_waited = self._timed(start, length)
        if has_waited:
            self._waits += 1
            if self.is_slow:
                _slow_devices.add(self._device)
        return data

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Bytes of several ranges (start, length), in their order."""
        asked = tried = late = 0
        for number, (start, length) in enumerate(ranges):
            if not self.is_slow:
                yield self.read(start, length)
                continue
            if tried == _TRIED and late > _TRIED // 2:  # asking has no effect, as on a mount that caches nothing
                yield from each(lambda piece: self.read(*piece), ranges[number:], at_once=_AT_ONCE)
                return
            for piece in ranges[max(asked, number) : number + _AT_ONCE]:
                self._ask(*piece)
            asked = number + _AT_ONCE
            data, is_late = self._timed(start, length)
            tried, late = tried + 1, late + is_late
            yield data

    @property
    def is_slow(self) -> bool:
        """Whether reading has to wait."""
        return self._waits >= _WAITS

    def met(self, name: str, start: int, content: int, end: int) -> None:
        """A record was read that begins at `start`, its content at `content`; guess the next ones."""
        is_moment = name.partition(".")[2] in self._kinds
        kind = _NUMBER.sub("#", name) + "#"
        for last, this in zip(self._last, (name, kind)):
            if this == kind or not is_moment:  # what comes after the last weight does not come after its moments
                self._kinds[last] = self._kinds[last]._replace(following=this)
        for this in (name, kind):
            known = self._kinds.get(this)
            self._kinds[this] = _Kind(content - start, end - content, known.following if known else "")
        self._last = name, kind
        if self.is_slow:
            self._guess(name, kind, end)

    def window(self, position: int) -> bytes:
        """What was read early of the file from `position` on; nothing, where no guess was right."""
        while self._guessed:
            start = self._guessed[0]
            if position < start:  # the guesses have gone astray
                break
            if position < start + _WINDOW:
                return os.pread(self._descriptor, start + _WINDOW - position, position)
            self._guessed.popleft()
        self._guessed.clear()
        self._next = None
        return b""

    @property
    def least(self) -> int:
        """How many bytes of the chain are read at once, at least."""
        return _SLOW_BYTES if self.is_slow else _QUICK_BYTES

    def _guess(self, name: str, kind: str, end: int) -> None:
        """Have the heads read that are expected after a record."""
        if self._next is None:
            # The moments of `wq` are named `adam_m.wq`: what follows them is known from the weights.
            likely = (name.partition(".")[2], kind, kind.partition(".")[2])
            model = next((other for other in likely if other in self._kinds and self._kinds[other].following), None)
            if model is None:
                return
            own, its = self._kinds[kind], self._kinds[model]
            if own.content % max(its.content, 1):
                return
            self._next = model, end, own.content // max(its.content, 1), own.head - its.head
        model, position, factor, longer = self._next
        while len(self._guessed) < _AT_ONCE and model:
            start = max(0, position - _BEFORE)
            if not self._guessed or position + _BEFORE > self._guessed[-1] + _WINDOW:
                self._ask(start, _WINDOW)
                self._guessed.append(start)
            model = self._kinds[model].following
            if model:
                guessed = self._kinds[model]
                position += guessed.head + longer + guessed.content * factor
        self._next = model, position, factor, longer

    def _timed(self, start: int, length: int) -> tuple[bytes, bool]:
        """Bytes of the file, and whether the disk had to be waited for."""
        started, before = time.perf_counter(), waits()
        data = os.pread(self._descriptor, length, start)
        return data, time.perf_counter() - started > _QUICK_SECONDS and waits() > before

    def _ask(self, start: int, length: int) -> None:
        """Have bytes read that will be needed."""
        if _CAN_ASK:
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)
