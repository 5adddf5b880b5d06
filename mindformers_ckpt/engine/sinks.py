"""Where contents go: target files that are written at their places, or arrays in memory."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mindformers_ckpt.disk.waiting import each, is_memory
from mindformers_ckpt.engine import page_cache
from mindformers_ckpt.engine.buffers import PIECE_BYTES, Given, memory_of, nothing_given
from mindformers_ckpt.engine.descriptors import Descriptors, file_ranges
from mindformers_ckpt.errors import TransferError, system_errors
from mindformers_ckpt.formats import FileLayout, TensorSpec, layout_file
from mindformers_ckpt.planning.model import TargetFile

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


# Of files, and of frames in each, where every call is a round trip. A .ckpt file has a frame for each tensor.
_AT_ONCE = 8
_FRAMES_TOGETHER = 16


class Sink(Protocol):
    """Where the contents of target tensors go, in pieces of consecutive bytes."""

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        """Put bytes at `start` of the content of a tensor of a target file (an index into the plan's list)."""

    def offset(self, file: int, name: str, start: int) -> int:
        """Where in the file, or in memory, byte `start` of a tensor lies."""

    def proof(self) -> str:
        """A digest of all that was written since it was asked for last, "" where none is taken."""

    def end_task(self) -> None:
        """All of a task was written."""

    def close(self) -> None:
        """Close what was opened."""


class Layouts:
    """Where everything goes in target files; files with the same tensors share it."""

    def __init__(self, files: Sequence[TargetFile]) -> None:
        self._files = files
        self._known: dict[tuple[str, int], FileLayout] = {}
        self._of_files: dict[int, FileLayout] = {}

    def of(self, file: int) -> FileLayout:
        found = self._of_files.get(file)
        if found is None:
            target = self._files[file]
            key = (target.format, id(target.tensors))
            if key not in self._known:
                self._known[key] = _layout_of(target.format, target.tensors, target.metadata)
            found = self._of_files[file] = self._known[key]
        return found


class FileSink:
    """Writes target files under a folder. `prepare` makes them; then any process may fill in contents.

    Raises TransferError when the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, files: Sequence[TargetFile], *, drops: bool = False) -> None:
        """`drops`: what is written is not to stay in the page cache."""
        self._drops = drops
        self._written: set[Path] = set()
        self._paths = [folder / file.path for file in files]
        self._files = files
        self.layout = Layouts(files).of
        self._descriptors = Descriptors(os.O_WRONLY)

    def path(self, file: int) -> Path:
        return self._paths[file]

    def prepare_files(self, files: Sequence[int], *, repair: bool = False) -> None:
        """Prepare target files, or repair them: several at once where the disk lets a writer wait."""
        for _ in each(self.repair if repair else self.prepare, files, at_once=_AT_ONCE):
            pass

    def repair(self, file: int) -> None:
        """Give a target file of an interrupted run its size, and all in it but the contents of the tensors, again."""
        path, layout = self.path(file), self.layout(file)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as stream:
                is_whole = os.fstat(stream.fileno()).st_size >= layout.size
                if is_whole:
                    os.ftruncate(stream.fileno(), layout.size)  # a checksum may have been appended
                    _write_frames(stream.fileno(), layout)
        except OSError:
            is_whole = False
        if not is_whole:
            path.unlink(missing_ok=True)
            self.prepare(file)

    def prepare(self, file: int, *, sparse: bool = False) -> None:
        """Create a target file in its final size, with everything in it but the contents of the tensors.

        Room for these is reserved on the disk where it can, unless the file is to be `sparse`.
        """
        path, layout = self.path(file), self.layout(file)
        with system_errors(TransferError, f"{path}: cannot be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                (os.ftruncate if sparse else _reserve)(stream.fileno(), layout.size)
                _write_frames(stream.fileno(), layout)

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        path = self.path(file)
        descriptor = self._descriptor(path)
        if self._drops:
            self._written.add(path)
        for offset, length in file_ranges(self.layout(file).tensors[name].segments, start, len(data)):
            piece, data = data[:length], data[length:]
            while piece:
                try:
                    count = os.pwrite(descriptor, piece[: PIECE_BYTES - offset % PIECE_BYTES], offset)
                except OSError as error:
                    raise TransferError(f"{path}: writing failed: {error.strerror}") from error
                offset += count
                piece = piece[count:]

    def _descriptor(self, path: Path) -> int:
        descriptor = self._descriptors.get(path)
        assert isinstance(descriptor, int)  # results in an object storage have a sink of their own
        return descriptor

    def offset(self, file: int, name: str, start: int) -> int:
        return file_ranges(self.layout(file).tensors[name].segments, start, 1)[0][0]

    def proof(self) -> str:
        return ""

    def end_task(self) -> None:
        for path in self._written:
            with system_errors(TransferError, f"{path}: writing failed"):
                page_cache.write_back(self._descriptor(path))
        self._written.clear()

    def close(self) -> None:
        self._descriptors.close()


def _write_frames(descriptor: int, layout: FileLayout) -> None:
    """Write what is around the contents."""
    frames = layout.frames

    def write(first: int) -> None:
        for offset, data in frames[first : first + _FRAMES_TOGETHER]:
            os.pwrite(descriptor, data, offset)

    for _ in each(write, range(0, len(frames), _FRAMES_TOGETHER), at_once=_AT_ONCE):
        pass


@lru_cache(maxsize=16)
def _layout_of(format: str, tensors: tuple[TensorSpec, ...], metadata: tuple[tuple[str, str], ...]) -> FileLayout:
    """The layout of a file; the last ones are kept for the other sinks of a run."""
    return layout_file(format, tensors, dict(metadata))


class ArraySink:
    """Collects the tensors of one target file in memory, as writable byte arrays by name."""

    def __init__(self, target: TargetFile, given: Given = nothing_given) -> None:
        self.contents: dict[str, Array] = dict(memory_of(target.tensors, given))

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        self.contents[name].data[start : start + len(data)] = data

    def offset(self, file: int, name: str, start: int) -> int:
        return start

    def proof(self) -> str:
        return ""

    def end_task(self) -> None:
        """It stays in memory."""

    def close(self) -> None:
        """Nothing was opened; the contents stay."""


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its place on the disk where the file system can.

    A disk that is too full is then found before anything is copied, and writing into reserved blocks takes a
    quarter less time on ext4. Not `posix_fallocate`: where the file system cannot reserve, it writes to every block.
    Where files are memory it would be filled with zeros first, which takes as long as the copying: there must be
    enough of it.
    """
    code = _lacks_memory(descriptor, size)
    if code is None:
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "fallocate64"):
            done = libc.fallocate64(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0
            code = 0 if done else ctypes.get_errno()
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def _lacks_memory(descriptor: int, size: int) -> int | None:
    """Of a file on a tmpfs, as those of /dev/shm are: ENOSPC where that has no room for `size` bytes, else 0.

    None on other file systems.
    """
    if not is_memory(descriptor):
        return None
    about = os.fstatvfs(descriptor)
    return errno.ENOSPC if about.f_blocks and about.f_bavail * about.f_frsize < size else 0
