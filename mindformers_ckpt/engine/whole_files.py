"""Whole tensors of files into arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import empty_bytes
from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.engine.into_memory import Fill, Piece, fill_arrays
from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.formats import TensorRecord, TensorSpec, read_header

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]


def read_file(path: Path, names: Container[str] | None = None) -> Iterator[tuple[TensorSpec, Array]]:
    """The tensors of a file (those of `names`), each as the bytes of its content in memory of its own.

    Raises TransferError.
    """
    return read_files({path: names}, lambda: None)


def read_files(
    files: Mapping[Path, Container[str] | None],
    check: Callable[[], None],
    *,
    is_shared: bool = True,
    fill: Fill = fill_arrays,
) -> Iterator[tuple[TensorSpec, Array]]:
    """The tensors of files (those of the names beside each), each as the bytes of its content in memory of its own.

    `is_shared`: other processes read the files, too, so the page cache is used. `check` is called between requests and
    may raise to stop; `fill` reads. Raises TransferError.
    """
    tensors: list[tuple[TensorSpec, Array]] = []
    pieces = []
    for path, names in files.items():
        try:
            header = read_header(path)
        except FormatError as error:
            raise TransferError(str(error)) from error
        found: list[Piece] = []
        for record in header.tensors.values():
            if names is None or record.spec.name in names:
                content = empty_bytes(record.spec.nbytes)
                tensors.append((record.spec, content))
                found += _whole(path, record, content)
        pieces += sorted(found, key=lambda piece: piece.start)
    with closing(Fetcher(is_shared=is_shared)) as fetcher:
        fill(fetcher, pieces, check)
    yield from tensors


def _whole(path: Path, record: TensorRecord, content: Array) -> Iterator[Piece]:
    """What all of a tensor's bytes are read from."""
    for start, length in record.segments:
        yield Piece(path, start, start + length, content[:length])
        content = content[length:]
