"""Runs the tasks of a plan: streams bytes from source files to target files.

Every tensor is copied block by block; a block of source bytes is read once and goes to all target files that take a
part of it. Nothing here knows of strategies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.checksums.shares import share_of_run
from mindformers_ckpt.engine.buffers import PIECE_BYTES
from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.engine.parts import Scratch, read_parts
from mindformers_ckpt.engine.reader import Read, Reader, ShardReader
from mindformers_ckpt.engine.sinks import Sink
from mindformers_ckpt.engine.source_shares import Cuts, SourceShares
from mindformers_ckpt.engine.tasks import Done, Slice, Task, TensorHash, TensorShare, blocks_of
from mindformers_ckpt.engine.views import target_runs
from mindformers_ckpt.engine.ways import Run, Way, Ways
from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box, offset_in
from mindformers_ckpt.planning.model import SourceFile, View

if TYPE_CHECKING:
    import numpy as np


class _Piece:
    """A slice of a transfer while it is copied: who takes what, and the digests of what was taken."""

    def __init__(self, piece: Slice, way: Way, hashes: bool) -> None:
        self._slice = piece
        self.transfer, self.way = piece.transfer, way
        # A tensor in several places of a file is not written in its order, so it has no digest.
        self.digests: dict[tuple[Box, View | None], Any] = {}
        if hashes:
            self.digests = {taker: new_hash() for taker in way.takers if taker[1] is None}
        self.share = 0  # of what was copied in the checksum of the whole tensor, where fingerprints are taken
        self.is_rearranged = not all(place.is_plain for place in piece.transfer.sources)

    def blocks(self) -> Iterator[Box]:
        """The blocks of the slice."""
        return blocks_of(self._slice)

    def tensor_share(self) -> TensorShare:
        return TensorShare(self.transfer.targets[0].file, self.transfer.name, self.share)

    def hashes(self) -> Iterator[TensorHash]:
        for taker, digest in self.digests.items():
            for file in self.way.takers[taker]:
                yield TensorHash(file, self.transfer.name, digest.hexdigest())


class _Step(NamedTuple):
    """A block that is to be copied."""

    piece: _Piece
    block: Box

    def reads(self) -> Iterator[Read]:
        transfer = self.piece.transfer
        for place, part in self.piece.way.parts(self.block):
            yield Read(place, transfer.name, transfer.dtype, part)


def _steps(pieces: Sequence[_Piece]) -> Iterator[_Step]:
    for piece in pieces:
        for block in piece.blocks():
            yield _Step(piece, block)


class Copier:
    """Copies slices of transfers from source shards to a sink. Holds the buffers and the open files."""

    def __init__(
        self,
        sources: Sequence[SourceFile],
        sink: Sink,
        *,
        hashes: bool = False,
        counted: Cuts | None = None,
        reader: Reader | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        """`counted`: checksums of result and source are counted (see `SourceShares`)."""
        self._of_sources = None if counted is None else SourceShares(counted)
        self._reader = ShardReader(sources, fetcher, shares=self._of_sources) if reader is None else reader
        self._sink = sink
        self._hashes = hashes
        self._ways = Ways(by_rows=not hashes)
        self._pieces: dict[int, list[_Piece]] = {}  # of the task that comes next
        self._scratch = Scratch()

    def run(self, task: Task, check: Callable[[], None] = lambda: None, following: Task | None = None) -> Done:
        """Copy all blocks of a task; `check` is called between blocks and may raise to stop.

        `following` is the task that is likely to be run next: some of it may be read already.
        """
        return self.repeat(task, check, following)

    def repeat(self, task: Task, check: Callable[[], None], following: Task | None = None) -> Done:
        """`run`, under another name where nothing is copied: with a reader or a sink that only stands in for one."""
        pieces = self._pieces.pop(task.number, None) or self._pieces_of(task)
        self._pieces.clear()
        ahead = None
        if following is not None:
            self._pieces[following.number] = self._pieces_of(following)
            ahead = following.number, _steps(self._pieces[following.number])
        for step in self._reader.ahead(task.number, _steps(pieces), ahead):
            check()
            (self._copy_rows if step.piece.way.is_by_rows else self._copy_block)(step.piece, step.block)
        self._sink.end_task()
        hashes = tuple(found for piece in pieces for found in piece.hashes())
        shares = () if self._of_sources is None else tuple(piece.tensor_share() for piece in pieces)
        sources = () if self._of_sources is None else self._of_sources.take()
        return Done(task.number, task.bytes_written, hashes, self._sink.proof(), shares, sources)

    def _pieces_of(self, task: Task) -> list[_Piece]:
        return [_Piece(piece, self._ways.of(piece.transfer), self._hashes) for piece in task.slices]

    def forget(self) -> None:
        """Forget what a task that failed wrote."""
        self._sink.proof()

    def close(self) -> None:
        """Close the files that were opened, also those of the sink."""
        self._reader.close()
        self._sink.close()

    def _copy_rows(self, piece: _Piece, block: Box) -> None:
        """Copy what each target takes of each source as one run, in pieces small enough to stay in a core's cache."""
        name, dtype = piece.transfer.name, piece.transfer.dtype
        for place, start, length, runs in piece.way.readings(block):
            first, lead, done = runs[0], PIECE_BYTES, 0
            if length > PIECE_BYTES:  # otherwise it is one piece
                lead -= self._sink.offset(first.files[0], name, first.in_target) % PIECE_BYTES
            for data in self._reader.stream(place, name, dtype, start, length, lead):
                if len(runs) == 1:
                    self._write_run(piece, first, done, data)
                    done += len(data)
                    continue
                for run in runs:
                    self._write_run(piece, run, 0, data[: run.length])
                    data = data[run.length :]

    def _write_run(self, piece: _Piece, run: Run, done: int, data: memoryview) -> None:
        """Give the bytes of a run from `done` on to the files that take it."""
        self._count(piece, run.in_whole + done, data)  # while it is in the cache of the core
        for file in run.files:
            self._sink.write(file, piece.transfer.name, run.in_target + done, data)

    def _copy_block(self, piece: _Piece, block: Box) -> None:
        transfer = piece.transfer
        held = read_parts(self._reader, transfer, piece.way.parts(block), self._scratch)
        if self._of_sources is not None:
            for (place, taken), (_, content) in zip(piece.way.parts(block), held):
                if piece.is_rearranged and place.compute is None:  # what is computed from is counted where it is read
                    self._of_sources.add(place, transfer.name, taken, content)
            held = self._counted(piece, block, held)
        arrays = [array for _, array in held]
        for taker, files, part, copies in piece.way.takes(block, len(held) == 1 and held[0][0] == block):
            data = self._gathered(part.shape, copies, arrays, transfer.dtype).reshape(-1).view("u1").data
            if taker in piece.digests:
                piece.digests[taker].update(data)
            self._write_block(piece, taker, part, data, files)

    def _write_block(
        self, piece: _Piece, taker: tuple[Box, View | None], part: Box, data: memoryview, files: Sequence[int]
    ) -> None:
        """Give a part of a tensor to the files that take it, run by run."""
        (box, view), itemsize = taker, piece.transfer.dtype.itemsize
        for start, count in target_runs(view, offset_in(part, box), part.volume):
            run, data = data[: count * itemsize], data[count * itemsize :]
            for file in files:
                self._sink.write(file, piece.transfer.name, start * itemsize, run)

    def _counted(
        self, piece: _Piece, block: Box, held: list[tuple[Box, np.ndarray[Any, np.dtype[Any]]]]
    ) -> list[tuple[Box, np.ndarray[Any, np.dtype[Any]]]]:
        """Count a block, which is one run of the whole tensor; its parts are put together for that."""
        transfer = piece.transfer
        if len(held) > 1:
            (content,) = self._scratch.arrays("counted", transfer.dtype, [block.shape])
            for box, array in held:
                content[box.relative_to(block).slices()] = array
            held = [(block, content)]
        for box, array in held:
            start = offset_in(box, Box.whole(transfer.shape)) * transfer.dtype.itemsize
            self._count(piece, start, array.reshape(-1).view("u1").data)
        return held

    def _count(self, piece: _Piece, start: int, data: memoryview) -> None:
        """Add a run of bytes of the whole tensor to its checksum."""
        if self._of_sources is not None:
            transfer = piece.transfer
            piece.share ^= share_of_run(data, start, math.prod(transfer.shape) * transfer.dtype.itemsize)

    def _gathered(
        self,
        shape: tuple[int, ...],
        copies: Sequence[tuple[int, tuple[slice, ...], tuple[slice, ...]]],
        arrays: Sequence[np.ndarray[Any, np.dtype[Any]]],
        dtype: DType,
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """The elements of a part, contiguous: where they were read, if they are so there."""
        if len(copies) == 1:
            ((number, there, _),) = copies
            content: np.ndarray[Any, np.dtype[Any]] = arrays[number][there]
            if content.flags.c_contiguous:
                return content
        (gathered,) = self._scratch.arrays("gathered", dtype, [shape])
        for number, there, here in copies:
            gathered[here] = arrays[number][there]
        return gathered


def new_hash() -> Any:
    import xxhash

    return xxhash.xxh3_128()
