"""Runs a plan: streams bytes from source files to target files.

Work is cut into tasks by output bytes, so that one huge tensor is spread over processes like a thousand
small ones. Every tensor is copied block by block; a block of source bytes is read once and goes to all
target files that take a part of it. Nothing here knows of strategies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.box import Box, are_disjoint, block_count, blocks, hull, offset_in
from mindformers_ckpt.buffers import empty_bytes
from mindformers_ckpt.formats import DType
from mindformers_ckpt.plan import Plan, SourceFile, Transfer, View
from mindformers_ckpt.shard_io import BLOCK_BYTES, TRANSPOSE_BYTES, ShardReader, Sink, target_runs

if TYPE_CHECKING:
    import numpy as np

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


class Done(NamedTuple):
    """What a finished task reports."""

    task: int
    bytes_written: int
    hashes: tuple[TensorHash, ...]

    def to_json(self) -> list[Any]:
        """The report as JSON values, for the journal of a run."""
        return [self.task, self.bytes_written, self.hashes]

    @classmethod
    def from_json(cls, value: Any) -> Done:
        """Undo `to_json`. Raises ValueError for anything else."""
        try:
            task, written, hashes = value
            return cls(int(task), int(written), tuple(TensorHash(*entry) for entry in hashes))
        except TypeError as error:
            raise ValueError(f"not the record of a task: {value!r}") from error


def cut_into_tasks(plan: Plan, *, by_rank: bool = False, whole_tensors: bool = False) -> list[Task]:
    """Cut a plan into tasks: by output bytes, or one a target file (`by_rank`).

    With `whole_tensors` no tensor is cut over two tasks, as content hashes need it.
    The cut depends on the plan alone, so that an interrupted run can be resumed.
    """
    if by_rank:
        parts = [plan.for_targets([file]) for file in range(len(plan.targets))]
        return [Task(number, tuple(_slices(part.transfers)), part.bytes_written) for number, part in enumerate(parts)]
    size = max(_SMALLEST_TASK, min(_LARGEST_TASK, plan.bytes_written // _TASKS))
    tasks: list[Task] = []
    pending: list[Slice] = []
    held = 0
    for transfer in plan.transfers:
        total = block_count(_wanted(transfer), _block_elements(transfer))
        cost = transfer.bytes_written / max(total, 1)
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


def _slices(transfers: Sequence[Transfer]) -> Iterator[Slice]:
    for transfer in transfers:
        yield Slice(transfer, 0, block_count(_wanted(transfer), _block_elements(transfer)))


def _wanted(transfer: Transfer) -> Box:
    return hull([place.box for place in transfer.targets])


def _block_elements(transfer: Transfer) -> int:
    """A block of a transposed tensor takes a little of every row of the source, so there had better be few."""
    transposed = any(place.view is not None and place.view.is_transposed for place in transfer.sources)
    return max(1, (TRANSPOSE_BYTES if transposed else BLOCK_BYTES) // transfer.dtype.itemsize)


def _is_cut_by_rows(transfer: Transfer) -> bool:
    """Whether sources and targets are cut along the first dimension only: all they share are single runs of both.

    Not where target boxes overlap without being equal, of which the common part would be read twice.
    """
    by_rows = bool(transfer.shape) and all(
        place.is_plain and place.box.shape[1:] == transfer.shape[1:] for place in (*transfer.sources, *transfer.targets)
    )
    return by_rows and are_disjoint(list({place.box for place in transfer.targets}))


class Copier:
    """Copies slices of transfers from source shards to a sink. Holds the buffers and the open files."""

    def __init__(self, sources: Sequence[SourceFile], sink: Sink, *, hashes: bool = False) -> None:
        self._reader = ShardReader(sources)
        self._sink = sink
        self._hashes = hashes
        self._buffers: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def run(self, task: Task, check: Callable[[], None] = lambda: None) -> Done:
        """Copy all blocks of a task; `check` is called between blocks and may raise to stop."""
        hashes: list[TensorHash] = []
        for piece in task.slices:
            hashes += self._copy(piece, check)
        return Done(task.number, task.bytes_written, tuple(hashes))

    def close(self) -> None:
        self._reader.close()

    def _copy(self, piece: Slice, check: Callable[[], None]) -> list[TensorHash]:
        transfer = piece.transfer
        takers: dict[tuple[Box, View | None], list[int]] = {}
        for place in transfer.targets:
            takers.setdefault((place.box, place.view), []).append(place.file)
        # A tensor in several places of a file is not written in its order, so it has no digest.
        digests: dict[tuple[Box, View | None], Any] = {}
        if self._hashes:
            digests = {taker: _new_hash() for taker in takers if taker[1] is None}
        straight = not self._hashes and _is_cut_by_rows(transfer)
        wanted, limit = _wanted(transfer), _block_elements(transfer)
        for number, block in enumerate(blocks(wanted, limit)):
            if number < piece.first:
                continue
            if number >= piece.first + piece.blocks:
                break
            check()
            if straight:
                self._copy_rows(transfer, block, takers)
            else:
                self._copy_block(transfer, block, takers, digests)
        return [
            TensorHash(file, transfer.name, digest.hexdigest())
            for taker, digest in digests.items()
            for file in takers[taker]
        ]

    def _copy_rows(self, transfer: Transfer, block: Box, takers: dict[tuple[Box, View | None], list[int]]) -> None:
        """Copy what each target takes of each source as one run, in pieces small enough to stay in a core's cache."""
        for (box, _), files in takers.items():
            wanted = box.intersect(block)
            if wanted is None:
                continue
            for place in transfer.sources:
                part = place.box.intersect(wanted)
                if part is None:
                    continue
                position = offset_in(part, box) * transfer.dtype.itemsize
                for piece in self._reader.stream(place, transfer.name, transfer.dtype, part):
                    for file in files:
                        self._sink.write(file, transfer.name, position, piece)
                    position += len(piece)

    def _copy_block(
        self,
        transfer: Transfer,
        block: Box,
        takers: dict[tuple[Box, View | None], list[int]],
        digests: dict[tuple[Box, View | None], Any],
    ) -> None:
        dtype = transfer.dtype
        array = self._array("block", dtype, block.shape)
        for place in transfer.sources:
            part = place.box.intersect(block)
            if part is not None:
                self._reader.read(place, transfer.name, dtype, part, array[part.relative_to(block).slices()])
        for (box, view), files in takers.items():
            part = box.intersect(block)
            if part is None:
                continue
            content = array[part.relative_to(block).slices()]
            if not content.flags.c_contiguous:
                gathered = self._array("gathered", dtype, part.shape)
                gathered[...] = content
                content = gathered
            data = content.reshape(-1).view("u1").data
            if (box, view) in digests:
                digests[box, view].update(data)
            for start, count in target_runs(view, offset_in(part, box), part.volume):
                piece, data = data[: count * dtype.itemsize], data[count * dtype.itemsize :]
                for file in files:
                    self._sink.write(file, transfer.name, start * dtype.itemsize, piece)

    def _array(self, purpose: str, dtype: DType, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[Any]]:
        """An array in a buffer that is used again and again: fresh memory would cost a page fault every 4 KiB."""
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(purpose)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[purpose] = empty_bytes(max(size, BLOCK_BYTES))
        return buffer[:size].view(dtype.carrier).reshape(shape)


def _new_hash() -> Any:
    import xxhash

    return xxhash.xxh3_128()
