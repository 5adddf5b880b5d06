"""The work of a plan, cut into tasks by output bytes: one huge tensor is spread over processes like many small ones.

A task is slices of transfers, a slice some consecutive blocks of one. The cut depends on the plan alone, so that an
interrupted run can be resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mindformers_ckpt.engine.buffers import BLOCK_BYTES, TRANSPOSE_BYTES
from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box, block_count, blocks, hull
from mindformers_ckpt.planning.model import Place, Plan, Transfer, once, volume_of

_TASKS = 64
_SMALLEST_TASK, _LARGEST_TASK = 8 << 20, 256 << 20


class Slice(NamedTuple):
    """Some consecutive blocks of a transfer, counted from `first`."""

    transfer: Transfer
    first: int
    blocks: int


class Task(NamedTuple):
    """A unit of work: about equally many output bytes each."""

    number: int
    slices: tuple[Slice, ...]
    bytes_written: int


class TensorHash(NamedTuple):
    """xxh3-128 of the content of a tensor in a target file."""

    file: int
    name: str
    digest: str


class TensorShare(NamedTuple):
    """What some blocks add to the checksum of a whole target tensor; `file` is the first one that takes of it."""

    file: int
    name: str
    share: int


ALL = ""


class SourceShare(NamedTuple):
    """What was read of a source file's tensor for some blocks of a target tensor, which have it in another form: what
    it adds to the checksum of the whole source tensor.

    For ALL, in place of the name of a target, it is that of all of the file's tensor: however often it was read.
    """

    file: int
    tensor: str
    target: str
    share: int


class Done(NamedTuple):
    """What a finished task reports. `proof` is a digest of all that it wrote, "" where none was asked for."""

    task: int
    bytes_written: int
    hashes: tuple[TensorHash, ...]
    proof: str = ""
    shares: tuple[TensorShare, ...] = ()
    sources: tuple[SourceShare, ...] = ()


def cut_into_tasks(plan: Plan, *, by_rank: bool = False, whole_tensors: bool = False) -> list[Task]:
    """Cut a plan into tasks: by output bytes, or one a target file (`by_rank`).

    With `whole_tensors` no tensor is cut over two tasks, as content hashes need it.
    The cut depends on the plan alone, so that an interrupted run can be resumed.
    """
    if by_rank:
        return _tasks_by_file(plan)
    size = max(_SMALLEST_TASK, min(_LARGEST_TASK, plan.bytes_written // _TASKS))
    written, cut = once(volume_of), _BlockCounts()
    tasks: list[Task] = []
    pending: list[Slice] = []
    held = 0
    for transfer in plan.transfers:
        total = cut.blocks(transfer)
        cost = written(transfer.targets) * transfer.dtype.itemsize / max(total, 1)
        first = 0
        while first < total:
            room = total - first
            if not whole_tensors:
                room = min(room, max(1, int((size - held) / cost)))
            pending.append(Slice(transfer, first, room))
            held += int(room * cost)
            first += room
            if held >= size or (first < total and not whole_tensors):
                tasks.append(Task(len(tasks), tuple(pending), held))
                pending, held = [], 0
    if pending:
        tasks.append(Task(len(tasks), tuple(pending), held))
    return tasks


def tasks_of(transfer: Transfer, blocks: int = 8) -> Iterator[Task]:
    """One transfer as tasks of so many blocks, for work that may end before the last one."""
    total = block_count(_hull(transfer.targets), _limit(transfer.dtype, _is_transposed(transfer.sources)))
    for number, first in enumerate(range(0, total, blocks)):
        piece = Slice(transfer, first, min(blocks, total - first))
        yield Task(number, (piece,), transfer.bytes_written * piece.blocks // total)


def _tasks_by_file(plan: Plan) -> list[Task]:
    """A task a target file, of all that it takes."""
    written, cut = once(volume_of), _BlockCounts()
    return [
        Task(
            number,
            tuple(Slice(part, 0, cut.blocks(part)) for part in parts),
            sum(written(part.targets) * part.dtype.itemsize for part in parts),
        )
        for number, parts in enumerate(plan.by_target())
    ]


def blocks_of(piece: Slice) -> Iterator[Box]:
    """The blocks of a slice, as boxes of the whole tensor."""
    return itertools.islice(block_boxes(piece.transfer), piece.first, piece.first + piece.blocks)


def block_boxes(transfer: Transfer) -> Iterator[Box]:
    """All blocks of a transfer, as boxes of the whole tensor."""
    return blocks(_hull(transfer.targets), _limit(transfer.dtype, _is_transposed(transfer.sources)))


class _BlockCounts:
    """The numbers of blocks of transfers, found once for those that share their places."""

    def __init__(self) -> None:
        self._wanted = once(_hull)
        self._transposed = once(_is_transposed)
        self._counts: dict[tuple[int, int], int] = {}

    def blocks(self, transfer: Transfer) -> int:
        """The number of blocks of a transfer that outlives this object."""
        wanted = self._wanted(transfer.targets)
        limit = _limit(transfer.dtype, self._transposed(transfer.sources))
        key = id(wanted), limit
        if key not in self._counts:
            self._counts[key] = block_count(wanted, limit)
        return self._counts[key]


def _hull(places: Sequence[Place]) -> Box:
    return hull([place.box for place in places])


def _is_transposed(sources: Sequence[Place]) -> bool:
    return any(place.view is not None and place.view.is_transposed for place in sources)


def _limit(dtype: DType, transposed: bool) -> int:
    """Elements of a block. One of a transposed tensor takes a little of every row of the source: larger is better."""
    return max(1, (TRANSPOSE_BYTES if transposed else BLOCK_BYTES) // dtype.itemsize)
