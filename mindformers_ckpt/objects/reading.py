"""Files that are open for reading by place, on a disk or in an object storage: one set of functions for both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Union

from mindformers_ckpt.objects.file import ObjectFile
from mindformers_ckpt.objects.path import ObjectPath

Handle = Union[int, ObjectFile]  # a file descriptor, or an object


def open_handle(path: Path, flags: int = os.O_RDONLY) -> Handle:
    """Open a file; `flags` are those of a disk. Raises OSError."""
    if isinstance(path, ObjectPath):
        return ObjectFile.at(path.place)
    return os.open(path, flags | os.O_CLOEXEC)


def close_handle(handle: Handle) -> None:
    if isinstance(handle, int):
        os.close(handle)


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[Handle]:
    """A file, open for a while. Raises OSError."""
    handle = open_handle(path, flags)
    try:
        yield handle
    finally:
        close_handle(handle)


def pread(handle: Handle, length: int, start: int) -> bytes:
    """Bytes of a file, fewer at its end. Raises OSError."""
    return os.pread(handle, length, start) if isinstance(handle, int) else handle.pread(length, start)


def preadv(handle: Handle, memory: memoryview, start: int) -> int:
    """Fill memory, or a part of it, from a file; the number of bytes. Raises OSError."""
    return os.preadv(handle, [memory], start) if isinstance(handle, int) else handle.preadv(memory, start)


def stream_of(handle: Handle) -> BinaryIO:
    """An open file as a stream of its own, to be closed."""
    if isinstance(handle, int):
        return os.fdopen(os.dup(handle), "rb")
    return handle.stream()
