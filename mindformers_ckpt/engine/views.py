"""Parts of shards as places of bytes: runs in a view of a tensor, and turned copies. Pure geometry, and numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.geometry.box import Box, blocks, offset_in, run_length
from mindformers_ckpt.planning.model import View

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_STRIP = 64


def target_runs(view: View | None, start: int, count: int) -> Iterator[tuple[int, int]]:
    """Where a run of a target place's box lies in the file's tensor: runs (start, count), in elements."""
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
    start, stop = list(view.box.start), list(view.box.start)
    for axis, first, last in zip(view.order, part.start, part.stop):
        start[axis] += first
        stop[axis] += last
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    return Box(tuple(start), tuple(stop)), out.transpose(inverse)


def copy_transposed(straight: Array, out: Array) -> None:
    """Copy to an array of the same shape whose memory runs along another axis.

    A strip of a few columns at a time stays in the cache while it is turned: three times as fast.
    """
    import numpy as np

    for first in range(0, straight.shape[-1], _STRIP):
        strip = (..., slice(first, first + _STRIP))
        out[strip] = np.ascontiguousarray(straight[strip])


def last_element(box: Box) -> Box:
    """The box of the last element."""
    return Box(tuple(stop - 1 for stop in box.stop), box.stop)


def runs_of(part: Box, outer: Box) -> Iterator[tuple[Box, tuple[Any, ...]]]:
    """The runs of a part in its shard, each with its index in an array of the part."""
    for run in blocks(part, run_length(part.shape, outer.shape)):
        yield run, run.relative_to(part).slices()
