"""Where the parts of a rule lie in their whole: boxes in views of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mindformers_ckpt.convert.rules import PART, Bound, Rule, axes_of_tensor, flat, parse_axes
from mindformers_ckpt.geometry.box import Box


class Piece(NamedTuple):
    """A part in its whole.

    Attributes:
        name: of the part's tensor, which other pieces may share; `axes` are its axes.
        extent: how much of the axis `part` that tensor has.
        shape: a view of that tensor; `run` is the box of the piece in it.
        space: a view of the whole; `box` is the box of the piece in it.
        order: the axis of the tensor's view that each axis of the whole's is.
    """

    name: str
    axes: str
    extent: int
    shape: tuple[int, ...]
    run: Box
    space: tuple[int, ...]
    box: Box
    order: tuple[int, ...]


def pieces_of(bound: Bound, extents: Mapping[str, int], spans: Sequence[int], *, joined: bool) -> Iterator[Piece]:
    """The parts of a rule, whose `spans` are given, in order.

    `joined` says that the whole is made of them; otherwise they are made of the whole.
    """
    rule = bound.rule
    forms = [_form(rule, number, extents, spans, joined) for number in range(len(rule.parts))]
    numbering = [(axis, number) for number, axis in enumerate(flat(parse_axes(rule.whole.axes)))]
    for number, (part, name, captures) in enumerate(bound.parts):
        piece = forms[number % len(forms)]._replace(name=name)
        own = flat(parse_axes(part.axes))
        given = [(at, captures[axis]) for axis, at in numbering if axis != PART and axis not in own]
        if given:
            start, stop = list(piece.box.start), list(piece.box.stop)
            for at, index in given:
                start[at], stop[at] = index, index + 1
            piece = piece._replace(box=Box(tuple(start), tuple(stop)))
        yield piece


def _form(rule: Rule, number: int, extents: Mapping[str, int], spans: Sequence[int], joined: bool) -> Piece:
    """A part in its whole, before it has its name and the numbers in it."""
    part, whole = rule.parts[number], flat(parse_axes(rule.whole.axes))
    shared = [other for other, tensor in enumerate(rule.parts) if tensor.name == part.name]
    first, last = sum(spans[: shared[0]]), sum(spans[: shared[-1] + 1])
    axes = axes_of_tensor(rule, part.name)
    own = flat(parse_axes(part.axes))
    if own == whole and not joined:
        # Its elements are in the order of the whole, which may as well be cut into the axes that its tensor has.
        own = whole = flat(parse_axes(axes))
    absent = tuple(axis for axis in whole if axis not in own)
    begin = sum(spans[:number])
    offset = sum(spans[other] for other in shared if (other > number if rule.backwards else other < number))

    def box(axes: Sequence[str], start: int) -> Box:
        return Box(
            tuple(start if axis == PART else 0 for axis in axes),
            tuple(start + spans[number] if axis == PART else 1 if axis in absent else extents[axis] for axis in axes),
        )

    space = absent + own
    shape = tuple(1 if axis in absent else last - first if axis == PART else extents[axis] for axis in space)
    return Piece(
        name=part.name,
        axes=axes,
        extent=last - first,
        shape=shape,
        run=box(space, 0 if PART in absent else offset),
        space=tuple(extents[axis] for axis in whole),
        box=box(whole, begin),
        order=tuple(map(space.index, whole)),
    )
