"""Memory that the system copies into and out of at full speed, and how much of it is used at once."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Bytes; of the beginnings of memory that files are read into.
ALIGNMENT = 64
# Large enough to make the parts of eight targets long runs, small enough to stay in the processor's cache.
BLOCK_BYTES = 8 << 20
# What is read at once where a run is passed on as it is: it stays in the cache of one core until it is written. And
# what is written at once, to multiples of it where the data allow: the system takes one piece of memory for that.
PIECE_BYTES = 512 << 10
TRANSPOSE_BYTES = 32 << 20


def piece_memory(size: int = PIECE_BYTES) -> memoryview:
    """Memory for a piece, which begins at a page. It takes no numpy, whose import can wait then."""
    return memoryview(mmap.mmap(-1, size))


def empty_bytes(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes without a value, the first one at a multiple of 64.

    On AMD processors `read` and `write` take three times as long where the destination lies 1 to 31 bytes behind
    the source, counted modulo 4096 (docs/performance.md). Large blocks of malloc begin 16 bytes behind a page, so
    every read from the beginning of a page would be such a one.
    """
    import numpy as np

    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size]
