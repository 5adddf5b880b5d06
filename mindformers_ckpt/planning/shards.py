"""A place in a tensor that files hold in boxes: as places in those boxes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mindformers_ckpt.geometry.axes import axes_by_dimension, runs
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place, View


def in_shard(place: Place, shape: Sequence[int], shard: Box) -> Iterator[Place]:
    """The part of a place that a box of its tensor (of `shape`) holds, as places in a tensor that is just that box.

    A place without a view is that of the whole tensor. The axes of a view need not divide where the box begins and
    ends: then the part is several places.
    Raises ValueError where the axes of the view are no parts of the tensor's dimensions.
    """
    view = place.view
    if view is None:
        yield place._replace(box=shard)
        return
    grouped = axes_by_dimension(shape, view.shape)
    if grouped is None:
        raise ValueError(f"a view {list(view.shape)} of {list(shape)} that is cut into {list(shard.shape)}")
    at, parts = 0, []
    for extents, first, last in zip(grouped, shard.start, shard.stop):
        wanted = Box(view.box.start[at : at + len(extents)], view.box.stop[at : at + len(extents)])
        parts.append(list(parts_of(extents, first, last, wanted)))
        at += len(extents)
    for choice in itertools.product(*parts):
        taken = Box(_flat(part.taken.start for part in choice), _flat(part.taken.stop for part in choice))
        inner = Box(_flat(part.inner.start for part in choice), _flat(part.inner.stop for part in choice))
        moved = taken.relative_to(view.box)
        box = Box(
            tuple(place.box.start[number] + moved.start[axis] for number, axis in enumerate(view.order)),
            tuple(place.box.start[number] + moved.stop[axis] for number, axis in enumerate(view.order)),
        )
        yield place._replace(box=box, view=View(_flat(part.extents for part in choice), inner, view.order))


def in_whole(box: Box, view: Sequence[int], shard: Box, shape: Sequence[int]) -> tuple[Box, tuple[int, ...]] | None:
    """A box of a view of a shard, as a box of a view of the whole tensor (of `shape`), with the shape of that view.

    Both boxes have the same elements in the same order. None where the axes of the view are no parts of the shard's
    dimensions, or the shard begins or ends within one of them.
    """
    grouped = axes_by_dimension(shard.shape, view)
    if grouped is None:
        return None
    extents: list[int] = []
    start: list[int] = []
    stop: list[int] = []
    at = 0
    for own, first, extent in zip(grouped, shard.start, shape):
        inner = (box.start[at : at + len(own)], box.stop[at : at + len(own)])
        at += len(own)
        axis = next((number for number, size in enumerate(own) if size > 1), len(own) - 1)
        if axis < 0:  # a single index, for which the view has no axis
            own, inner, axis = (1,), ((0,), (1,)), 0
        step = math.prod(own[axis + 1 :])
        if extent % step or first % step:
            return None
        for number, (size, begin, end) in enumerate(zip(own, *inner)):
            shift = first // step if number == axis else 0
            extents.append(extent // step if number == axis else size)
            start.append(begin + shift)
            stop.append(end + shift)
    return Box(tuple(start), tuple(stop)), tuple(extents)


def _flat(values: Iterator[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(itertools.chain.from_iterable(values))


class Part(NamedTuple):
    """A box of the axes of one dimension, and the same in the axes of what a shard has of that dimension."""

    taken: Box
    extents: tuple[int, ...]
    inner: Box


def parts_of(
    extents: tuple[int, ...], first: int, last: int, wanted: Box, *, offset: int = 0, length: int | None = None
) -> Iterator[Part]:
    """What the indices first:last of a dimension have of a box of its axes, of these `extents`.

    A shard has them from its `offset` on; its `length` is their number, unless it has others beside them.
    """
    length = last - first if length is None else length
    if not extents:
        yield Part(Box((), ()), (), Box((), ()))
        return
    for run in runs(first, last, extents):
        axis = len(extents) - 1
        while axis > 0 and (run.start[axis], run.stop[axis]) == (0, extents[axis]):
            axis -= 1
        yield from _aligned(extents, axis, Box(run.start, run.stop), offset + run.first - first, length, wanted)


def _aligned(extents: tuple[int, ...], axis: int, run: Box, offset: int, length: int, wanted: Box) -> Iterator[Part]:
    """The part of `wanted` in a run that begins at `offset` of a shard's `length`; its axes behind `axis` are whole.

    Where the shard is not made up of those, index by index of `axis`.
    """
    inner = math.prod(extents[axis + 1 :])
    if offset % inner or length % inner:
        low, high = max(run.start[axis], wanted.start[axis]), min(run.stop[axis], wanted.stop[axis])
        for index in range(low, high):
            head = (*run.start[:axis], index), (*run.stop[:axis], index + 1)
            one = Box((*head[0], *run.start[axis + 1 :]), (*head[1], *run.stop[axis + 1 :]))
            yield from _aligned(extents, axis + 1, one, offset + (index - run.start[axis]) * inner, length, wanted)
        return
    taken = run.intersect(wanted)
    if taken is not None:
        shift = offset // inner - run.start[axis]
        start = (*(0 for _ in range(axis)), taken.start[axis] + shift, *taken.start[axis + 1 :])
        stop = (*(1 for _ in range(axis)), taken.stop[axis] + shift, *taken.stop[axis + 1 :])
        yield Part(taken, (*(1 for _ in range(axis)), length // inner, *extents[axis + 1 :]), Box(start, stop))
