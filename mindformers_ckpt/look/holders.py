"""Who holds what of a tensor, replicas included, and where in the files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mindformers_ckpt.engine.buffers import empty_bytes
from mindformers_ckpt.engine.descriptors import Descriptors, file_ranges, fill
from mindformers_ckpt.formats import Segment
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.build import held_boxes
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.shards import LogicalTensor

if TYPE_CHECKING:
    import numpy as np

    Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Holder(NamedTuple):
    """A file that has a box of a tensor: the box, row-major, is in the segments."""

    rank: int
    path: Path
    box: Box
    segments: tuple[Segment, ...]

    def offset(self, start: int) -> int:
        """Where in the file byte `start` of the box is."""
        return file_ranges(self.segments, start, 1)[0][0]


def holders_of(checkpoint: Checkpoint, name: str, tensor: LogicalTensor) -> list[Holder]:
    """All ranks that hold a tensor, in order."""
    found = []
    for rank, box in sorted(held_boxes(checkpoint, name, tensor).items()):
        path, record = checkpoint.records_of(rank)[name]
        found.append(Holder(rank, path, box, record.segments))
    return found


class ContentReader:
    """Reads runs of bytes of what files hold, for one thread at a time. Raises TransferError."""

    def __init__(self) -> None:
        self._descriptors = Descriptors(os.O_RDONLY)
        self._buffer = empty_bytes(0)

    def read(self, path: Path, segments: Sequence[Segment], start: int, length: int) -> Bytes:
        """`length` bytes from `start` of a content, in memory that the next call uses again."""
        if len(self._buffer) < length:
            self._buffer = empty_bytes(length)
        found = self._buffer[:length]
        view = found.data
        for offset, count in file_ranges(segments, start, length):
            fill(self._descriptors.get(path), path, offset, view[:count])
            view = view[count:]
        return found

    def close(self) -> None:
        """Close the files that were opened."""
        self._descriptors.close()


def first_difference(left: Bytes, right: Bytes) -> int | None:
    """The first place at which two contiguous runs of bytes of one length differ, None when they are equal."""
    import numpy as np

    if not len(left) or _memcmp()(_address(left), _address(right), len(left)) == 0:
        return None
    return int(np.argmax(left != right))


@lru_cache(maxsize=1)
def _memcmp() -> Callable[[int, int, int], int]:
    """That of the C library: numpy takes twice as long, and writes down for each element what it finds."""
    function = ctypes.CDLL(None).memcmp
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return cast("Callable[[int, int, int], int]", function)


def _address(data: Bytes) -> int:
    if not data.flags.writeable:
        return int(data.__array_interface__["data"][0])
    return ctypes.addressof(ctypes.c_char.from_buffer(data.data))  # in a fraction of the time
