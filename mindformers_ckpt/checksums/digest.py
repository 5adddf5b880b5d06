"""One digest of a checkpoint, from the checksums of its whole tensors: whatever its files, format and strategy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class TensorChecksum(NamedTuple):
    """CRC-64/NVME of the row-major bytes of a whole tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    crc64nvme: int

    @property
    def hex(self) -> str:
        """The checksum as it is written: 16 hexadecimal digits."""
        return f"{self.crc64nvme:016x}"


def described(tensors: Iterable[TensorChecksum]) -> dict[str, dict[str, Any]]:
    """Checksums as JSON has them, by the names of the tensors; `recorded` reads them."""
    return {
        tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "crc64nvme": tensor.hex}
        for tensor in sorted(tensors)
    }


def recorded(tensors: Mapping[str, Any]) -> list[TensorChecksum]:
    """Checksums out of JSON. Raises KeyError, TypeError, ValueError and AttributeError for what is none."""
    return [
        TensorChecksum(str(name), str(told["dtype"]), tuple(map(int, told["shape"])), int(told["crc64nvme"], 16))
        for name, told in tensors.items()
    ]


def digest_of(tensors: Iterable[TensorChecksum]) -> str:
    """SHA-256 of the record of tensors."""
    return hashlib.sha256(record_of(tensors)).hexdigest()


def record_of(tensors: Iterable[TensorChecksum]) -> bytes:
    """A line of JSON a tensor, [name, dtype, shape, checksum], in the order of the names.

    Tensors without elements do not count: a `.ckpt` file cannot hold them.
    """
    lines = (
        json.dumps([tensor.name, tensor.dtype, list(tensor.shape), tensor.hex]) + "\n"
        for tensor in sorted(tensors)
        if 0 not in tensor.shape
    )
    return "".join(lines).encode()
