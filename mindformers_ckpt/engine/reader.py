"""Parts of shards out of checkpoint files.

Files are read with `pread` into a reused buffer. Nothing is mapped: memory stays constant whatever the size of a
file, a file that shrinks under our hands is an error and no crash, and network file systems are read in large
sequential calls.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from mindformers_ckpt.engine.ahead import Ahead
from mindformers_ckpt.engine.buffers import PIECE_BYTES, empty_bytes, piece_memory
from mindformers_ckpt.engine.compute import DOWN_TILE, UP_TILE, cast, dequantise, factor_values, merge, scale_values
from mindformers_ckpt.engine.descriptors import file_ranges
from mindformers_ckpt.engine.fetcher import Extent, Fetcher
from mindformers_ckpt.engine.likely_heads import LikelyHeads
from mindformers_ckpt.engine.source_shares import SourceShares
from mindformers_ckpt.engine.views import box_in_view, copy_transposed, in_view, reads_of, span_in
from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.formats import DType, Header, Segment
from mindformers_ckpt.formats.headers import HeaderReader
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Cast, Compute, Constant, Dequantise, Factor, Merge
from mindformers_ckpt.planning.model import Place, SourceFile, View

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_SCALES = 64
_FACTORS = 4
_SPANS = 1024


class Read(NamedTuple):
    """A part of a tensor that is to be read, as the arguments of `ShardReader.read`."""

    place: Place
    name: str
    dtype: DType
    part: Box


class Step(Protocol):
    """A step of copying, which knows what it reads."""

    def reads(self) -> Iterator[Read]:
        """What is read when the step is made."""


S = TypeVar("S", bound=Step)


def cuts(length: int, lead: int, most: int = PIECE_BYTES) -> Iterator[int]:
    """The lengths of the pieces that so many bytes are passed on in: `lead`, `most` …, and what is left.

    What is not longer than `most` is one piece.
    """
    if length <= most:
        lead = length
    while length:
        count = min(lead, length)
        yield count
        length, lead = length - count, most


class Reader(Protocol):
    """Where contents come from, as `ShardReader` gives them."""

    def ahead(self, task: int, steps: Iterator[S], following: tuple[int, Iterator[S]] | None) -> Iterator[S]:
        """The steps of a task; what they read may be on its way before they come."""

    def read(self, place: Place, name: str, dtype: DType, part: Box, out: Array) -> None:
        """Read a part into an array of its shape."""

    def held(self, place: Place, name: str, dtype: DType, part: Box) -> Array | None:
        """A part as it is in memory that was read ahead, None where it is not."""

    def stream(self, place: Place, name: str, dtype: DType, start: int, length: int, lead: int) -> Iterator[memoryview]:
        """Bytes of a shard from `start` on, piece by piece, as `cuts` has them."""

    def close(self) -> None:
        """Close what was opened."""


class ShardReader:
    """Reads parts of the shards that a plan's source files hold.

    A file is checked against the plan when it is first used: its size, and of every tensor that is read the
    element type and the shape. Raises TransferError when it is not what the plan was made from.
    `headers` are those that need not be read, by the number of the file. Of one that is only likely the heads of what
    is read are compared, and it is read after all where they differ.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        fetcher: Fetcher | None = None,
        headers: Mapping[int, Header] | None = None,
        shares: SourceShares | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """`fetcher` has the files open, for all readers of the process; whoever made it closes it, after these.

        `shares` is told what elements are computed from, as it was read. `piece_bytes`: of what is streamed.
        """
        self._piece_bytes = piece_bytes
        self._shares = shares
        self._files = files
        self._fetcher = Fetcher() if fetcher is None else fetcher
        self._has_own = fetcher is None
        self._ahead: Ahead[Any] = Ahead(self._needs, self._fetcher)
        self._spans = lru_cache(maxsize=_SPANS)(_spans)  # layers have the same ones
        likely = {number: file.header for number, file in enumerate(files) if file.header is not None}
        self._headers: dict[int, Header] = {**likely, **(headers or {})}
        self._header_reader = HeaderReader()
        self._heads = LikelyHeads(self._ahead.fill)
        self._scratch: Array | None = None
        self._piece: memoryview | None = None
        self._scales: OrderedDict[tuple[int, str], Array] = OrderedDict()
        self._factors: OrderedDict[Factor, Array] = OrderedDict()

    def ahead(self, task: int, steps: Iterator[S], following: tuple[int, Iterator[S]] | None) -> Iterator[S]:
        """The steps of a task, with what they read on its way; `following` is the task that is likely to be next."""
        return self._ahead.steps(task, steps, following)

    def read(self, place: Place, name: str, dtype: DType, part: Box, out: Array) -> None:
        """Read `part` (a box of the whole tensor, inside the place's) into an array of its shape.

        `dtype` is the element type of the array; the file holds another where the place has a computation.
        """
        if place.compute is not None:
            self._read_computed(place, name, dtype, part, out)
            return
        segments = self._checked(place, place.tensor or name, dtype)
        path = self._files[place.file].path
        outer = place.box
        if place.view is not None:
            part, out = in_view(part.relative_to(place.box), place.view, out)
            outer = Box.whole(place.view.shape)
        if place.view is not None and place.view.is_transposed:
            import numpy as np

            straight = np.empty(part.shape, dtype.carrier)
            self._read_part(path, segments, dtype, part, outer, straight)
            copy_transposed(straight, out)
        else:
            self._read_part(path, segments, dtype, part, outer, out)

    def held(self, place: Place, name: str, dtype: DType, part: Box) -> Array | None:
        """A part as it is in memory that was read ahead, until the next step; None where it has to be read or made."""
        if not place.is_plain:
            return None
        (start, length), *others = self._spans(part, place.box, dtype.itemsize)
        if others or length != part.volume * dtype.itemsize:
            return None
        segments, path = self._checked(place, place.tensor or name, dtype), self._files[place.file].path
        data = self._held(path, segments, start, length)
        if data is None:
            return None
        import numpy as np

        return np.frombuffer(data, dtype.carrier).reshape(part.shape)

    def stream(self, place: Place, name: str, dtype: DType, start: int, length: int, lead: int) -> Iterator[memoryview]:
        """Bytes of a shard from `start` on, piece by piece, as `cuts` has them; each is gone when the next comes."""
        segments, path = self._checked(place, place.tensor or name, dtype), self._files[place.file].path
        if self._piece is None:
            self._piece = piece_memory(self._piece_bytes)
        ranges = file_ranges(segments, start, length)
        if len(ranges) == 1 and self._ahead.is_empty:
            yield from self._fetcher.stream(path, ranges[0][0], self._piece, cuts(length, lead, self._piece_bytes))
            return
        for count in cuts(length, lead, self._piece_bytes):
            piece = self._held(path, segments, start, count)
            if piece is None:
                piece = self._piece[:count]
                self._read_bytes(path, segments, start, piece)
            yield piece
            start += count

    def _read_computed(self, place: Place, name: str, dtype: DType, part: Box, out: Array) -> None:
        """Read elements of another type, and compute those of `dtype` from them."""
        import numpy as np

        compute = place.compute
        assert compute is not None
        if isinstance(compute, Constant):
            content = np.frombuffer(compute.content, compute.dtype.carrier).reshape(place.box.shape)
            out[...] = content[part.relative_to(place.box).slices()]
            return
        values = np.empty(part.shape, compute.dtype.carrier)
        self.read(place._replace(compute=None), name, compute.dtype, part, values)
        if self._shares is not None:
            self._shares.add(place, name, part, values)
        if isinstance(compute, Cast):
            out[...] = cast(values, compute.dtype, dtype)
            return
        if isinstance(compute, Merge):
            out[...] = merge(
                values, compute, part, self._factor(compute.up, UP_TILE), self._factor(compute.down, DOWN_TILE)
            )
            return
        view = place.view or View(place.box.shape, Box.whole(place.box.shape), tuple(range(len(place.box.shape))))
        inner, values = in_view(part.relative_to(place.box), view, values)
        _, target = in_view(part.relative_to(place.box), view, out)
        target[...] = dequantise(values, compute, inner, view.shape, self._scale(compute), dtype)

    def _scale(self, compute: Dequantise) -> Array:
        """The factors of an FP8 tensor, as a matrix. The last ones are kept: a tensor is read in many parts."""
        import numpy as np

        key = (compute.scale_file, compute.scale)
        if key not in self._scales:
            wanted = _scale_read(compute)
            factors = np.empty(compute.scale_shape, wanted.dtype.carrier)
            self._read_all(wanted, factors)
            if len(self._scales) >= _SCALES:
                self._scales.popitem(last=False)
            self._scales[key] = scale_values(factors, wanted.dtype)
        return self._scales[key]

    def _factor(self, factor: Factor, tile: tuple[int, int]) -> Array:
        """A whole factor of a LoRA branch. The last ones are kept: a weight is read in many parts."""
        import numpy as np

        if factor not in self._factors:
            values = np.zeros(factor.view, factor.dtype.carrier)
            for wanted in _factor_reads(factor):
                self._read_all(wanted, values[wanted.part.slices()])
            if len(self._factors) >= _FACTORS:
                self._factors.popitem(last=False)
            self._factors[factor] = factor_values(values, factor, tile)
        return self._factors[factor]

    def _read_all(self, wanted: Read, out: Array) -> None:
        """Read all of a file's tensor."""
        self.read(*wanted, out)
        if self._shares is not None:
            self._shares.add_all(wanted.place.file, wanted.name, out)

    def _read_part(
        self, path: Path, segments: Sequence[Segment], dtype: DType, part: Box, outer: Box, out: Array
    ) -> None:
        for box in reads_of(part, outer, dtype.itemsize):
            array = out[box.relative_to(part).slices()]
            first, length = span_in(box, outer)
            if length == box.volume and array.flags.c_contiguous:
                self._read_bytes(path, segments, first * dtype.itemsize, _flat_bytes(array))
            else:
                self._read_strided(path, segments, dtype, box, outer, array)

    def segments(self, read: Read) -> tuple[Segment, ...]:
        """Where the tensor of a place is in its file."""
        return self._segments(read.place, read.place.tensor or read.name, read.dtype)

    def close(self) -> None:
        if self._has_own:
            self._fetcher.close()

    def _needs(self, step: Step) -> list[Extent]:
        """The bytes of files that a step reads."""
        return [extent for read in step.reads() for extent in self._extents(*read)]

    def _extents(self, place: Place, name: str, dtype: DType, part: Box) -> Iterator[Extent]:
        compute = place.compute
        if isinstance(compute, Constant):
            return
        if compute is not None:
            for other in self._operands(compute):
                yield from self._extents(*other)
            dtype = compute.dtype
        segments, path = self._segments(place, place.tensor or name, dtype), self._files[place.file].path
        yield from self._heads.extents(place.file, place.tensor or name, self._headers[place.file])
        outer = place.box
        if place.view is not None:
            part, outer = box_in_view(part.relative_to(place.box), place.view), Box.whole(place.view.shape)
        for start, length in self._spans(part, outer, dtype.itemsize):
            for offset, count in file_ranges(segments, start, length):
                yield Extent(path, offset, offset + count)

    def _operands(self, compute: Compute) -> Iterator[Read]:
        """What else a computation reads, of which nothing is there yet."""
        if isinstance(compute, Dequantise):
            if (compute.scale_file, compute.scale) not in self._scales:
                yield _scale_read(compute)
        elif isinstance(compute, Merge):
            for factor in (compute.up, compute.down):
                if factor not in self._factors:
                    yield from _factor_reads(factor)

    def _checked(self, place: Place, name: str, dtype: DType) -> tuple[Segment, ...]:
        """As `_segments`, of a tensor that is read now: it is where they say."""
        header = self._headers.get(place.file)
        if header is not None and not self._heads.are_right(place.file, name, header):
            self._headers[place.file] = self._read_header(place.file)
        return self._segments(place, name, dtype)

    def _read_header(self, number: int) -> Header:
        file = self._files[number]
        try:
            header = self._header_reader.read(file.path)
        except FormatError as error:
            raise TransferError(str(error)) from error
        if header.size != file.size:
            raise TransferError(
                f"{file.path} has {header.size} bytes, {file.size} when the work was planned: it was changed meanwhile"
            )
        return header

    def _segments(self, place: Place, name: str, dtype: DType) -> tuple[Segment, ...]:
        header = self._headers.get(place.file)
        if header is None:
            header = self._headers[place.file] = self._read_header(place.file)
        record = header.tensors.get(name)
        expected = place.box.shape if place.view is None else place.view.shape
        fits = record is not None and record.spec.dtype == dtype and record.spec.shape == expected
        if place.view is not None and record is not None:
            fits = record.spec.dtype == dtype and record.spec.size == math.prod(expected)
        if record is None or not fits:
            found = "is not there" if record is None else f"is {record.spec.dtype.name}{list(record.spec.shape)}"
            path = self._files[place.file].path
            raise TransferError(
                f"{path}: {name} {found}, but {dtype.name}{list(expected)} is expected from the other "
                "files of the stage"
            )
        return record.segments

    def _read_strided(
        self, path: Path, segments: Sequence[Segment], dtype: DType, part: Box, outer: Box, out: Array
    ) -> None:
        """Read all bytes from the first to the last element of a part, and pick its elements out of them."""
        import numpy as np

        first, length = span_in(part, outer)
        start, span = first * dtype.itemsize, length * dtype.itemsize
        held = self._held(path, segments, start, span)
        if held is None:
            if self._scratch is None or len(self._scratch) < span:
                self._scratch = empty_bytes(span)
            held = self._scratch.data[:span]
            self._read_bytes(path, segments, start, held)
        strides, step = [], dtype.itemsize
        for extent in reversed(outer.shape):
            strides.append(step)
            step *= extent
        out[...] = np.ndarray(part.shape, dtype.carrier, held, 0, tuple(reversed(strides)))

    def _held(self, path: Path, segments: Sequence[Segment], start: int, length: int) -> memoryview | None:
        """Bytes of a tensor's content that were read ahead, None where they were not, or not in one range of a file."""
        ranges = file_ranges(segments, start, length)
        return self._ahead.bytes(path, *ranges[0]) if len(ranges) == 1 else None

    def _read_bytes(self, path: Path, segments: Sequence[Segment], start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a tensor's content from `start` on."""
        for offset, length in file_ranges(segments, start, len(view)):
            self._ahead.fill(path, offset, view[:length])
            view = view[length:]


def _spans(part: Box, outer: Box, itemsize: int) -> list[tuple[int, int]]:
    """The bytes of a shard (start, length) that are read for a part of it."""
    found = (span_in(box, outer) for box in reads_of(part, outer, itemsize))
    return [(first * itemsize, length * itemsize) for first, length in found]


def _scale_read(compute: Dequantise) -> Read:
    """All factors of an FP8 tensor."""
    box = Box.whole(compute.scale_shape)
    return Read(Place(compute.scale_file, box, compute.scale), compute.scale, compute.scale_dtype, box)


def _factor_reads(factor: Factor) -> Iterator[Read]:
    """The pieces of a factor of a LoRA branch."""
    for piece in factor.pieces:
        shape = piece.box.shape
        # A matrix of a file must have its very shape, a reshaped one at least its size.
        view = View(shape, Box.whole(shape), tuple(range(len(shape)))) if len(factor.view) > 2 else None
        yield Read(Place(piece.file, piece.box, piece.tensor, view), piece.tensor, factor.dtype, piece.box)


def _flat_bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view("u1").data
