"""A dimension that is made up of several axes, in row-major order: its indices as boxes of those."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """A box of the axes of one dimension, and the indices of the dimension that it takes.

    It has one index of each of the first axes, a range of the next one, and all of those behind.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]
    first: int
    last: int


def runs(first: int, last: int, extents: tuple[int, ...], base: int = 0) -> Iterator[Run]:
    """Cut the indices first:last of a dimension into boxes of the axes that make it up, in order.

    `base` is added to the indices that are reported.
    """
    inner = math.prod(extents[1:])
    if len(extents) == 1:
        yield Run((first,), (last,), base + first, base + last)
        return

    def within(index: int, low: int, high: int) -> Iterator[Run]:
        for run in runs(low, high, extents[1:], base + index * inner):
            yield run._replace(start=(index, *run.start), stop=(index + 1, *run.stop))

    (head, low), (tail, high) = divmod(first, inner), divmod(last, inner)
    if head == tail:
        yield from within(head, low, high)
        return
    if low:
        yield from within(head, low, inner)
        head += 1
    if head < tail:
        rest = extents[1:]
        yield Run((head, *(0 for _ in rest)), (tail, *rest), base + head * inner, base + tail * inner)
    if high:
        yield from within(tail, 0, high)


def strides_of(shape: Sequence[int]) -> list[int]:
    """How far apart neighbours along each axis are in row-major order; the first is that of the whole."""
    return [math.prod(shape[axis:]) for axis in range(len(shape) + 1)]


def common_strides(strides: Iterable[int]) -> list[int]:
    """The strides of a view whose axes make up those of all. Raises ValueError where there is none."""
    found = sorted(set(strides), reverse=True)
    for outer, inner in zip(found, found[1:]):
        if outer % inner:
            raise ValueError(f"its elements are taken in steps of {outer} on one side and {inner} on the other")
    return found


def extents_between(strides: Sequence[int], outer: int, inner: int) -> tuple[int, ...]:
    """The extents of the axes between two strides."""
    within = [stride for stride in strides if inner <= stride <= outer]
    return tuple(first // second for first, second in zip(within, within[1:]))


def axes_by_dimension(shape: Sequence[int], axes: Sequence[int]) -> list[tuple[int, ...]] | None:
    """The extents of those axes that make up each dimension of a shape; None when they do not.

    Axes of one index belong to the dimension of the next other axis.
    """
    found: list[tuple[int, ...]] = []
    at = 0
    for extent in shape:
        first = at
        while math.prod(axes[first:at]) != extent:
            if at == len(axes) or math.prod(axes[first:at]) > extent:
                return None
            at += 1
        found.append(tuple(axes[first:at]))
    rest = tuple(axes[at:])
    if any(extent != 1 for extent in rest):
        return None
    if rest and found:
        found[-1] += rest
    return found
