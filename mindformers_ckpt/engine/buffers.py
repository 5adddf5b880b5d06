"""Memory that the system copies into and out of at full speed, and how much of it is used at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
_SHARED_BYTES = 64 << 20


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


def empty_arrays(sizes: Sequence[int]) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Bytes without a value, an array for each size; small ones that follow each other are parts of larger memory.

    The first touch of a page takes longer than copying it. Memory of many megabytes gets huge pages, which cost a
    fraction of that; it is free again when none of the arrays in it is used.
    """
    arrays: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for group in _groups([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]):
        memory = empty_bytes(sum(group))
        for size, room in zip(sizes[len(arrays) : len(arrays) + len(group)], group):
            arrays.append(memory[:size])
            memory = memory[room:]
    return arrays


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """The sizes in their order, as many at a time as one memory has room for, at least one."""
    group: list[int] = []
    held = 0
    for size in sizes:
        if group and held + size > _SHARED_BYTES:
            yield group
            group, held = [], 0
        group.append(size)
        held += size
    if group:
        yield group
