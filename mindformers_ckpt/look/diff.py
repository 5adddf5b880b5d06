"""Two checkpoints as whole tensors, whatever their strategies, formats and kinds: what differs, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import BLOCK_BYTES
from mindformers_ckpt.engine.tasks import tasks_of
from mindformers_ckpt.engine.threads import run_in_threads
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.formats import DType, Segment, TensorSpec
from mindformers_ckpt.geometry.box import Box, blocks
from mindformers_ckpt.look.arrays import numpy_type
from mindformers_ckpt.look.blocks import WholeReader
from mindformers_ckpt.look.comparing import Comparer
from mindformers_ckpt.look.holders import first_difference
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.objects.path import PathLike
from mindformers_ckpt.planning.model import Place, SourceFile, Transfer, once
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.plausibility import check_contents
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.strategy.given import StrategyLike

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Side = tuple[Checkpoint, Mapping[str, LogicalTensor]]
# Elements that are computed with at a time: as double precision they stay in the cache.
_STRIP = 64 << 10
_THREADS = 2  # while one waits for a read, the other compares


@dataclass(frozen=True)
class TensorDiff:
    """A tensor that both checkpoints have, and that is not the same in both.

    Attributes:
        name: of the tensor.
        left, right: type and shape on both sides.
        differing: elements whose values differ; None where they cannot be compared: shapes or kinds of types differ.
        largest: the largest |difference|; infinite where one side is not a number, or infinite.
        where: the index of that element.
        values: of that element, left and right.
        relative: the norm of the difference by the norm of the left tensor.
    """

    name: str
    left: TensorSpec
    right: TensorSpec
    differing: int | None = None
    largest: float | None = None
    where: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None
    relative: float | None = None

    def within(self, tolerance: float) -> bool:
        """Whether type and shape are the same and no element differs by more; nothing is within 0, where bits count."""
        is_same = tolerance > 0 and (self.left.dtype, self.left.shape) == (self.right.dtype, self.right.shape)
        return is_same and self.largest is not None and self.largest <= tolerance


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints.

    Attributes:
        only_left, only_right: names of tensors that the other one lacks.
        equal: how many tensors are the same, bit for bit.
        tensors: those that are not, by name.
        tolerance: what was allowed.
        warnings: what you should know of the choice of files.
    """

    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    equal: int
    tensors: tuple[TensorDiff, ...]
    tolerance: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def beyond(self) -> tuple[TensorDiff, ...]:
        """The tensors that differ by more than the tolerance, or in type or shape."""
        return tuple(tensor for tensor in self.tensors if not tensor.within(self.tolerance))

    @property
    def ok(self) -> bool:
        """Whether both have the same tensors, and none differs by more than the tolerance."""
        return not (self.only_left or self.only_right or self.beyond)


def diff(
    left: PathLike,
    right: PathLike,
    strategy: StrategyLike = None,
    right_strategy: StrategyLike = None,
    *,
    step: str | None = None,
    right_step: str | None = None,
    tolerance: float = 0.0,
    contents: str = "error",
    progress: Progress | None = None,
) -> Diff:
    """Compare two checkpoints as whole tensors.

    `strategy` and `step` are of the left one, the others of the right one (see `fingerprint`). `tolerance` is the
    largest |difference| of an element that is allowed. `progress` is told the bytes that were compared and the total.
    Memory does not grow with the tensors. Raises PlanError, FormatError, StrategyError, TransferError.
    """
    if not tolerance >= 0 or math.isinf(tolerance):
        raise ConfigError(f"a tolerance of {tolerance:g} makes no sense; give a number from 0 on")
    first, second = checkpoint_at(left, strategy, step), checkpoint_at(right, right_strategy, right_step)
    ours, theirs = _tensors(first), _tensors(second)
    warnings = [
        *first.warnings,
        *second.warnings,
        *check_contents(first, first.tensors(), contents),
        *check_contents(second, second.tensors(), contents),
    ]
    common = sorted(ours.keys() & theirs.keys())
    done = _Done(sum(ours[name].spec.nbytes for name in common), progress)
    others = _differing((first, ours), (second, theirs), common, done)
    found: list[TensorDiff] = []
    with closing(WholeReader(first)) as one, closing(WholeReader(second)) as other:
        for name in others:
            found.append(_compare(name, (one, ours[name]), (other, theirs[name])))
            done.add(ours[name])
    return Diff(
        tuple(sorted(ours.keys() - theirs.keys())),
        tuple(sorted(theirs.keys() - ours.keys())),
        len(common) - len(found),
        tuple(found),
        tolerance,
        tuple(warnings),
    )


