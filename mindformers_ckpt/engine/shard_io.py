"""Bytes in and out of checkpoint files: parts of shards, read and written at their places.

Files are read with `pread` into a reused buffer and written with `pwrite`. Nothing is mapped: memory stays
constant whatever the size of a file, a file that shrinks under our hands is an error and no crash, and
network file systems are read in large sequential calls.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mindformers_ckpt.engine.buffers import empty_bytes
from mindformers_ckpt.engine.compute import DOWN_TILE, UP_TILE, cast, dequantise, factor_values, merge, scale_values
from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.formats import DType, FileLayout, Header, Segment, TensorSpec, layout_file, read_header
from mindformers_ckpt.geometry.box import Box, blocks, is_one_run, offset_in, run_length
from mindformers_ckpt.planning.computations import Cast, Dequantise, Factor, Merge
from mindformers_ckpt.planning.model import Place, SourceFile, TargetFile, View

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# Large enough to make the parts of eight targets long runs, small enough to stay in the processor's cache.
BLOCK_BYTES = 8 << 20
# What is read at once where a run is passed on as it is: it stays in the cache of one core until it is written. And
# what is written at once, to multiples of it where the data allow: the system takes one piece of memory for that.
PIECE_BYTES = 512 << 10
TRANSPOSE_BYTES = 32 << 20
# Shorter runs of a shard are read together with what lies between them, longer ones by themselves.
_RUN_BYTES = 16 << 10
_OPEN_FILES = 256
_SCALES = 64
_FACTORS = 4
_STRIP = 64


class Descriptors:
    """Open file descriptors, the least recently used ones closed beyond a limit."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._open: OrderedDict[Path, int] = OrderedDict()

    def get(self, path: Path) -> int:
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        try:
            descriptor = os.open(path, self._flags)
        except OSError as error:
            raise TransferError(f"{path}: cannot be opened: {error.strerror}") from error
        self._open[path] = descriptor
        return descriptor

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class ShardReader:
    """Reads parts of the shards that a plan's source files hold.

    A file is checked against the plan when it is first used: its size, and of every tensor that is read the
    element type and the shape. Raises TransferError when it is not what the plan was made from.
    """

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._headers: dict[int, Header] = {}
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
            part, out = _in_view(part.relative_to(place.box), place.view, out)
            outer = Box.whole(place.view.shape)
        if place.view is not None and place.view.is_transposed:
            import numpy as np

            straight = np.empty(part.shape, dtype.carrier)
            self._read_part(path, segments, dtype, part, outer, straight)
            _copy_transposed(straight, out)
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
        inner, values = _in_view(part.relative_to(place.box), view, values)
        _, target = _in_view(part.relative_to(place.box), view, out)
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
            for run, index in _runs(part, outer):
                self._read_run(path, segments, dtype, run, outer, out[index])
            return
        span = (offset_in(_last(part), outer) - offset_in(part, outer) + 1) * dtype.itemsize
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
        span = (offset_in(_last(part), outer) - first + 1) * dtype.itemsize
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


class Reader(Protocol):
    """Where contents come from, as `ShardReader` gives them."""

    def read(self, place: Place, name: str, dtype: DType, part: Box, out: Array) -> None:
        """Read a part into an array of its shape."""

    def stream(self, place: Place, name: str, dtype: DType, part: Box, lead: int) -> Iterator[memoryview]:
        """The bytes of a part that is a single run of its shard, piece by piece."""

    def close(self) -> None:
        """Close what was opened."""


class Sink(Protocol):
    """Where the contents of target tensors go, in pieces of consecutive bytes."""

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        """Put bytes at `start` of the content of a tensor of a target file (an index into the plan's list)."""

    def offset(self, file: int, name: str, start: int) -> int:
        """Where in the file, or in memory, byte `start` of a tensor lies."""

    def proof(self) -> str:
        """A digest of all that was written since it was asked for last, "" where none is taken."""

    def close(self) -> None:
        """Close what was opened."""


