"""Proofs of finished tasks: a digest of all bytes that a task wrote, and where; compared again when a run is resumed.

The journal of a run that died says what was finished. Whether that is still in the staging files is found by reading
it back: a task is run once more on a reader without contents, and a sink that reads what it should write.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import PIECE_BYTES, empty_bytes
from mindformers_ckpt.engine.copier import Copier, new_hash
from mindformers_ckpt.engine.descriptors import Descriptors, file_ranges, fill
from mindformers_ckpt.engine.reader import S, cuts
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.engine.tasks import Task
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.model import Place, TargetFile

if TYPE_CHECKING:
    import numpy as np


class ProvingSink(FileSink):
    """Writes target files, and takes a digest of what it writes, for `proof`."""

    def __init__(self, folder: Path, files: Sequence[TargetFile], *, drops: bool = False) -> None:
        super().__init__(folder, files, drops=drops)
        self._digest = new_hash()
        self._last: tuple[memoryview, int] | None = None

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        super().write(file, name, start, data)
        self._note(file, start, data)

    def proof(self) -> str:
        """The digest of all that was written since it was asked for last."""
        digest, self._digest, self._last = self._digest.hexdigest(), new_hash(), None
        return str(digest)

    def _note(self, file: int, start: int, data: memoryview) -> None:
        if self._last is None or self._last[0] is not data:  # replicas get one piece, one after the other
            import xxhash

            self._last = data, xxhash.xxh3_64_intdigest(data)
        self._digest.update(struct.pack("<qqqQ", file, start, len(data), self._last[1]))


class _ReadBackSink(ProvingSink):
    """Reads what it should write, and takes a digest of that."""

    def __init__(self, folder: Path, files: Sequence[TargetFile]) -> None:
        super().__init__(folder, files)
        self._descriptors = Descriptors(os.O_RDONLY)
        self._buffer = empty_bytes(PIECE_BYTES).data

    def write(self, file: int, name: str, start: int, data: memoryview) -> None:
        if len(self._buffer) < len(data):
            self._buffer = empty_bytes(len(data)).data
        found = rest = self._buffer[: len(data)]
        path = self.path(file)
        for offset, length in file_ranges(self.layout(file).tensors[name].segments, start, len(data)):
            fill(self._descriptors.get(path), path, offset, rest[:length])
            rest = rest[length:]
        self._note(file, start, found)


class _NoReader:
    """Stands in for the source where contents do not matter."""

    def ahead(self, task: int, steps: Iterator[S], following: tuple[int, Iterator[S]] | None) -> Iterator[S]:
        """The steps of a task as they are."""
        return steps

    def read(self, place: Place, name: str, dtype: DType, part: Box, out: np.ndarray[Any, Any]) -> None:
        """Leave the array as it is."""

    def held(self, place: Place, name: str, dtype: DType, part: Box) -> None:
        """Nothing was read."""

    def stream(self, place: Place, name: str, dtype: DType, start: int, length: int, lead: int) -> Iterator[memoryview]:
        """Pieces as those of `ShardReader.stream`, of any contents."""
        piece = empty_bytes(PIECE_BYTES).data
        for count in cuts(length, lead):
            yield piece[:count]

    def close(self) -> None:
        """Nothing was opened."""


def is_proved(
    proofs: Sequence[tuple[Task, str]], folder: Path, files: Sequence[TargetFile], check: Callable[[], None]
) -> list[bool]:
    """Whether the files under `folder` hold what each task wrote, by its proof. `check` is called between blocks."""
    found = []
    with closing(Copier((), _ReadBackSink(folder, files), reader=_NoReader())) as copier:
        for task, proof in proofs:
            try:
                found.append(copier.repeat(task, check).proof == proof != "")
            except TransferError:  # a file is gone, or shorter
                found.append(False)
                copier.forget()
    return found
