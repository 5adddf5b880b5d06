"""What both file formats have in common: tensors and the bytes of a file at which they lie."""

from __future__ import annotations

import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from mindformers_ckpt.errors import FormatError, system_errors
from mindformers_ckpt.formats.dtypes import DType
from mindformers_ckpt.objects.path import as_path
from mindformers_ckpt.objects.reading import Handle, close_handle, open_handle

_NO_METADATA: Mapping[str, str] = MappingProxyType({})

# Headers of files that were read last, with the state of the file.
_KEPT = 256
_recent: dict[Path, tuple[tuple[int, int, int], Header]] = {}

_FOREIGN_FILES = (
    (b"PK\x03\x04", "a zip archive, as PyTorch and numpy.savez write"),
    (b"\x80", "a Python pickle"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "an HTML or XML page, perhaps of a failed download"),
)


# More dimensions than any framework has, and what 64 bits hold.
_MOST_DIMENSIONS = 64
_LARGEST = (1 << 63) - 1


class Malformed(Exception):
    """Some bytes break the rules of their format; a scan turns it into a FormatError that names the file."""


class Segment(NamedTuple):
    """A run of bytes of a file."""

    offset: int
    length: int


class TensorSpec(NamedTuple):
    """Name, element type and shape of a tensor. A `str` tensor has the shape (bytes,)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the content."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorRecord(NamedTuple):
    """A tensor in a file: the segments, in order and none empty, joined are its row-major content."""

    spec: TensorSpec
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Header:
    """What a file says about its tensors, in file order.

    `size` is that of the file in bytes. `metadata` is empty for a `.ckpt`. `crc` is the CRC-32 that a `.ckpt`
    stores (not verified), else None. `frames` are the bytes (offset, bytes) of a `.ckpt`
    before each content, and of a `.safetensors` file a digest of its header: with equal ones the tensors are the same.
    `modified` is the time at which the file had been written last (ns), 0 where nobody looked. `is_likely`: all but
    `modified` is that of another file of the same size, with which this one was compared at some of the frames.
    """

    path: Path
    format: str
    size: int
    tensors: dict[str, TensorRecord]
    metadata: dict[str, str]
    crc: int | None
    frames: tuple[tuple[int, bytes], ...] = ()
    modified: int = field(default=0, compare=False)
    is_likely: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class FileLayout:
    """A file to be written: its size, the frames (offset, bytes) around the contents, and the tensors.

    `tensors` is what `read_header` will find, in file order.
    """

    size: int
    frames: tuple[tuple[int, bytes], ...]
    tensors: dict[str, TensorRecord]


def read_header(path: str | Path, *like: Header) -> Header:
    """Read which tensors a `.ckpt`, `.safetensors`, PyTorch or `.distcp` file holds, and where, by the suffix.

    Reads headers only and checks every length against the size of the file. A file that was read shortly
    before and has not changed is not read again, and one whose header equals one of `like`, those of other files, is
    read in a fraction of the time. Raises FormatError when the file is missing, truncated, damaged, encrypted, or
    something else than its suffix says.
    """
    path = as_path(path)
    try:
        status = path.stat()
    except OSError:
        return scan(path)  # which says what is wrong
    state = status.st_ino, status.st_size, status.st_mtime_ns
    known = _recent.get(path)
    if known is not None and known[0] == state:
        return known[1]
    header = replace(scan(path, *like), modified=status.st_mtime_ns)
    for oldest in list(_recent)[: max(0, len(_recent) + 1 - _KEPT)]:  # a list, for there may be other threads
        _recent.pop(oldest, None)
    _recent[path] = state, header
    return header


def scan(path: Path, *like: Header) -> Header:
    """`read_header`, of the file as it is now and keeping nothing.

    Each of `like` is compared as far as it has `frames`: whoever leaves some out of a header looks at samples.
    """
    from mindformers_ckpt.formats import ckpt, safetensors

    if path.suffix == ".ckpt":
        return ckpt.scan(path, *like)
    if path.suffix == ".safetensors":
        return safetensors.scan(path, *like)
    from mindformers_ckpt.formats import distcp, torch_bin

    if path.suffix in torch_bin.SUFFIXES:
        return torch_bin.scan(path)
    if path.suffix == distcp.SUFFIX:
        return distcp.scan(path)
    raise FormatError(f"{path}: a checkpoint file must end in .ckpt or .safetensors")


def layout_file(format: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] = _NO_METADATA) -> FileLayout:
    """Lay out a file of `format` ("ckpt" or "safetensors") that holds `specs`.

    A `.ckpt` has no place for `metadata`; it is left out there. Raises FormatError when the format cannot
    hold a tensor.
    """
    if _is_ckpt(format):
        from mindformers_ckpt.formats import ckpt_layout

        return ckpt_layout.layout(specs)
    from mindformers_ckpt.formats import safetensors

    return safetensors.layout(specs, metadata)


def file_size(format: str, specs: Sequence[TensorSpec]) -> int:
    """The size of a file that `layout_file` lays out without metadata, in less time. Raises the same errors."""
    if _is_ckpt(format):
        from mindformers_ckpt.formats import ckpt_layout

        return ckpt_layout.size(specs)
    from mindformers_ckpt.formats import safetensors

    return safetensors.size(specs)


def _is_ckpt(format: str) -> bool:
    """Whether a file is a `.ckpt`; else it is a `.safetensors` file. Raises FormatError for other formats."""
    if format not in ("ckpt", "safetensors"):
        raise FormatError(f"unknown checkpoint format {format!r}: choose ckpt or safetensors")
    return format == "ckpt"


@contextmanager
def open_to_read(path: Path, scattered: bool = False) -> Iterator[tuple[Handle, int]]:
    """Open a regular file, or an object: what reads it, and its size in bytes.

    `scattered` keeps the system from reading ahead, which would fetch the contents between the headers.
    Raises FormatError when it is missing, no regular file, empty, or cannot be read.
    """
    with system_errors(FormatError, f"{path}: cannot be read"):
        # Without O_NONBLOCK the opening of a pipe waits for a writer, for ever.
        handle = open_handle(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            size = _size_of_regular(handle, path)
            if size == 0:
                raise FormatError(f"{path}: the file is empty; save or copy it again")
            if scattered and sys.platform == "linux" and isinstance(handle, int):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            yield handle, size
        finally:
            close_handle(handle)


def _size_of_regular(handle: Handle, path: Path) -> int:
    if not isinstance(handle, int):
        return handle.size
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path}: a checkpoint file is expected here, this is not a regular file")
    return status.st_size


def check_shape(name: str, shape: Sequence[int], itemsize: int) -> None:
    """Refuse a shape that no tensor has: other readers would multiply it in 64 bits (Malformed).

    A dimension of 0 does not hide that the others overflow.
    """
    if len(shape) > _MOST_DIMENSIONS:
        raise Malformed(f"tensor {name!r} has {len(shape)} dimensions")
    size = itemsize
    for extent in shape:
        size *= extent or 1
        if not 0 <= size <= _LARGEST:
            raise Malformed(f"tensor {name!r}: the shape {tuple(shape)} overflows")


def describe_foreign_file(start: bytes) -> str:
    """Say what a file that begins with `start` is, as far as its first bytes tell."""
    kinds = [kind for magic, kind in _FOREIGN_FILES if start.startswith(magic)]
    return f"it looks like {kinds[0]}" if kinds else f"it begins with {start[:8].hex(' ')}"


def check_names(specs: Sequence[TensorSpec]) -> None:
    """Refuse names that no file can hold: used twice, or no valid Unicode (FormatError)."""
    names = [spec.name for spec in specs]
    if len({*names}) < len(names):
        (name, _), *_ = Counter(names).most_common(1)
        raise FormatError(f"tensor {name!r} is to be written twice into one file")
    for name in names:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise FormatError(f"tensor name {name!r} is not valid Unicode") from error
