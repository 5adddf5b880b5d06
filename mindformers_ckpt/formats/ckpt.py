"""The `.ckpt` format of MindSpore.

A file is a concatenation of protobuf records, and may end in a CRC-32 trailer:

    Checkpoint  value = 1 (repeated)
    Value       tag = 1 (string)        tensor = 2 | maptensor = 3
    tensor      dims = 1 (int64, not packed)  tensor_type = 2 (string)  tensor_content = 3 (bytes)
    trailer     "crc_num" + 10 bytes, big-endian: the CRC-32 of all bytes before it

A tensor over 512 MiB is several records in a row, each with the tag and the full dims: its bytes cut every
536,870,912 (as `mindspore.save_checkpoint` writes it), or cut along dimension 0 by numpy.array_split (as its
asynchronous way writes it, at times with an empty last piece). Both are read, the first is written.
The records are parsed by hand because a protobuf library would copy the contents, gigabytes of them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import FormatError, TransferError
from mindformers_ckpt.formats.dtypes import DType, from_ckpt
from mindformers_ckpt.formats.tensor_file import (
    FileLayout,
    Header,
    Segment,
    TensorRecord,
    TensorSpec,
    check_names,
    describe_foreign_file,
    open_to_scan,
)

RECORD_LIMIT = 512 * 1024 * 1024

_VALUE = 0x0A
_TAG = 0x0A
_TENSOR = 0x12
_MAP_TENSOR = 0x1A
_DIMENSION = 0x08
_TYPE = 0x12
_CONTENT = 0x1A

_TRAILER_MARK = b"crc_num"
_TRAILER_SIZE = len(_TRAILER_MARK) + 10
_CIPHER_MARKS = (b"\xd8\x5e\x3a\x7f", b"\xd9\x5e\x3a\x7f", b"\xda\x5e\x3a\x7f")  # AES-GCM, AES-CBC, SM4-CBC

_WINDOW = 512
_HEAD_LIMIT = 1024 * 1024
_CRC_BLOCK = 4 * 1024 * 1024


def scan(path: Path) -> Header:
    """Read the heads of all records; contents are hopped over.

    `dims` of none or [0] are a scalar; [0] with an empty content is a tensor of shape (0,). The shape of a
    `str` is its bytes (MindSpore ignores the dims of one). A file cut off exactly between two tensors
    cannot be told from a complete one. Raises FormatError.
    """
    with open_to_scan(path) as (descriptor, size):
        scanner = _Scanner(path, descriptor, size)
        scanner.check_start()
        tensors = scanner.tensors()
        crc = scanner.trailer()
    return Header(path, "ckpt", size, tensors, {}, crc)


def layout(specs: Sequence[TensorSpec]) -> FileLayout:
    """Lay out the file that `mindspore.save_checkpoint` writes of the same tensors, byte for byte.

    Tensors of 0 elements are left out, as MindSpore does: its load_checkpoint takes a record of shape (0,)
    for a scalar. Raises FormatError when nothing is left (MindSpore loads no empty file), or a name cannot
    be written.
    """
    check_names(specs)
    frames: list[tuple[int, bytes]] = []
    tensors: dict[str, TensorRecord] = {}
    end = 0
    for spec in specs:
        nbytes = spec.nbytes
        segments = []
        for start in range(0, nbytes, RECORD_LIMIT):
            length = min(RECORD_LIMIT, nbytes - start)
            head = _encode_head(spec, length)
            frames.append((end, head))
            segments.append(Segment(end + len(head), length))
            end += len(head) + length
        if segments:
            tensors[spec.name] = TensorRecord(spec, tuple(segments))
    if not tensors:
        raise FormatError("a .ckpt file needs at least one tensor with elements")
    return FileLayout(end, tuple(frames), tensors)


def verify_crc(header: Header) -> None:
    """Compare the CRC-32 stored in a `.ckpt` with its bytes, reading the whole file.

    Raises FormatError on a mismatch, or when the file stores none.
    """
    if header.crc is None:
        raise FormatError(f"{header.path}: holds no CRC-32; it was saved without crc_check=True")
    found = _crc32(header.path, header.size - _TRAILER_SIZE)
    if found != header.crc:
        raise FormatError(
            f"{header.path}: damaged: the bytes have the CRC-32 {found:08x}, the file stores {header.crc:08x}; "
            "restore it from a good copy"
        )


def append_crc(path: Path) -> None:
    """Append the CRC-32 trailer that `mindspore.save_checkpoint(..., crc_check=True)` writes.

    Raises FormatError when the file is no `.ckpt` or has the trailer, TransferError when it cannot be written.
    """
    header = scan(path)
    if header.crc is not None:
        raise FormatError(f"{path}: has a CRC-32 trailer already")
    crc = _crc32(path, header.size)
    try:
        with path.open("ab") as file:
            file.write(_TRAILER_MARK + crc.to_bytes(10, "big"))
    except OSError as error:
        raise TransferError(f"{path}: cannot append the CRC-32: {error.strerror}") from error


class _Head(NamedTuple):
    """What stands before the content of a record. `start` is the byte at which the record begins."""

    start: int
    name: str
    dims: tuple[int, ...]
    type_name: str
    content: Segment


class _Malformed(Exception):
    """A record is no valid one; the message says what is wrong and where."""


class _Scanner:
    """One pass over the records of an open file."""

    __slots__ = ("_base", "_descriptor", "_last_good", "_path", "_position", "_size", "_window")

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._position = 0
        self._window = b""
        self._base = 0
        self._last_good: str | None = None

    def check_start(self) -> None:
        """Refuse encrypted and foreign files by their first bytes."""
        self._window = os.pread(self._descriptor, _WINDOW, 0)
        start = self._window
        if start.startswith(_CIPHER_MARKS):
            raise FormatError(
                f"{self._path}: the file is encrypted; save it again with "
                "mindspore.save_checkpoint(mindspore.load_checkpoint(file, dec_key=...), new_file)"
            )
        if start[0] == _VALUE or self._at_trailer():
            return
        if start[8:9] == b"{":
            kind = "it looks like a .safetensors file, then it should be named so"
        elif start[0] in b"\x08\x12{":
            kind = "it looks like a strategy file"
        else:
            kind = describe_foreign_file(start)
        raise FormatError(f"{self._path}: no MindSpore checkpoint: {kind}")

    def tensors(self) -> dict[str, TensorRecord]:
        """Join the records of each tensor, and check their bytes against its shape."""
        tensors: dict[str, TensorRecord] = {}
        spec: TensorSpec | None = None
        first: _Head | None = None
        segments: list[Segment] = []
        missing = 0
        for head in self._heads():
            if first is None or head.name != first.name:
                if missing and spec:
                    break
                if head.name in tensors:
                    raise self._fail(f"tensor {head.name!r} appears a second time", head.start)
                first, segments = head, []
                spec = self._spec(head)
                missing = spec.nbytes
            elif head.dims != first.dims or head.type_name != first.type_name:
                raise self._fail(f"the records of tensor {head.name!r} differ in dims or type", head.start)
            missing -= head.content.length
            if missing < 0:
                raise self._fail(f"{_describe(head)} holds {-missing} bytes too many", head.start)
            if head.content.length:
                segments.append(head.content)
            if not missing:
                tensors[head.name] = TensorRecord(spec, tuple(segments))
                self._last_good = head.name
        if missing and first:
            raise self._fail(f"{_describe(first)} lacks {missing} bytes", first.start)
        return tensors

    def trailer(self) -> int | None:
        """The CRC-32 stored after the records, None when they fill the file."""
        if self._position == self._size:
            return None
        crc = int.from_bytes(self._bytes_at(self._position, _TRAILER_SIZE)[len(_TRAILER_MARK) :], "big")
        if crc >> 32:
            raise self._fail("the CRC-32 trailer is damaged", self._position)
        return crc
