"""The parts of a block that sources hold, in memory that the next block uses again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import ALIGNMENT, BLOCK_BYTES, empty_bytes
from mindformers_ckpt.engine.reader import Reader
from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place, Transfer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class Scratch:
    """Arrays in buffers that are used again and again: fresh memory would cost a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}

    def arrays(self, purpose: str, dtype: DType, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Arrays of the type's carrier; they are gone when some are asked for once more for the same purpose."""
        if not shapes:
            return []
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        buffer = self._buffers.get(purpose)
        if buffer is None or len(buffer) < starts[-1]:
            buffer = self._buffers[purpose] = empty_bytes(max(starts[-1], BLOCK_BYTES))
        return [
            buffer[start : start + size].view(dtype.carrier).reshape(shape)
            for start, size, shape in zip(starts, sizes, shapes)
        ]


def read_parts(
    reader: Reader, transfer: Transfer, parts: Sequence[tuple[Place, Box]], scratch: Scratch
) -> list[tuple[Box, Array]]:
    """What the sources hold of a block, each part contiguous in memory."""
    name, dtype = transfer.name, transfer.dtype
    held = [(part, reader.held(place, name, dtype, part)) for place, part in parts]
    lacking = [read for read, (_, array) in zip(parts, held) if array is None]
    arrays = scratch.arrays("read", dtype, [part.shape for _, part in lacking])
    for (place, part), array in zip(lacking, arrays):
        reader.read(place, name, dtype, part, array)
    found = iter(arrays)
    return [(part, next(found) if array is None else array) for part, array in held]
