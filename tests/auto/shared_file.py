"""A file of which several ranks read the same runs and columns, and a reader that counts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.engine.into_memory import Piece
from mindformers_ckpt.job.cluster.secret import Trust

MIB = 1 << 20
SECRET = Trust("the secret of this job")


class Counted(Fetcher):
    """Counts the bytes that it reads, from a disk that lets it wait; `slow` seconds a request."""

    def __init__(self, slow: float = 0.0) -> None:
        super().__init__(is_shared=True)
        self.bytes, self.slow = 0, slow

    def scatter_warm(self, path: Path, start: int, parts: Sequence[memoryview]) -> bool:
        return False

    def scatter(self, path: Path, start: int, parts: Sequence[memoryview]) -> bool:
        self.bytes += sum(map(len, parts))
        time.sleep(self.slow)
        return super().scatter(path, start, parts)

    def has_to_wait(self, extents: Any) -> bool:
        return True


def pieces_of(file: Path, start: int = 0) -> tuple[list[Piece], list[Any]]:
    """Runs and columns of a file, and the arrays that they go to."""
    size = file.stat().st_size
    arrays = [np.zeros(5 * MIB, np.uint8), np.zeros((300, 100), np.uint8), np.zeros(size - 6 * MIB, np.uint8)]
    columns = Piece(file, 5 * MIB, 5 * MIB + 300 * 1000, arrays[1], (1000, 1))
    pieces = [Piece(file, start, 5 * MIB, arrays[0][start:]), columns, Piece(file, 6 * MIB, size, arrays[2])]
    return pieces, arrays


def assert_read(file: Path, arrays: Sequence[Any], start: int = 0) -> None:
    content = np.fromfile(file, np.uint8)
    assert (arrays[0][start:] == content[start : 5 * MIB]).all()
    assert (arrays[1] == content[5 * MIB : 5 * MIB + 300_000].reshape(300, 1000)[:, :100]).all()
    assert (arrays[2] == content[6 * MIB :]).all()
