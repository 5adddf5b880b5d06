"""Open files within the limit of the process, and their bytes.

Each reader and each sink keeps files open for itself, since a thread must not close what another one reads from. The
room for all of them follows from the limit of the process (`ulimit -n`), and is shared evenly.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import Segment
from mindformers_ckpt.objects.reading import Handle, close_handle, open_handle, preadv

_MOST_FILES = 4096  # more make nothing faster
_RESERVE = 64  # for what else a process opens meanwhile: journals, locks, pipes of workers, modules
_FOLDERS_OF_DESCRIPTORS = ("/proc/self/fd", "/dev/fd")


class _Room:
    """How many files the readers and sinks of this process may have open between them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._files = 0
        self.share = 1

    def enter(self) -> None:
        """A user comes: all that are there get an even share from now on."""
        with self._lock:
            if self._users == 0:
                self._files = _files_at_once()
            self._users += 1
            self.share = max(1, self._files // self._users)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            self.share = max(1, self._files // max(1, self._users))

    def shrink(self, share: int) -> None:
        """The limit was met with so many files open a user: the process has others that were not foreseen."""
        with self._lock:
            self._files = max(1, min(self._files, share * self._users))
            self.share = max(1, self._files // self._users)


_room = _Room()


def _start_anew() -> None:
    """In a forked process: files of the parent that are open here count among those that others have."""
    global _room
    _room = _Room()


os.register_at_fork(after_in_child=_start_anew)


class _File:
    """A file that is open, or about to be: its threads, and the lock under which the first of them opens it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.descriptor: Handle | None = None


class _Loan:
    """A file that is open for as long as the context lasts; one for every request, so it is made of little."""

    __slots__ = ("_file", "_files", "_path")

    def __init__(self, files: Descriptors, path: Path) -> None:
        self._files, self._path = files, path

    def __enter__(self) -> Handle:
        self._file, descriptor = self._files.borrow(self._path)
        return descriptor

    def __exit__(self, *_: object) -> None:
        self._files.give_back(self._path, self._file)


class Descriptors:
    """Open file descriptors of one reader or sink, the least recently used ones closed beyond its share of the room.

    Several threads may borrow them at once. Raises TransferError when a file cannot be opened.
    """

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._changed = threading.Condition()
        self._has_entered = False

    def get(self, path: Path) -> Handle:
        """The descriptor of a file, until the next one is asked for. For an object that one thread uses."""
        file = self._files.get(path)
        if file is not None and file.descriptor is not None and len(self._files) <= _room.share:
            self._files.move_to_end(path)
            return file.descriptor
        with self.borrowed(path) as descriptor:
            return descriptor

    def borrowed(self, path: Path) -> _Loan:
        """The descriptor of a file, as a context: nobody closes it meanwhile."""
        return _Loan(self, path)

    def borrow(self, path: Path) -> tuple[_File, Handle]:
        """A file with one user more, and its descriptor."""
        file = self._entry(path)
        descriptor = file.descriptor
        if descriptor is None:
            try:
                with file.lock:
                    if file.descriptor is None:
                        file.descriptor = self._opened(path)
                    descriptor = file.descriptor
            except BaseException:
                self.give_back(path, file)
                raise
        return file, descriptor

    def give_back(self, path: Path, file: _File) -> None:
        """A file has one user less."""
        with self._changed:
            file.users -= 1
            if file.descriptor is None and not file.users:
                self._files.pop(path, None)
            self._close_down_to(_room.share)
            self._changed.notify_all()

    def close(self) -> None:
        """Close all files; none is borrowed any more."""
        with self._changed:
            self._close_down_to(0)
            if self._has_entered:
                _room.leave()
                self._has_entered = False

    def _entry(self, path: Path) -> _File:
        """A file with one user more. Waits while all that may be open are in use."""
        with self._changed:
            if not self._has_entered:
                _room.enter()
                self._has_entered = True
            while path not in self._files:
                self._close_down_to(_room.share - 1)
                if len(self._files) < _room.share or not any(file.users for file in self._files.values()):
                    self._files[path] = _File()
                else:
                    self._changed.wait()
            self._files.move_to_end(path)
            self._files[path].users += 1
            return self._files[path]

    def _opened(self, path: Path) -> Handle:
        while True:
            try:
                return open_handle(path, self._flags)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise TransferError(f"{path}: cannot be opened: {error.strerror}") from error
                if not self._make_room():
                    advice = "allow the process more of them (ulimit -n)"
                    raise TransferError(f"{path}: cannot be opened: {error.strerror}; {advice}") from error

    def _make_room(self) -> bool:
        """Close half of the open files, after the limit was met; wait for one where all are in use."""
        with self._changed:
            while True:
                held = [file for file in self._files.values() if file.descriptor is not None]
                if not held:
                    return False
                _room.shrink(len(held))
                if self._close_down_to(len(held) // 2):
                    return True
                self._changed.wait()

    def _close_down_to(self, count: int) -> bool:
        """Close the files that nobody uses, the least recently used ones first, until so many are left; any closed?"""
        if len(self._files) <= count:  # as a rule, and this is asked for every read
            return False
        idle = [path for path, file in self._files.items() if not file.users]
        surplus = idle[: max(0, len(self._files) - count)]
        for path in surplus:
            descriptor = self._files.pop(path).descriptor
            if descriptor is not None:
                close_handle(descriptor)
        return bool(surplus)


def _files_at_once() -> int:
    """The files that this process can open beside those that it has, less what is kept for others."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST_FILES
    free = max(0, limit - _open_files())
    return max(1, min(_MOST_FILES, free - min(_RESERVE, free // 2)))


def _open_files() -> int:
    """How many files the process has open, at least the three standard ones."""
    for folder in _FOLDERS_OF_DESCRIPTORS:
        try:
            return len(os.listdir(folder))
        except OSError:  # no such folder here, or no room to list it
            continue
    return 3


def fill(descriptor: Handle, path: Path, offset: int, view: memoryview) -> None:
    """Fill `view` from a file. Raises TransferError when reading fails or the file ends before."""
    while view:
        try:
            count = preadv(descriptor, view, offset)
        except OSError as error:
            raise TransferError(f"{path}: reading at byte {offset} failed: {error.strerror}") from error
        if count == 0:
            raise TransferError(f"{path} ends at byte {offset}: it was shortened while it was read")
        offset += count
        view = view[count:]


def file_ranges(segments: Sequence[Segment], start: int, length: int) -> list[tuple[int, int]]:
    """The byte ranges (offset, length) of a file that hold `length` bytes from `start` of a tensor's content."""
    if segments and 0 < length <= segments[0].length - start:  # as nearly always
        return [(segments[0].offset + start, length)]
    found = []
    for offset, held in segments:
        if not length:
            break
        if start >= held:
            start -= held
            continue
        count = min(length, held - start)
        found.append((offset + start, count))
        start, length = 0, length - count
    return found
