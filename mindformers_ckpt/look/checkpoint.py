"""A checkpoint as arrays: whole tensors by name, read where they are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.look.arrays import numpy_type, to_part
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.objects.path import PathLike
from mindformers_ckpt.planning.build import held_boxes
from mindformers_ckpt.sources.checkpoint import Checkpoint as Files
from mindformers_ckpt.sources.shards import LogicalTensor
from mindformers_ckpt.sources.shards import Shard as FileShard
from mindformers_ckpt.strategy.given import StrategyLike
from mindformers_ckpt.strategy.model import Strategy

if TYPE_CHECKING:
    import numpy as np

    from mindformers_ckpt.look.blocks import WholeReader

    Array = np.ndarray[Any, np.dtype[Any]]


class Shard(NamedTuple):
    """A box of a tensor, the file that holds it, and all ranks whose files do.

    `ranks` begins with the one whose file is read; `box` has `start`, `stop` and `shape`.
    """

    box: Box
    ranks: tuple[int, ...]
    path: Path


class Tensor:
    """A whole tensor of a checkpoint, however it is cut over ranks and files. Nothing is read before it is indexed.

    `tensor[0:8]` is a numpy array of the first 8 rows, and just their bytes are read; `tensor[...]` and
    `numpy.asarray(tensor)` are all of it. Indices are integers, slices and `...`.
    """

    def __init__(self, checkpoint: Checkpoint, found: LogicalTensor) -> None:
        self._checkpoint = checkpoint
        self._found = found

    @property
    def name(self) -> str:
        """Its name in the files."""
        return self._found.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._found.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type; bfloat16 and fp8 are those of ml_dtypes. Types that numpy lacks (hifloat8) are their bytes."""
        return numpy_type(self._found.spec.dtype)

    @property
    def dtype_name(self) -> str:
        """MindSpore's name of the element type, like "bfloat16"."""
        return self._found.spec.dtype.name

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self._found.spec.nbytes

    @property
    def layout(self) -> Layout | None:
        """How it is cut over the ranks of a stage; None where no strategy names it: every holder has all of it."""
        return self._found.layout

    @property
    def stages(self) -> tuple[int, ...]:
        """The pipeline stages that hold it."""
        return self._found.stages

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The distinct boxes, in order, each with all ranks that hold it."""
        holders: dict[Box, list[int]] = {}
        for rank, box in self._checkpoint.boxes(self.name).items():
            holders.setdefault(box, []).append(rank)
        return tuple(
            Shard(
                shard.box,
                (shard.rank, *(rank for rank in holders.get(shard.box, ()) if rank != shard.rank)),
                shard.path,
            )
            for shard in self._found.shards
        )

    def __getitem__(self, index: Any) -> Array:
        """Read a part, as a numpy array of its own.

        Raises IndexError, PlanError when no file holds some of it, TransferError.
        """
        import numpy as np

        part, rest = to_part(index, self.shape)
        carried = np.empty(part.shape, self._found.spec.dtype.carrier)
        self._checkpoint._read(self._found, part, carried)
        array: Array = carried.view(self.dtype)[rest]
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All of it, for numpy."""
        if copy is False:
            raise ValueError(f"{self.name} is in files: it cannot be an array without a copy")
        array = self[...]
        return array if dtype is None else array.astype(dtype)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self.name} is a scalar, which has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<{self.name}: {self.dtype_name}{list(self.shape)}, {len(self._found.shards)} shards>"


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on a disk as whole tensors by name, whatever its files, format and strategy.

    A mapping: `len`, `in`, `.keys()`, `.items()`. Headers of the files are read, contents where they are asked for.
    Files stay open until `close`, or the end of a `with` block.
    """

    def __init__(self, files: Files) -> None:
        self._source = files
        self._tensors = files.tensors()
        self._reader: WholeReader | None = None

    @property
    def path(self) -> Path:
        """The file or folder."""
        return self._source.files.root

    @property
    def kind(self) -> str:
        """What it is, in words: "complete weights", "rank folders", "a Hugging Face model", "a checkpoint 2.0", …"""
        return self._source.files.kind.value

    @property
    def strategy(self) -> Strategy:
        """The strategy that it was saved under; `is_complete` for complete weights."""
        return self._source.strategy

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that have files."""
        return tuple(sorted(self._source.files.by_rank))

    @property
    def files(self) -> Mapping[int, tuple[Path, ...]]:
        """Rank -> its files."""
        return self._source.files.by_rank

    @property
    def warnings(self) -> tuple[str, ...]:
        """What you should know of choices that were made."""
        return self._source.warnings

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by name. Nothing is read. Raises KeyError."""
        return Tensor(self, self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def boxes(self, name: str) -> dict[int, Box]:
        """The ranks whose files hold a tensor, each with its box."""
        return held_boxes(self._source, name, self._tensors[name])

    def shard(self, rank: int, name: str) -> Array:
        """What the file of a rank holds of a tensor, as an array. Raises KeyError when it holds nothing of it."""
        import numpy as np

        if not self._source.holds(rank, name):
            raise KeyError(f"{name} is not in the files of rank {rank}")
        path, record = self._source.records_of(rank)[name]
        carried = np.empty(record.spec.shape, record.spec.dtype.carrier)
        whole = Box.whole(record.spec.shape)
        self._open().read_shard(FileShard(rank, path, whole), record.spec, whole, carried)
        return carried.view(numpy_type(record.spec.dtype))

    def close(self) -> None:
        """Close the files that were opened."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {self.kind}, {len(self)} tensors, {self.strategy.describe()}>"

    def _read(self, tensor: LogicalTensor, part: Box, out: Array) -> None:
        """Fill an array of carriers with a part of a tensor."""
        lost = tensor.lost(part)
        if lost:
            raise PlanError(lost[0])
        self._open().read_into(tensor, part, out)

    def _open(self) -> WholeReader:
        if self._reader is None:
            from mindformers_ckpt.look.blocks import WholeReader

            self._reader = WholeReader(self._source)
            weakref.finalize(self, self._reader.close)  # for who does not close it
        return self._reader


def open_checkpoint(path: PathLike, strategy: StrategyLike = None, *, step: str | None = None) -> Checkpoint:
    """Open a checkpoint: rank folders, complete weights, a Hugging Face model, or a distributed one (2.0, DCP, …).

        with mc.open_checkpoint("checkpoint/llama", "checkpoint/llama/strategy") as checkpoint:
            checkpoint["model.layers.3.attention.wq.weight"].shape
            checkpoint["model.layers.3.attention.wq.weight"][0:8]

    `strategy` is that of its rank folders, `step` chooses among several files ("3_150", or a file's name).
    Headers are read only. Raises PlanError when files and strategy do not go together, or a folder holds several
    checkpoints; FormatError for damaged files, StrategyError for the strategy.
    """
    return Checkpoint(checkpoint_at(path, strategy, step))
