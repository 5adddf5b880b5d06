"""Two conversions in one: tensors made of tensors in the middle, which are made of others, as made of those.

A target tensor is boxes in views of tensors in the middle, and each of these is boxes in views of source tensors. Both
views of a tensor in the middle are row-major reshapes of it: cut into axes that both are made up of, their boxes can be
intersected, and what is left are boxes in views of source tensors again. Nothing is computed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from mindformers_ckpt.convert.planning import Converted
from mindformers_ckpt.geometry.axes import common_strides, extents_between, strides_of
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place, View
from mindformers_ckpt.planning.shards import parts_of

Shape = tuple[int, ...]


class _Axis(NamedTuple):
    """An axis of a view, and the range that a box takes of it.

    `along` is the axis of the target that runs along it; None for a single index, which need have none.
    """

    extent: int
    start: int
    stop: int
    along: int | None


class _Piece(NamedTuple):
    """A box of the target, and where it is: the axes of a view of a tensor, from the outermost on."""

    box: Box
    axes: tuple[_Axis, ...]


def compose(outer: Converted, middle: Mapping[str, Converted], shapes: Mapping[str, Shape]) -> Converted:
    """A tensor that is made of those in the `middle`, as made of what these are made of.

    Nothing is computed for those in the middle. `shapes` are those of the source tensors. Raises ValueError where two
    views of a tensor have no common axes, and where one has no elements.
    """
    views = [_Viewed(place, outer.transfer.shape, middle[place.tensor]) for place in outer.transfer.sources]
    fine = [_fine_axes(axis, extent, views) for axis, extent in enumerate(outer.transfer.shape)]
    found: list[tuple[Place, _Piece]] = []
    for viewed in views:
        for part in viewed.cut(fine):
            for source in viewed.made_of.transfer.sources:
                place = source._replace(compute=viewed.place.compute)
                found += [(place, piece) for piece in _through(part, source, viewed.made_of.transfer.shape)]
    return _put_together(outer, fine, found, shapes)


# -------------------------------------------------------------------------------------- axes that views share


@lru_cache(maxsize=1 << 12)
def _steps(shape: Shape, other: Shape) -> list[Shape]:
    """The extents of the axes into which each axis of a view falls by another view of the same tensor."""
    own = strides_of(shape)
    strides = common_strides([*own, *strides_of(other)])
    return [extents_between(strides, outer, inner) for outer, inner in zip(own, own[1:])]


class _Viewed:
    """A place of the outer conversion, with the axes into which its view falls by how the tensor there is made."""

    def __init__(self, place: Place, shape: Shape, made_of: Converted) -> None:
        if not made_of.spec.size:
            raise ValueError(f"{made_of.spec.name} has no elements")
        self.place, self.made_of = place, made_of
        self.view = place.view or View(shape, place.box, tuple(range(len(shape))))
        self._steps = _steps(self.view.shape, made_of.transfer.shape)

    def steps(self, axis: int) -> Shape:
        """The extents of the axes into which an axis of the target must be cut here; none for a single index."""
        return self._steps[self.view.order[axis]]

    def is_whole(self, axis: int, extent: int) -> bool:
        """Whether the place has all of an axis of the target, and its tensor has no more of it."""
        taken = (self.place.box.start[axis], self.place.box.stop[axis])
        return taken == (0, extent) and self.view.shape[self.view.order[axis]] == extent

    def cut(self, fine: Sequence[Shape]) -> Iterator[_Piece]:
        """The place in pieces whose axes are common ones."""
        choices, at = [], 0
        for axis, extents in enumerate(fine):
            choices.append(list(self._pieces(axis, extents, at)))
            at += len(extents)
        for choice in itertools.product(*choices):
            axes = [choice[self.view.order.index(own)].axes for own in range(len(self.view.shape))]
            yield _Piece(_joined(piece.box for piece in choice), tuple(itertools.chain.from_iterable(axes)))

    def _pieces(self, axis: int, extents: Shape, at: int) -> Iterator[_Piece]:
        """The pieces along an axis of the target, whose fine axes have these extents and are numbered from `at` on."""
        steps = self.steps(axis)
        if len(extents) > 1:
            axes = tuple(_Axis(extent, 0, extent, at + number) for number, extent in enumerate(extents))
            yield _Piece(Box.whole(extents), axes)
            return
        first, last = self.place.box.start[axis], self.place.box.stop[axis]
        if not steps:
            yield _Piece(Box((first,), (last,)), ())
            return
        own = self.view.order[axis]
        begin, end, size = self.view.box.start[own], self.view.box.stop[own], steps[-1]
        for number in range(begin // size, -(-end // size)):
            start, stop = max(begin, number * size), min(end, (number + 1) * size)
            box = Box((first + start - begin,), (first + stop - begin,))
            outer = (_Axis(extent, index, index + 1, None) for extent, index in zip(steps, _digits(number, steps[:-1])))
            yield _Piece(box, (*outer, _Axis(size, start - number * size, stop - number * size, at)))


def _digits(number: int, extents: Shape) -> list[int]:
    """The indices of an element, by its number in row-major order."""
    return [number // inner % extent for extent, inner in zip(extents, strides_of(extents)[1:])]


def _fine_axes(axis: int, extent: int, views: Sequence[_Viewed]) -> Shape:
    """The extents into which an axis of the target is cut: itself, where places have parts of it."""
    if extent > 1 and all(viewed.is_whole(axis, extent) for viewed in views):
        try:
            strides = common_strides(stride for viewed in views for stride in strides_of(viewed.steps(axis)))
        except ValueError:
            return (extent,)  # each place is cut for itself
        return extents_between(strides, extent, 1)
    return (extent,)


# ------------------------------------------------------------------------------------ through the one in the middle


def _through(part: _Piece, source: Place, shape: Shape) -> Iterator[_Piece]:
    """What a source place of a tensor, by its view of this `shape`, holds of a part of that tensor."""
    view = source.view or View(source.box.shape, Box.whole(source.box.shape), tuple(range(len(shape))))
    choices, at = [], 0
    for axis, extent in enumerate(shape):
        first, own = at, view.order[axis]
        while math.prod(fine.extent for fine in part.axes[first:at]) != extent:
            at += 1
        taken = source.box.start[axis], source.box.stop[axis]
        choices.append(list(_within(part.axes[first:at], *taken, view.box.start[own], view.shape[own])))
    for choice in itertools.product(*choices):
        start, stop = list(part.box.start), list(part.box.stop)
        for along, begin, end in itertools.chain.from_iterable(moves for moves, _ in choice):
            start[along], stop[along] = part.box.start[along] + begin, part.box.start[along] + end
        axes = itertools.chain.from_iterable(choice[view.order.index(own)][1] for own in range(len(view.shape)))
        yield _Piece(Box(tuple(start), tuple(stop)), tuple(fine for fine in axes if fine.extent > 1))


def _within(
    axes: Sequence[_Axis], first: int, last: int, offset: int, length: int
) -> Iterator[tuple[list[tuple[int, int, int]], list[_Axis]]]:
    """The part of some axes that the indices first:last of theirs have, which begin at `offset` of a `length`.

    The first list says which part of the target's box is left: axis, start, stop.
    """
    if not axes:
        yield [], [_Axis(length, offset, offset + 1, None)]
        return
    wanted = Box(tuple(axis.start for axis in axes), tuple(axis.stop for axis in axes))
    for part in parts_of(tuple(axis.extent for axis in axes), first, last, wanted, offset=offset, length=length):
        left = part.taken.relative_to(wanted)
        yield (
            [
                (axis.along, begin, end)
                for axis, begin, end in zip(axes, left.start, left.stop)
                if axis.along is not None
            ],
            [
                _Axis(extent, begin, end, axis.along)
                for axis, extent, begin, end in zip(axes, part.extents, part.inner.start, part.inner.stop)
            ],
        )


# ------------------------------------------------------------------------------------------ the composed tensor


def _put_together(
    outer: Converted, fine: Sequence[Shape], found: Sequence[tuple[Place, _Piece]], shapes: Mapping[str, Shape]
) -> Converted:
    """The target tensor out of its pieces."""
    shape = tuple(itertools.chain.from_iterable(fine))
    matched = [_joined_axes(_matched(piece, shape), shapes[place.tensor]) for place, piece in found]
    # Single indices of a source that no axis of the target stands for: axes of one index take their place.
    extra = max((sum(axis.along is None for axis in piece.axes) for piece in matched), default=0)
    places: list[Place] = []
    for (place, _), piece in zip(found, matched):
        places.append(_as_place(place, piece, len(shape), extra))
        while len(places) > 1 and (both := _merged(places[-2], places[-1])) is not None:
            places[-2:] = [both]
    spec, transfer = outer.spec, outer.transfer
    if len(places) == 1 and spec.shape == shapes[places[0].tensor] and _is_straight(places[0]):
        whole = places[0]._replace(box=Box.whole(spec.shape), view=None)
        return Converted(spec, transfer._replace(shape=spec.shape, sources=(whole,)), (1,) * len(spec.shape))
    groups, at = [], 0
    for count in outer.groups:
        groups.append(sum(map(len, fine[at : at + count])))
        at += count
    if groups:
        groups[0] += extra
    return Converted(spec, transfer._replace(shape=(1,) * extra + shape, sources=tuple(places)), tuple(groups))


def _matched(piece: _Piece, shape: Shape) -> _Piece:
    """The piece with single indices of its view along single indices of the target, where both are the same."""
    taken = {axis.along for axis in piece.axes}
    free = [axis for axis, extent in enumerate(piece.box.shape) if extent == 1 and axis not in taken]
    axes = []
    for axis in piece.axes:
        if axis.along is None:
            same = (at for at in free if (shape[at], piece.box.start[at]) == (axis.extent, axis.start))
            along = next(same, None)
            if along is not None:
                free.remove(along)
                axis = axis._replace(along=along)
        axes.append(axis)
    return piece._replace(axes=tuple(axes))


def _joined_axes(piece: _Piece, shape: Shape) -> _Piece:
    """The piece with a single index of one axis and all of the next as a range of both in one.

    Axes of different dimensions of the source tensor, which is of this `shape`, stay apart.
    """
    dimensions = set(strides_of(shape))
    strides = strides_of(tuple(axis.extent for axis in piece.axes))
    axes: list[_Axis] = []
    for axis, outer in zip(piece.axes, strides):
        if axes and axes[-1].along is None and (axis.start, axis.stop) == (0, axis.extent) and outer not in dimensions:
            before = axes.pop()
            extent, start, stop = (value * axis.extent for value in before[:3])
            axis = _Axis(extent, start, stop, axis.along)
        axes.append(axis)
    return piece._replace(axes=tuple(axes))


def _as_place(place: Place, piece: _Piece, count: int, extra: int) -> Place:
    """A piece as a place; the target has `count` axes, and `extra` ones of one index before them."""
    order: dict[int, int] = {}
    loose = iter(range(extra))
    rest = count + extra - len(piece.axes)  # axes of one index that the view has not
    for number, axis in enumerate(piece.axes):
        order[next(loose) if axis.along is None else axis.along + extra] = rest + number
    absent = iter(range(rest))
    view = View(
        (1,) * rest + tuple(axis.extent for axis in piece.axes),
        Box(
            (0,) * rest + tuple(axis.start for axis in piece.axes),
            (1,) * rest + tuple(axis.stop for axis in piece.axes),
        ),
        tuple(order[axis] if axis in order else next(absent) for axis in range(count + extra)),
    )
    box = Box((0,) * extra + piece.box.start, (1,) * extra + piece.box.stop)
    return place._replace(box=box, view=view)


def _merged(first: Place, second: Place) -> Place | None:
    """Two places as one, where the second goes on where the first ends, along one axis."""
    one, two = first.view, second.view
    assert one is not None and two is not None
    if (first.tensor, first.compute, one.shape, one.order) != (second.tensor, second.compute, two.shape, two.order):
        return None
    pairs = zip(zip(first.box.start, first.box.stop), zip(second.box.start, second.box.stop))
    different = [axis for axis, (before, after) in enumerate(pairs) if before != after]
    if len(different) != 1:
        return None
    (axis,) = different
    along = one.order[axis]
    if first.box.stop[axis] != second.box.start[axis] or one.box.stop[along] != two.box.start[along]:
        return None
    others = [at for at in range(len(one.shape)) if at != along]
    if any((one.box.start[at], one.box.stop[at]) != (two.box.start[at], two.box.stop[at]) for at in others):
        return None
    view = one._replace(box=Box(one.box.start, _with(one.box.stop, along, two.box.stop[along])))
    return first._replace(box=Box(first.box.start, _with(first.box.stop, axis, second.box.stop[axis])), view=view)


def _with(values: Shape, at: int, value: int) -> Shape:
    return (*values[:at], value, *values[at + 1 :])


def _is_straight(place: Place) -> bool:
    """Whether a place is all of a tensor, in its order."""
    view = place.view
    assert view is not None
    axes = [axis for axis in view.order if view.shape[axis] > 1]
    return view.box == Box.whole(view.shape) and axes == sorted(axes)


def _joined(boxes: Iterable[Box]) -> Box:
    listed = list(boxes)
    return Box(
        tuple(itertools.chain.from_iterable(box.start for box in listed)),
        tuple(itertools.chain.from_iterable(box.stop for box in listed)),
    )
