"""What a box adds to the checksum of a whole tensor: shares of disjoint boxes, joined by XOR, give that of the tensor.

So every rank computes the share of its shard alone, and the same tensor has the same checksum however it is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.checksums.crc64 import finished, joined, raw, raw_of_rows, raw_of_runs, shifted
from mindformers_ckpt.geometry.box import Box, offset_in, run_length

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def share_of(content: Array, box: Box, shape: Sequence[int]) -> int:
    """The share of a box of a tensor of `shape`: the raw CRC of a tensor that is zero around it.

    `content` is contiguous, with the elements of the box. The box is not empty.
    """
    size = content.itemsize
    run = run_length(box.shape, shape)
    data = content.reshape(-1, run).view("u1")
    axis = _first_axis_of_runs(box.shape, run)
    strides = [math.prod(shape[outer + 1 :]) * size for outer in range(axis)]
    values = raw_of_rows(data, box.shape[axis - 1], strides.pop()) if strides else raw_of_runs(data)
    for outer in reversed(range(len(strides))):
        values = joined(values.reshape(box.shape[: outer + 1]), strides[outer])
    return shifted(int(values.reshape(-1)[0]), _bytes_behind(box, shape, size))


def share_of_run(data: memoryview, start: int, length: int) -> int:
    """The share of a run of bytes from `start` on, of a content of `length` bytes."""
    return shifted(raw(data), length - start - len(data))


def checksum(shares: Iterable[int], nbytes: int) -> int:
    """The CRC-64/NVME of a whole content of `nbytes`, from the shares of disjoint parts that make it up."""
    return finished(reduce(xor, shares, 0), nbytes)


def _first_axis_of_runs(box_shape: Sequence[int], run: int) -> int:
    """The axis from which on a run takes all of the box."""
    return next(axis for axis in range(len(box_shape) + 1) if math.prod(box_shape[axis:]) == run)


def _bytes_behind(box: Box, shape: Sequence[int], size: int) -> int:
    last = Box(tuple(stop - 1 for stop in box.stop), box.stop)
    return (math.prod(shape) - 1 - offset_in(last, Box.whole(shape))) * size
