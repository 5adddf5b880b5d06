"""Whole tensors out of the shards of a checkpoint, block by block: the contents, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import BLOCK_BYTES, empty_bytes
from mindformers_ckpt.engine.reader import ShardReader
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import Box, blocks
from mindformers_ckpt.planning.model import Place, SourceFile
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.shards import LogicalTensor, Shard

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


class WholeReader:
    """Reads the blocks of a checkpoint's whole tensors, for one thread at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        paths = list(dict.fromkeys(checkpoint.files.files))
        self._numbers = {path: number for number, path in enumerate(paths)}
        self._reader = ShardReader([SourceFile(path, checkpoint.size_of(path)) for path in paths])
        self._buffer: Array | None = None

    def blocks(self, tensor: LogicalTensor) -> Iterator[tuple[Box, Array]]:
        """The blocks of a tensor in its row-major order, each contiguous, in memory that the next one uses again.

        The arrays are of the type's carrier. Raises TransferError.
        """
        spec = tensor.spec
        for block in blocks(Box.whole(spec.shape), max(1, BLOCK_BYTES // spec.dtype.itemsize)):
            yield block, self.read(tensor, block)

    def read(self, tensor: LogicalTensor, block: Box) -> Array:
        """A part of a tensor of at most BLOCK_BYTES, in memory that the next one uses again."""
        if self._buffer is None:
            self._buffer = empty_bytes(BLOCK_BYTES)
        spec = tensor.spec
        out = self._buffer[: block.volume * spec.dtype.itemsize].view(spec.dtype.carrier).reshape(block.shape)
        self.read_into(tensor, block, out)
        return out

    def read_into(self, tensor: LogicalTensor, part: Box, out: Array) -> None:
        """A part of a tensor into an array of its shape, and of the type's carrier."""
        for shard in tensor.shards:
            common = shard.box.intersect(part)
            if common is not None:
                self.read_shard(shard, tensor.spec, common, out[common.relative_to(part).slices()])

    def read_shard(self, shard: Shard, spec: TensorSpec, part: Box, out: Array) -> None:
        """A part of one shard of a tensor into an array."""
        place = Place(self._numbers[shard.path], shard.box, shard.tensor)
        self._reader.read(place, spec.name, spec.dtype, part, out)

    def close(self) -> None:
        """Close the files that were opened."""
        self._reader.close()
