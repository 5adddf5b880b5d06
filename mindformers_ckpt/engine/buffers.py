"""Memory that the system copies into and out of at full speed, and how much of it is used at once."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.formats import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[np.uint8]]

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


def empty_bytes(size: int) -> Array:
    """Bytes without a value, the first one at a multiple of 64.

    On AMD processors `read` and `write` take three times as long where the destination lies 1 to 31 bytes behind
    the source, counted modulo 4096 (docs/performance.md). Large blocks of malloc begin 16 bytes behind a page, so
    every read from the beginning of a page would be such a one.
    """
    import numpy as np

    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    return memory[start : start + size]


# Asked for memory of tensors, by name: bytes that their contents are read into, where there are some.
Given = Callable[[Sequence[TensorSpec]], Mapping[str, "Array"]]


def nothing_given(specs: Sequence[TensorSpec]) -> Mapping[str, Array]:
    """All memory is new."""
    return {}


def memory_of(specs: Sequence[TensorSpec], given: Given) -> Iterator[tuple[str, Array]]:
    """Where the contents of tensors are read to, by name: what is given, or new memory."""
    known = given(specs)
    for spec in specs:
        yield spec.name, known[spec.name] if spec.name in known else empty_bytes(spec.nbytes)
