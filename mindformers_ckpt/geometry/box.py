"""Boxes: rectangular parts of a tensor's index space.

A shard is a box, re-slicing is the intersection of boxes, and a *block* is a box whose elements follow
each other in the row-major order of the box it was cut from. Everything here is integers: no files, no
strategies, no arrays.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from operator import lt, sub
from typing import Any, NamedTuple


class Box(NamedTuple):
    """The indices from `start` (inclusive) to `stop` (exclusive) of every dimension of a tensor.

    A scalar is the box of no dimensions: `Box((), ())`, with one element.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that holds all of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(sub, self.stop, self.start))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """The part that both boxes hold, or None when that is empty."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        for first, last in zip(start, stop):
            if first >= last:
                return None
        return Box(start, stop)

    def contains(self, other: Box) -> bool:
        """Whether every index of `other` is an index of this box."""
        return all(a <= b for a, b in zip(self.start, other.start)) and all(
            a >= b for a, b in zip(self.stop, other.stop)
        )

    def relative_to(self, outer: Box) -> Box:
        """The same box, counted from the first index of `outer`."""
        return Box(tuple(map(sub, self.start, outer.start)), tuple(map(sub, self.stop, outer.start)))

    def slices(self) -> tuple[Any, ...]:
        """The box as an index for an array of the whole tensor, which gives a view of it.

        It ends in an ellipsis: without one, an array of no dimensions gives a copy of its element.
        """
        return (*(slice(start, stop) for start, stop in zip(self.start, self.stop)), ...)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop)) + "]"


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all of `boxes` (at least one)."""
    start = tuple(map(min, zip(*(box.start for box in boxes))))
    stop = tuple(map(max, zip(*(box.stop for box in boxes))))
    return Box(start, stop)


def are_disjoint(boxes: Sequence[Box], compared: Callable[[int], None] = lambda count: None) -> bool:
    """Whether the boxes are disjoint: no element is in two of them.

    Sweeps along the dimension with the most distinct starts, where few boxes are side by side. `compared` is told with
    how many others a box is compared; it may raise.
    """
    if not boxes or not boxes[0].start:
        return len(boxes) < 2
    axis = max(range(len(boxes[0].start)), key=lambda axis: len({box.start[axis] for box in boxes}))
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.start[axis]):
        compared(len(beside))
        beside = [other for other in beside if other.stop[axis] > box.start[axis]]
        if any(box.intersect(other) is not None for other in beside):
            return False
        beside.append(box)
    return True


def covered_volume(box: Box, disjoint: Sequence[Box]) -> int:
    """How many elements of `box` are in the given boxes, which must be disjoint."""
    parts = (box.intersect(other) for other in disjoint)
    return sum(part.volume for part in parts if part is not None)


def run_length(shape: Sequence[int], outer_shape: Sequence[int]) -> int:
    """Elements of a box of `shape` that follow each other in row-major order in a tensor of `outer_shape`.

    Equal to the volume of the box when the whole box is one run.
    """
    length = 1
    for extent, outer in zip(reversed(shape), reversed(outer_shape)):
        length *= extent
        if extent != outer:
            break
    return length


def offset_in(box: Box, outer: Box) -> int:
    """Position of the first element of `box` in the row-major order of `outer`, in elements."""
    offset = 0
    for start, first, last in zip(box.start, outer.start, outer.stop):
        offset = offset * (last - first) + (start - first)
    return offset


def blocks(box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into blocks of at most `limit` elements, in row-major order.

    A block fixes the first dimensions to one index, takes a range of one dimension and all of the
    dimensions behind it. So it is one run of `box`, and its intersection with any box inside of `box` is one
    run of that: writing a shard's part of a block is one call, and so is reading it, unless the shard is
    wider than `box`.

    Raises ValueError when `limit` is not positive. An empty box has no blocks.
    """
    if limit < 1:
        raise ValueError(f"a block holds at least one element, not {limit}")
    shape = box.shape
    if not math.prod(shape):
        return
    if not shape:
        yield box
        return
    axis, inner = len(shape) - 1, 1
    while axis > 0 and inner * shape[axis] <= limit:
        inner *= shape[axis]
        axis -= 1
    step = max(1, limit // inner)
    for outer in itertools.product(*map(range, box.start[:axis], box.stop[:axis])):
        for first in range(box.start[axis], box.stop[axis], step):
            last = min(first + step, box.stop[axis])
            yield Box(
                (*outer, first, *box.start[axis + 1 :]),
                (*(index + 1 for index in outer), last, *box.stop[axis + 1 :]),
            )


def block_count(box: Box, limit: int) -> int:
    """Number of blocks that `blocks` yields, without making them."""
    shape = box.shape
    if not math.prod(shape):
        return 0
    axis, inner = len(shape) - 1, 1
    while axis > 0 and inner * shape[axis] <= limit:
        inner *= shape[axis]
        axis -= 1
    if axis < 0:
        return 1
    return math.prod(shape[:axis]) * -(-shape[axis] // max(1, limit // inner))


def meets(box: Box, other: Box) -> bool:
    """Whether the boxes share an element; an empty tensor's box counts as met."""
    return box.volume == 0 or box.intersect(other) is not None


class BoxIndex:
    """Boxes to be met by many others: by their starts along the axis on which most of them differ."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._boxes = boxes
        axes = range(len(boxes[0].start)) if all(box.volume for box in boxes) and boxes else ()
        self._axis = max(axes, key=lambda axis: len({box.start[axis] for box in boxes}), default=None)
        if self._axis is not None:
            axis = self._axis
            self._order = sorted(range(len(boxes)), key=lambda number: boxes[number].start[axis])
            self._starts = [boxes[number].start[axis] for number in self._order]
            self._longest = max(box.stop[axis] - box.start[axis] for box in boxes)

    def meeting(self, box: Box, compared: Callable[[int], None] = lambda count: None) -> list[int]:
        """The numbers of the boxes that share an element with `box`, in order (see `meets`).

        `compared` is told with how many boxes it is compared; it may raise.
        """
        if self._axis is None:
            compared(len(self._boxes))
            return [number for number, own in enumerate(self._boxes) if meets(own, box)]
        first = bisect_left(self._starts, box.start[self._axis] - self._longest)
        last = bisect_right(self._starts, box.stop[self._axis])
        compared(last - first)
        if not box.volume:
            return []
        return sorted(number for number in self._order[first:last] if _overlap(self._boxes[number], box))


def _overlap(box: Box, other: Box) -> bool:
    """Whether two boxes, neither of which is empty, share an element."""
    return all(map(lt, box.start, other.stop)) and all(map(lt, other.start, box.stop))
