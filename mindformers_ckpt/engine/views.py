"""Parts of shards as places of bytes: runs in a view of a tensor, and turned copies. Pure geometry, and numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import BLOCK_BYTES
from mindformers_ckpt.geometry.box import Box, blocks, offset_in, run_length
from mindformers_ckpt.planning.model import View

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_STRIP = 64
# Shorter runs of a shard are read together with what lies between them, longer ones by themselves.
_RUN_BYTES = 16 << 10


def target_runs(view: View | None, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Where a run of a target place's box is in the file's tensor: runs (start, count), in elements."""
    if view is None:
        yield start, count
        return
    length = run_length(view.box.shape, view.shape)
    outer = Box.whole(view.shape)
    strides = [math.prod(view.box.shape[axis + 1 :]) for axis in range(len(view.shape))]
    while count:
        index = tuple(
            first + start // stride % extent for first, stride, extent in zip(view.box.start, strides, view.box.shape)
        )
        step = min(count, length - start % length)
        yield offset_in(Box(index, tuple(at + 1 for at in index)), outer), step
        start, count = start + step, count - step


def in_view(part: Box, view: View, out: Array) -> tuple[Box, Array]:
    """A part of a place's box as a part of the view, and the array for it with the axes of the view."""
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    return box_in_view(part, view), out.transpose(inverse)


def box_in_view(part: Box, view: View) -> Box:
    """A part of a place's box as a part of the view."""
    start, stop = list(view.box.start), list(view.box.start)
    for axis, first, last in zip(view.order, part.start, part.stop):
        start[axis] += first
        stop[axis] += last
    return Box(tuple(start), tuple(stop))


def copy_transposed(straight: Array, out: Array) -> None:
    """Copy to an array of the same shape whose memory runs along another axis.

    A strip of a few columns at a time stays in the cache while it is turned: three times as fast.
    """
    import numpy as np

    for first in range(0, straight.shape[-1], _STRIP):
        strip = (..., slice(first, first + _STRIP))
        out[strip] = np.ascontiguousarray(straight[strip])


def in_bytes(box: Box, itemsize: int) -> Box:
    """A box of elements as one of their bytes, which are along the last axis."""
    start, stop = box if box.start else ((0,), (1,))
    return Box((*start[:-1], start[-1] * itemsize), (*stop[:-1], stop[-1] * itemsize))


def span_in(part: Box, outer: Box) -> tuple[int, int]:
    """Where a part is in its shard: the first element, and the number of elements up to the last."""
    first = offset_in(part, outer)
    return first, offset_in(Box(tuple(stop - 1 for stop in part.stop), part.stop), outer) - first + 1


def reads_of(part: Box, outer: Box, itemsize: int) -> Iterator[Box]:
    """The boxes of a part that are read at once: its runs in the shard, or more where these are short.

    What lies between short runs is read with them, at most BLOCK_BYTES in all.
    """
    length = run_length(part.shape, outer.shape)
    if length == part.volume or length * itemsize >= _RUN_BYTES:
        yield from blocks(part, length)
    elif span_in(part, outer)[1] * itemsize <= BLOCK_BYTES:
        yield part
    else:
        axis = next(axis for axis, extent in enumerate(part.shape) if extent > 1)
        middle = part.start[axis] + part.shape[axis] // 2
        for first, last in ((part.start[axis], middle), (middle, part.stop[axis])):
            half = Box(
                (*part.start[:axis], first, *part.start[axis + 1 :]), (*part.stop[:axis], last, *part.stop[axis + 1 :])
            )
            yield from reads_of(half, outer, itemsize)
