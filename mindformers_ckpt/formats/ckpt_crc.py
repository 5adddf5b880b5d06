"""The CRC-32 of all its bytes that a `.ckpt` file may end in."""

from __future__ import annotations

import zlib
from pathlib import Path

from mindformers_ckpt.errors import FormatError, TransferError, system_errors
from mindformers_ckpt.formats.ckpt import TRAILER_MARK, TRAILER_SIZE, scan
from mindformers_ckpt.formats.tensor_file import Header, open_to_read
from mindformers_ckpt.objects.reading import pread

_CRC_BLOCK = 4 * 1024 * 1024


def verify_crc(header: Header) -> None:
    """Compare the CRC-32 stored in a `.ckpt` with its bytes, reading the whole file.

    Raises FormatError on a mismatch, or when the file stores none.
    """
    if header.crc is None:
        raise FormatError(f"{header.path}: has no CRC-32 trailer; it was saved without crc_check=True")
    found = _crc32(header.path, header.size - TRAILER_SIZE)
    if found != header.crc:
        raise FormatError(
            f"{header.path}: damaged: the bytes have the CRC-32 {found:08x}, the file stores "
            f"{header.crc:08x}; restore it from a good copy"
        )


def append_crc(path: Path) -> None:
    """Append the CRC-32 trailer that `mindspore.save_checkpoint(..., crc_check=True)` writes.

    Raises FormatError when the file is no `.ckpt` or has the trailer already, TransferError when it cannot
    be written.
    """
    header = scan(path)
    if header.crc is not None:
        raise FormatError(f"{path}: has a CRC-32 trailer already")
    crc = _crc32(path, header.size)
    with system_errors(TransferError, f"{path}: cannot append the CRC-32"), path.open("ab") as file:
        file.write(TRAILER_MARK + crc.to_bytes(10, "big"))


def _crc32(path: Path, stop: int) -> int:
    """The CRC-32 of the first `stop` bytes of a file."""
    crc = 0
    with open_to_read(path) as (handle, _):
        for offset in range(0, stop, _CRC_BLOCK):
            crc = zlib.crc32(pread(handle, min(_CRC_BLOCK, stop - offset), offset), crc)
    return crc
