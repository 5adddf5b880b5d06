"""Compares what transfers would copy with what is there, bit by bit: each byte is read once, on both sides."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.engine.parts import Scratch, read_parts
from mindformers_ckpt.engine.reader import Read, ShardReader
from mindformers_ckpt.engine.tasks import Task, blocks_of
from mindformers_ckpt.engine.ways import Way, Ways
from mindformers_ckpt.formats import Header, Segment
from mindformers_ckpt.geometry.box import Box, blocks, offset_in
from mindformers_ckpt.look.holders import ContentReader, first_difference
from mindformers_ckpt.planning.model import SourceFile, Transfer

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# Where the bytes of a tensor of a target file are, and who is told: file, tensor, first byte that differs, how many do.
Contents = Callable[[int, str], "tuple[Path, Sequence[Segment]]"]
Note = Callable[[int, str, int, int], None]
# What is compared at once of runs, and read of columns: large enough that Python's part in it is small, small enough
# to be in a cache of the processor until it is compared.
_RUN_BYTES, _BLOCK_BYTES = 2 << 20, 8 << 20


class _Step(NamedTuple):
    """A block that is to be compared."""

    transfer: Transfer
    way: Way
    block: Box

    def reads(self) -> Iterator[Read]:
        for place, part in self.way.parts(self.block):
            yield Read(place, self.transfer.name, self.transfer.dtype, part)


class Comparer:
    """Compares slices of transfers, whose targets are plain, with the contents of target files; for one thread."""

    def __init__(
        self,
        sources: Sequence[SourceFile],
        headers: Mapping[int, Header],
        contents: Contents,
        note: Note,
        fetcher: Fetcher | None = None,
    ) -> None:
        """`headers` are those of source files that need not be read once more, by their numbers.

        `fetcher` has the source files open, as for a `ShardReader`.
        """
        self._reader = ShardReader(sources, fetcher, headers, piece_bytes=_RUN_BYTES)
        self._there = ContentReader()
        self._contents, self._note = contents, note
        self._ways, self._scratch = Ways(by_rows=True), Scratch()

    def run(self, task: Task, check: Callable[[], None], following: Task | None = None) -> None:
        """Compare all blocks of a task; `check` is called between blocks and may raise to stop.

        `following` is the task that is likely to be next: some of it may be read already.
        """
        ahead = None if following is None else (following.number, self._steps(following))
        for step in self._reader.ahead(task.number, self._steps(task), ahead):
            check()
            (self._compare_rows if step.way.is_by_rows else self._compare_block)(*step)

    def _steps(self, task: Task) -> Iterator[_Step]:
        for piece in task.slices:
            way = self._ways.of(piece.transfer)
            for block in blocks_of(piece):
                parts = (
                    (block,) if way.is_by_rows else blocks(block, max(1, _BLOCK_BYTES // piece.transfer.dtype.itemsize))
                )
                for part in parts:
                    yield _Step(piece.transfer, way, part)

    def close(self) -> None:
        """Close the files that were opened."""
        self._reader.close()
        self._there.close()

    def _compare_rows(self, transfer: Transfer, way: Way, block: Box) -> None:
        """Compare runs of both sides, in pieces small enough to stay in a core's cache."""
        import numpy as np

        name = transfer.name
        for place, start, length, runs in way.readings(block):
            left = deque(runs)
            run, done = left.popleft(), 0
            for data in self._reader.stream(place, name, transfer.dtype, start, length, _RUN_BYTES):
                values = np.frombuffer(data, np.uint8)
                while len(values):
                    if done == run.length:
                        run, done = left.popleft(), 0
                    expected = values[: run.length - done]
                    for file in run.files:
                        there = self._there.read(*self._contents(file, name), run.in_target + done, len(expected))
                        self._compare(file, name, run.in_target + done, there, expected)
                    done, values = done + len(expected), values[len(expected) :]

    def _compare_block(self, transfer: Transfer, way: Way, block: Box) -> None:
        """Compare what each target takes of a block with its file, where the block was read."""
        held = read_parts(self._reader, transfer, way.parts(block), self._scratch)
        for (box, _), files, part, copies in way.takes(block, False):
            start = offset_in(part, box) * transfer.dtype.itemsize
            # As a copy, which stays in the cache: comparing rows that lie apart takes longer.
            (gathered,) = self._scratch.arrays("gathered", transfer.dtype, [part.shape])
            for number, where, here in copies:
                gathered[here] = held[number][1][where]
            expected = gathered.reshape(-1).view("u1")
            for file in files:
                there = self._there.read(*self._contents(file, transfer.name), start, len(expected))
                self._compare(file, transfer.name, start, there, expected)

    def _compare(self, file: int, name: str, start: int, there: Array, expected: Array) -> None:
        import numpy as np

        first = first_difference(there, expected)
        if first is not None:
            self._note(file, name, start + first, int(np.count_nonzero(there != expected)))
