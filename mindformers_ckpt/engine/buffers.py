"""Memory that the system copies into and out of at full speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Bytes; of the beginnings of memory that files are read into.
ALIGNMENT = 64


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
