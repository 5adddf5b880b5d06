"""`.distcp` files, which PyTorch's distributed checkpoint (DCP) saves: one tensor after the other. Read only.

Each is what `torch.save` writes of it, at the bytes that the `.metadata` beside the file says; nothing in the file
itself tells what is where.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

from mindformers_ckpt.errors import FormatError, raise_problems
from mindformers_ckpt.formats.tensor_file import Header, Malformed, Segment, TensorRecord, open_to_read
from mindformers_ckpt.objects.reading import Handle, pread

SUFFIX = ".distcp"


def scan(path: Path) -> Header:
    """Read which boxes of tensors a file holds, and where; see `chunk_name` for what they are called.

    Raises FormatError when there is no metadata beside it, or it does not hold what that says.
    """
    from mindformers_ckpt.formats.dcp_metadata import chunk_name, read_metadata

    metadata = read_metadata(path.parent)
    tensors: dict[str, TensorRecord] = {}
    problems = []
    with open_to_read(path, scattered=True) as (handle, size):
        for tensor, chunk in metadata.by_file.get(path.name, ()):
            name = chunk_name(tensor, chunk.box, metadata.tensors[tensor].shape)
            try:
                if name in tensors:
                    raise Malformed("it is there twice")
                if chunk.offset + chunk.length > size:
                    raise Malformed("it reaches over the end of the file, which is truncated")
                tensors[name] = _record(name, handle, Segment(chunk.offset, chunk.length))
            except Malformed as error:
                problems.append(f"{name}: {error}")
    raise_problems(FormatError, f"{path}: damaged, or not the file that {metadata.path} is of", problems)
    return Header(path, "distcp", size, tensors, {}, None)


def _record(name: str, handle: Handle, item: Segment) -> TensorRecord:
    from mindformers_ckpt.formats.torch_bin import read_tensor

    window = _Window(lambda offset, length: pread(handle, length, item.offset + offset), item.length)
    record = read_tensor(io.BufferedReader(window, 4096), name)
    if any(first + length > item.length for first, length in record.segments):
        raise Malformed("its bytes reach over its end")
    return record._replace(segments=tuple(Segment(item.offset + first, length) for first, length in record.segments))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read, self._size, self._position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("a negative position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._read(self._position, max(0, min(len(buffer), self._size - self._position)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