def _tensors(checkpoint: Checkpoint) -> Mapping[str, LogicalTensor]:
    """The tensors with elements, which are those that a .ckpt file can hold."""
    return {name: tensor for name, tensor in checkpoint.whole_tensors().items() if tensor.spec.size}


class _Done:
    """How many bytes have been compared."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._bytes = 0

    def add(self, tensor: LogicalTensor) -> None:
        """A tensor is compared."""
        self._bytes += tensor.spec.nbytes
        if self._progress is not None:
            self._progress(self._bytes, self._total)


def _differing(left: Side, right: Side, names: Sequence[str], done: _Done) -> list[str]:
    """The tensors that are not the same on both sides, bit for bit, in order; `done` is told of the others."""
    found: list[str] = []
    with ExitStack() as stack:
        runners = [stack.enter_context(closing(_Bits(left, right))) for _ in range(_THREADS)]
        for name, is_same in run_in_threads(runners, names):
            if is_same:
                done.add(left[1][name])
            else:
                found.append(name)
    return sorted(found)


class _Bits:
    """Finds out whether tensors of two checkpoints are the same, bit for bit."""

    def __init__(self, left: Side, right: Side) -> None:
        (first, self._ours), (self._right, self._theirs) = left, right
        self._shards: Sequence[Shard] = ()
        paths = list(dict.fromkeys(first.files.files))
        self._numbers = {path: number for number, path in enumerate(paths)}
        headers = {number: first.header(path) for path, number in self._numbers.items()}
        files = [SourceFile(path, header.size) for path, header in zip(paths, headers.values())]
        self._comparer = Comparer(files, headers, self._content, self._note)
        self._differs = False
        # Layers share their shards, and so the places of these, and what is found of them once (engine/ways.py).
        self._sources, self._targets = once(self._sources_of), once(_targets_of)

    def run(self, name: str, check: Callable[[], None], following: str | None) -> tuple[str, bool]:
        """A tensor, and whether both have the same type, shape and bits. Little is read after a difference."""
        left, right = self._ours[name], self._theirs[name]
        if (left.spec.dtype, left.spec.shape) != (right.spec.dtype, right.spec.shape):
            return name, False
        self._shards, self._differs = right.shards, False
        sources, targets = self._sources(left.shards), self._targets(right.shards)
        for task in tasks_of(Transfer(name, left.spec.dtype, left.spec.shape, sources, targets)):
            self._comparer.run(task, check)
            if self._differs:
                break
        return name, not self._differs

    def _sources_of(self, shards: Sequence[Shard]) -> tuple[Place, ...]:
        return tuple(Place(self._numbers[shard.path], shard.box, shard.tensor) for shard in shards)

    def _content(self, number: int, name: str) -> tuple[Path, Sequence[Segment]]:
        shard = self._shards[number]
        return shard.path, self._right.header(shard.path).tensors[shard.tensor or name].segments

    def _note(self, file: int, name: str, start: int, count: int) -> None:
        self._differs = True

    def close(self) -> None:
        self._comparer.close()


def _targets_of(shards: Sequence[Shard]) -> tuple[Place, ...]:
    return tuple(Place(number, shard.box) for number, shard in enumerate(shards))


def _compare(
    name: str, left: tuple[WholeReader, LogicalTensor], right: tuple[WholeReader, LogicalTensor]
) -> TensorDiff:
    """What differs in a tensor that is not the same bit for bit."""
    ours, theirs = left[1].spec, right[1].spec
    if ours.shape != theirs.shape:
        return TensorDiff(name, ours, theirs)
    sums = _Sums(ours, theirs)
    for block, a, b in _both(left, right):
        sums.add(a, b, block)
    return sums.result(name)


def _both(
    left: tuple[WholeReader, LogicalTensor], right: tuple[WholeReader, LogicalTensor]
) -> Iterator[tuple[Box, Array, Array]]:
    """The blocks of a tensor on both sides, flat."""
    ours, theirs = left[1].spec, right[1].spec
    limit = max(1, BLOCK_BYTES // max(ours.dtype.itemsize, theirs.dtype.itemsize))
    for block in blocks(Box.whole(ours.shape), limit):
        yield block, left[0].read(left[1], block).reshape(-1), right[0].read(right[1], block).reshape(-1)


class _Sums:
    """What is counted over the blocks of a tensor: differences, and the squares for the norms."""

    def __init__(self, ours: TensorSpec, theirs: TensorSpec) -> None:
        self.ours, self.theirs = ours, theirs
        self.left_type, self.right_type = _number_type(ours.dtype), _number_type(theirs.dtype)
        self.differing, self.largest = 0, -1.0
        self.squares = self.norm = 0.0
        self.where: tuple[int, ...] | None = None
        self.values = (0.0, 0.0)

    def add(self, a: Array, b: Array, block: Box) -> None:
        """Add what both sides have of a block."""
        if self.left_type is None or self.right_type is None:
            return
        for first in range(0, len(a), _STRIP):
            left, right = a[first : first + _STRIP], b[first : first + _STRIP]
            numbers = _as_numbers(left, self.left_type)
            is_same = self.left_type == self.right_type and first_difference(left.view("u1"), right.view("u1")) is None
            if is_same and self.where is not None:
                self.norm += _square(numbers)
            else:
                self._add_strip(numbers, _as_numbers(right, self.right_type), block, first)

    def _add_strip(self, a: Array, b: Array, block: Box, first: int) -> None:
        import numpy as np

        with np.errstate(all="ignore"):
            delta = np.abs(a - b)
        delta[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        delta[np.isnan(delta)] = np.inf
        self.norm += _square(a)
        self.squares += _square(delta)
        self.differing += int(np.count_nonzero(delta))
        at = int(np.argmax(delta))
        if float(delta[at]) > self.largest:
            self.largest = float(delta[at])
            inside = np.unravel_index(first + at, block.shape)
            self.where = tuple(int(index) + start for index, start in zip(inside, block.start))
            self.values = (_told(a[at]), _told(b[at]))

    def result(self, name: str) -> TensorDiff:
        if self.left_type is None or self.right_type is None:
            return TensorDiff(name, self.ours, self.theirs)
        if self.where is None:
            return TensorDiff(name, self.ours, self.theirs, 0, 0.0, None, None, 0.0)
        norm, error = math.sqrt(self.norm), math.sqrt(self.squares)
        relative = error / norm if norm else (math.inf if error else 0.0)
        return TensorDiff(name, self.ours, self.theirs, self.differing, self.largest, self.where, self.values, relative)


def _square(numbers: Array) -> float:
    """The sum of squares; what is infinite or no number counts in differences only."""
    import numpy as np

    magnitude = np.abs(numbers)
    total = float(np.vdot(magnitude, magnitude).real)
    if math.isfinite(total):
        return total
    magnitude = magnitude[np.isfinite(magnitude)].astype(np.float64)
    with np.errstate(over="ignore"):
        return float(np.vdot(magnitude, magnitude))


def _told(value: Any) -> float:
    return float(abs(value)) if isinstance(value, complex) else float(value)


def _number_type(dtype: DType) -> np.dtype[Any] | None:
    """The numpy type whose values the bytes are, None for those that are compared as bits only."""
    return None if dtype.name in ("str", "qint4x2", "hifloat8") else numpy_type(dtype)


def _as_numbers(carried: Array, dtype: np.dtype[Any]) -> Array:
    """The values in a precision that holds all of them, and their differences."""
    import numpy as np

    wide = (
        np.complex128 if dtype.kind == "c" else np.longdouble if dtype.kind in "iu" and dtype.itemsize == 8 else float
    )
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values: Array = carried.view(dtype).astype(wide)
    return values
