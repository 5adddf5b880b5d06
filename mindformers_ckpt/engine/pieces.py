"""Parts of shards that are read in the order of the file, each byte straight to its place in an array.

Tensors that are cut alike are read in the same pieces, which are found once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.engine.descriptors import file_ranges
from mindformers_ckpt.engine.into_memory import LEAST_BYTES, Piece
from mindformers_ckpt.engine.views import in_bytes, reads_of, span_in
from mindformers_ckpt.formats import Segment
from mindformers_ckpt.geometry.box import Box, blocks

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class _Cut(NamedTuple):
    """A piece of a part: its box in bytes, the bytes of the content that it is in, and where it is in the part."""

    box: Box
    start: int
    length: int
    strides: tuple[int, ...]  # of its bytes in the content; none where they are one run there and in the array
    slices: tuple[slice, ...]


class Cuts(NamedTuple):
    """The pieces that a part is read in; the boxes of the part and of what the file has are those of bytes."""

    part: Box
    outer: Box
    found: Sequence[_Cut]


def cuts_into(outer: Box, part: Box, itemsize: int, out: Array) -> Cuts:
    """The pieces of a part of a shard, whose box is `outer`, that go into an array, in the order of the content.

    They are those of all tensors that are cut alike, with arrays of the same strides.
    """
    part, outer = in_bytes(part, itemsize), in_bytes(outer, itemsize)
    return Cuts(part, outer, [*_cuts(part, outer, out)])


def pieces_of(path: Path, segments: Sequence[Segment], cuts: Cuts, out: Array) -> Iterator[Piece]:
    """The pieces of a part, in the order of the file, in whose `segments` the content of the shard is.

    `out` has the bytes of the part, with the shape that `in_bytes` gives it.
    """
    part, outer, found = cuts
    for box, first, length, strides, slices in found:
        ranges, target = file_ranges(segments, first, length), out[slices]
        if not strides:
            target = target.reshape(-1)
        if len(ranges) == 1:  # as nearly always
            start, count = ranges[0]
            yield Piece(path, start, start + count, target, strides)
        elif strides:
            for start, stop, inner in _in_file(segments, box, outer):
                yield Piece(path, start, stop, out[inner.relative_to(part).slices()], strides)
        else:
            for start, count in ranges:
                yield Piece(path, start, start + count, target[:count])
                target = target[count:]


def _cuts(part: Box, outer: Box, out: Array) -> Iterator[_Cut]:
    """The pieces of a part (boxes of bytes) that goes into an array, in the order of the content."""
    for box in reads_of(part, outer, 1):
        first, length = span_in(box, outer)
        slices = box.relative_to(part).slices()
        if length == box.volume and out[slices].flags.c_contiguous:
            yield _Cut(box, first, length, (), slices)
            continue
        strides = tuple(math.prod(outer.shape[axis:]) for axis in range(1, len(outer.shape) + 1))
        for block in blocks(box, max(1, LEAST_BYTES * box.volume // length)):
            yield _Cut(block, *span_in(block, outer), strides, block.relative_to(part).slices())


def _in_file(segments: Sequence[Segment], block: Box, outer: Box) -> Iterator[tuple[int, int, Box]]:
    """Where the bytes of a block are in a file (start, stop): in parts of it where a segment ends within."""
    (start, count), *others = file_ranges(segments, *span_in(block, outer))
    if not others:
        yield start, start + count, block
        return
    for part in blocks(block, block.volume // 2):
        yield from _in_file(segments, part, outer)