class FileSink:
    """Writes target files under a folder. `prepare` makes them; then any process may fill in contents.

    Raises TransferError when the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, files: Sequence[TargetFile]) -> None:
        self._paths = [folder / file.path for file in files]
        self._files = files
        self._layouts: dict[tuple[str, int], FileLayout] = {}
        self._descriptors = Descriptors(os.O_WRONLY)

    def layout(self, file: int) -> FileLayout:
        """Where everything goes in a target file; files with the same tensors share it."""
        target = self._files[file]
        key = (target.format, id(target.tensors))
        if key not in self._layouts:
            self._layouts[key] = _layout_of(target.format, target.tensors, target.metadata)
        return self._layouts[key]

    def path(self, file: int) -> Path:
        return self._paths[file]

    def prepare_all(self) -> None:
        """Create all target files."""
        for file in range(len(self._files)):
            self.prepare(file)

    def repair(self, file: int) -> None:
        """Give a target file of an interrupted run its size, and all in it but the contents of the tensors, again."""
        path, layout = self.path(file), self.layout(file)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "wb") as stream:
                is_whole = os.fstat(stream.fileno()).st_size >= layout.size
                if is_whole:
                    os.ftruncate(stream.fileno(), layout.size)  # a checksum may have been appended
                    for offset, data in layout.frames:
                        os.pwrite(stream.fileno(), data, offset)
        except OSError:
            is_whole = False
        if not is_whole:
            path.unlink(missing_ok=True)
            self.prepare(file)

    def prepare(self, file: int, *, sparse: bool = False) -> None:
        """Create a target file in its final size, with everything in it but the contents of the tensors.

        Room for these is reserved on the disk where it can, unless the file is to be `sparse`.
        """
        path, layout = self.path(file), self.layout(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as stream:
                (os.ftruncate if sparse else _reserve)(stream.fileno(), layout.size)
                for offset, data in layout.frames:
                    os.pwrite(stream.fileno(), data, offset)
        except OSError as error:
            raise TransferError(f"{path}: cannot be written: {error.strerror}") from error

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        path = self.path(file)
        descriptor = self._descriptors.get(path)
        for offset, length in file_ranges(self.layout(file).tensors[name].segments, start, len(data)):
            piece, data = data[:length], data[length:]
            while piece:
                try:
                    count = os.pwrite(descriptor, piece[: PIECE_BYTES - offset % PIECE_BYTES], offset)
                except OSError as error:
                    raise TransferError(f"{path}: writing failed: {error.strerror}") from error
                offset += count
                piece = piece[count:]

    def offset(self, file: int, name: str, start: int) -> int:
        return next(file_ranges(self.layout(file).tensors[name].segments, start, 1))[0]

    def proof(self) -> str:
        return ""

    def close(self) -> None:
        self._descriptors.close()


@lru_cache(maxsize=16)
def _layout_of(format: str, tensors: tuple[TensorSpec, ...], metadata: tuple[tuple[str, str], ...]) -> FileLayout:
    """The layout of a file; the last ones are kept for the other sinks of a run."""
    return layout_file(format, tensors, dict(metadata))


class ArraySink:
    """Collects the tensors of one target file in memory, as writable byte arrays by name."""

    def __init__(self, target: TargetFile, allocate: Callable[[int], Array]) -> None:
        self.contents: dict[str, Array] = {spec.name: allocate(spec.nbytes) for spec in target.tensors}

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        self.contents[name].data[start : start + len(data)] = data

    def offset(self, file: int, name: str, start: int) -> int:
        return start

    def proof(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing was opened; the contents stay."""


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


def _reserve(descriptor: int, size: int) -> None:
    """Give a file its size, and its place on the disk where the file system can.

    A disk that is too full is then found before anything is copied, and writing into reserved blocks takes a
    quarter less time on ext4. Not `posix_fallocate`: where the file system cannot reserve, it writes to every block.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "fallocate64") and libc.fallocate64(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))
    os.ftruncate(descriptor, size)


def fill(descriptor: int, path: Path, offset: int, view: memoryview) -> None:
    """Fill `view` from a file. Raises TransferError when reading fails or the file ends before."""
    while view:
        try:
            count = os.preadv(descriptor, [view], offset)
        except OSError as error:
            raise TransferError(f"{path}: reading at byte {offset} failed: {error.strerror}") from error
        if count == 0:
            raise TransferError(f"{path} ends at byte {offset}: it was shortened while it was read")
        offset += count
        view = view[count:]


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


def file_ranges(segments: Sequence[Segment], start: int, length: int) -> Iterator[tuple[int, int]]:
    """The byte ranges (offset, length) of a file that hold `length` bytes from `start` of a tensor's content."""
    for segment in segments:
        if not length:
            return
        if start >= segment.length:
            start -= segment.length
            continue
        count = min(length, segment.length - start)
        yield segment.offset + start, count
        start, length = 0, length - count


def _flat_bytes(array: Array) -> memoryview:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view("u1").data


def _in_view(part: Box, view: View, out: Array) -> tuple[Box, Array]:
    """A part of a place's box as a part of the view, and the array for it with the axes of the view."""
    start, stop = list(view.box.start), list(view.box.start)
    for axis, first, last in zip(view.order, part.start, part.stop):
        start[axis] += first
        stop[axis] += last
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    return Box(tuple(start), tuple(stop)), out.transpose(inverse)


def _copy_transposed(straight: Array, out: Array) -> None:
    """Copy to an array of the same shape whose memory runs along another axis.

    A strip of a few columns at a time stays in the cache while it is turned: three times as fast.
    """
    import numpy as np

    for first in range(0, straight.shape[-1], _STRIP):
        strip = (..., slice(first, first + _STRIP))
        out[strip] = np.ascontiguousarray(straight[strip])


def _last(box: Box) -> Box:
    """The box of the last element."""
    return Box(tuple(stop - 1 for stop in box.stop), box.stop)


def _runs(part: Box, outer: Box) -> Iterator[tuple[Box, tuple[Any, ...]]]:
    """The runs of a part in its shard, each with its index in an array of the part."""
    for run in blocks(part, run_length(part.shape, outer.shape)):
        yield run, run.relative_to(part).slices()
