"""Whole tensors of files into arrays in memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import Given, memory_of, nothing_given
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
    given: Given = nothing_given,
) -> Iterator[tuple[TensorSpec, Array]]:
    """The tensors of files (those of the names beside each), each as the bytes of its content.

    They are in memory of their own, or in what is given. No two files may have a tensor of one name.
    `is_shared`: other processes read the files, too, so the page cache is used. `check` is called between requests and
    may raise to stop; `fill` reads. Raises TransferError.
    """
    records = {path: _records(path, names) for path, names in files.items()}
    specs = [record.spec for held in records.values() for record in held]
    memory = dict(memory_of(specs, given))
    pieces: list[Piece] = []
    for path, held in records.items():
        found = [piece for record in held for piece in _whole(path, record, memory[record.spec.name])]
        pieces += sorted(found, key=lambda piece: piece.start)
    with closing(Fetcher(is_shared=is_shared)) as fetcher:
        fill(fetcher, pieces, check)
    for spec in specs:
        yield spec, memory.pop(spec.name)


def _records(path: Path, names: Container[str] | None) -> list[TensorRecord]:
    """The tensors of a file that have one of the names. Raises TransferError."""
    try:
        header = read_header(path)
    except FormatError as error:
        raise TransferError(str(error)) from error
    return [record for name, record in header.tensors.items() if names is None or name in names]


def _whole(path: Path, record: TensorRecord, content: Array) -> Iterator[Piece]:
    """What all of a tensor's bytes are read from."""
    for start, length in record.segments:
        yield Piece(path, start, start + length, content[:length])
        content = content[length:]
