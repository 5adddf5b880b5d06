"""Parts of shards out of checkpoint files.

Files are read with `pread` into a reused buffer. Nothing is mapped: memory stays constant whatever the size of a
file, a file that shrinks under our hands is an error and no crash, and network file systems are read in large
sequential calls.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mindformers_ckpt.engine.buffers import BLOCK_BYTES, PIECE_BYTES, empty_bytes
from mindformers_ckpt.engine.compute import DOWN_TILE, UP_TILE, cast, dequantise, factor_values, merge, scale_values
from mindformers_ckpt.engine.descriptors import Descriptors, file_ranges, fill
from mindformers_ckpt.engine.views import copy_transposed, in_view, last_element, runs_of
from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.formats import DType, Header, Segment, TensorSpec, read_header
from mindformers_ckpt.geometry.box import Box, is_one_run, offset_in, run_length
from mindformers_ckpt.planning.computations import Cast, Constant, Dequantise, Factor, Merge
from mindformers_ckpt.planning.model import Place, SourceFile, View

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# Shorter runs of a shard are read together with what lies between them, longer ones by themselves.
_RUN_BYTES = 16 << 10
_SCALES = 64
_FACTORS = 4


class Reader(Protocol):
    """Where contents come from, as `ShardReader` gives them."""

    def read(self, place: Place, name: str, dtype: DType, part: Box, out: Array) -> None:
        """Read a part into an array of its shape."""

    def stream(self, place: Place, name: str, dtype: DType, part: Box, lead: int) -> Iterator[memoryview]:
        """The bytes of a part that is a single run of its shard, piece by piece."""

    def close(self) -> None:
        """Close what was opened."""


class ShardReader:
    """Reads parts of the shards that a plan's source files hold.

    A file is checked against the plan when it is first used: its size, and of every tensor that is read the
    element type and the shape. Raises TransferError when it is not what the plan was made from.
    `headers` are those that need not be read, by the number of the file.
    """

    def __init__(self, files: Sequence[SourceFile], headers: Mapping[int, Header] | None = None) -> None:
        self._files = files
        self._headers: dict[int, Header] = dict(headers or {})
        self._last: Header | None = None
        self._descriptors = Descriptors(os.O_RDONLY)
        self._scratch: Array | None = None
        self._piece: memoryview | None = None
        self._scales: OrderedDict[tuple[int, str], Array] = OrderedDict()
        self._factors: OrderedDict[Factor, Array] = OrderedDict()

    def read(self, place: Place, name: str, dtype: DType, part: Box, out: Array) -> None:
        """Read `part` (a box of the whole tensor, inside the place's) into an array of its shape.

        `dtype` is the element type of the array; the file holds another where the place has a computation.
        """
        if place.compute is not None:
            self._read_computed(place, name, dtype, part, out)
            return
        segments = self._segments(place, place.tensor or name, dtype)
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

    def stream(self, place: Place, name: str, dtype: DType, part: Box, lead: int) -> Iterator[memoryview]:
        """The bytes of a part that is a single run of its shard, piece by piece; each is gone when the next comes.

        The first piece has `lead` bytes, the others PIECE_BYTES, and the last one what is left.
        """
        segments, path = self._segments(place, place.tensor or name, dtype), self._files[place.file].path
        start = offset_in(part, place.box) * dtype.itemsize
        stop = start + part.volume * dtype.itemsize
        if self._piece is None:
            self._piece = empty_bytes(PIECE_BYTES).data
        while start < stop:
            piece = self._piece[: min(lead, stop - start)]
            self._read_bytes(path, segments, start, piece)
            yield piece
            start, lead = start + len(piece), PIECE_BYTES

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
            box = Box.whole(compute.scale_shape)
            dtype = compute.scale_dtype
            factors = np.empty(box.shape, dtype.carrier)
            self.read(Place(compute.scale_file, box, compute.scale), compute.scale, dtype, box, factors)
            if len(self._scales) >= _SCALES:
                self._scales.popitem(last=False)
            self._scales[key] = scale_values(factors, dtype)
        return self._scales[key]

    def _factor(self, factor: Factor, tile: tuple[int, int]) -> Array:
        """A whole factor of a LoRA branch. The last ones are kept: a weight is read in many parts."""
        import numpy as np

        if factor not in self._factors:
            values = np.zeros(factor.view, factor.dtype.carrier)
            for piece in factor.pieces:
                shape = piece.box.shape
                # A matrix of a file must have its very shape, a reshaped one at least its size.
                view = View(shape, Box.whole(shape), tuple(range(len(shape)))) if len(factor.view) > 2 else None
                place = Place(piece.file, piece.box, piece.tensor, view)
                self.read(place, piece.tensor, factor.dtype, piece.box, values[piece.box.slices()])
            if len(self._factors) >= _FACTORS:
                self._factors.popitem(last=False)
            self._factors[factor] = factor_values(values, factor, tile)
        return self._factors[factor]

    def _read_part(
        self, path: Path, segments: Sequence[Segment], dtype: DType, part: Box, outer: Box, out: Array
    ) -> None:
        if is_one_run(part.shape, outer.shape):
            self._read_run(path, segments, dtype, part, outer, out)
        else:
            self._read_runs(path, segments, dtype, part, outer, out)

    def close(self) -> None:
        self._descriptors.close()

    def _segments(self, place: Place, name: str, dtype: DType) -> tuple[Segment, ...]:
        header = self._headers.get(place.file)
        file = self._files[place.file]
        if header is None:
            try:
                header = read_header(file.path, self._last)
            except FormatError as error:
                raise TransferError(str(error)) from error
            if header.size != file.size:
                raise TransferError(
                    f"{file.path} has {header.size} bytes, {file.size} when the work was planned: "
                    "it was changed meanwhile"
                )
            self._headers[place.file] = self._last = header
        record = header.tensors.get(name)
        expected = place.box.shape if place.view is None else place.view.shape
        fits = record is not None and record.spec.dtype == dtype and record.spec.shape == expected
        if place.view is not None and record is not None:
            fits = record.spec.dtype == dtype and record.spec.size == math.prod(expected)
        if record is None or not fits:
            found = "is not there" if record is None else f"is {record.spec.dtype.name}{list(record.spec.shape)}"
            raise TransferError(
                f"{file.path}: {name} {found}, but {dtype.name}{list(expected)} is expected from the other "
                "files of the stage"
            )
        return record.segments

    def _read_runs(
        self, path: Path, segments: Sequence[Segment], dtype: DType, part: Box, outer: Box, out: Array
    ) -> None:
        """Read a part that is several runs of its shard: run by run, or with the bytes between them."""
        if run_length(part.shape, outer.shape) * dtype.itemsize >= _RUN_BYTES:
            for run, index in runs_of(part, outer):
                self._read_run(path, segments, dtype, run, outer, out[index])
            return
        span = (offset_in(last_element(part), outer) - offset_in(part, outer) + 1) * dtype.itemsize
        if span <= BLOCK_BYTES:
            self._read_strided(path, segments, dtype, part, outer, out)
            return
        axis = next(axis for axis, extent in enumerate(part.shape) if extent > 1)
        middle = part.shape[axis] // 2
        for first, last in ((0, middle), (middle, part.shape[axis])):
            start = (*part.start[:axis], part.start[axis] + first, *part.start[axis + 1 :])
            stop = (*part.stop[:axis], part.start[axis] + last, *part.stop[axis + 1 :])
            index = (slice(None),) * axis + (slice(first, last),)
            self._read_runs(path, segments, dtype, Box(start, stop), outer, out[index])

    def _read_run(
        self, path: Path, segments: Sequence[Segment], dtype: DType, run: Box, outer: Box, out: Array
    ) -> None:
        """Read a single run of a shard into an array that need not be contiguous."""
        if out.flags.c_contiguous:
            start = offset_in(run, outer) * dtype.itemsize
            self._read_bytes(path, segments, start, _flat_bytes(out))
        else:
            self._read_strided(path, segments, dtype, run, outer, out)

    def _read_strided(
        self, path: Path, segments: Sequence[Segment], dtype: DType, part: Box, outer: Box, out: Array
    ) -> None:
        """Read all bytes from the first to the last element of a part, and pick its elements out of them."""
        import numpy as np

        first = offset_in(part, outer)
        span = (offset_in(last_element(part), outer) - first + 1) * dtype.itemsize
        if self._scratch is None or len(self._scratch) < span:
            self._scratch = empty_bytes(span)
        self._read_bytes(path, segments, first * dtype.itemsize, self._scratch.data[:span])
        strides, step = [], dtype.itemsize
        for extent in reversed(outer.shape):
            strides.append(step)
            step *= extent
        out[...] = np.ndarray(part.shape, dtype.carrier, self._scratch, 0, tuple(reversed(strides)))

    def _read_bytes(self, path: Path, segments: Sequence[Segment], start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a tensor's content from `start` on."""
        for offset, length in file_ranges(segments, start, len(view)):
            fill(self._descriptors.get(path), path, offset, view[:length])
            view = view[length:]


def read_file(path: Path, names: Container[str] | None = None) -> Iterator[tuple[TensorSpec, Array]]:
    """The tensors of a file (those of `names`), each as the bytes of its content in memory of its own."""
    try:
        header = read_header(path)
    except FormatError as error:
        raise TransferError(str(error)) from error
    descriptors = Descriptors(os.O_RDONLY)
    try:
        for name, record in header.tensors.items():
            if names is None or name in names:
                content = empty_bytes(record.spec.nbytes)
                view = content.data
                for segment in record.segments:
                    fill(descriptors.get(path), path, segment.offset, view[: segment.length])
                    view = view[segment.length :]
                yield record.spec, content
    finally:
        descriptors.close()


def _flat_bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view("u1").data
