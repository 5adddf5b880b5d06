"""PyTorch files (`.bin`, `.pth`, `.pt`) as data: which tensors they hold and at which bytes. Read only.

A file of PyTorch 1.6 and later is a zip archive of stored entries: `data.pkl` describes the tensors, and
`data/<key>` holds the bytes of a storage. An older one is five pickles and then the storages, each after its
number of elements.

Pickles are programs; here they can do nothing. Only the few names that describe tensors are known, storages
become references to byte ranges, and tensors become records. Everything else that a pickle may name stays
out: an object of it is made that holds nothing, and a file whose weights need one is refused.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats.dtypes import DType, by_name
from mindformers_ckpt.formats.tensor_file import (
    Header,
    Malformed,
    Segment,
    TensorRecord,
    TensorSpec,
    describe_foreign_file,
    open_to_read,
)

SUFFIXES = (".bin", ".pth", ".pt")

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LOCAL_HEADER = 30
# Above any description of tensors; a larger one could exhaust the memory.
_PICKLE_LIMIT = 1 << 30
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
}
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "complex64"),
)
# Where training scripts put the weights when they save more than these.
_WRAPPERS = ("state_dict", "model", "module")


# What a damaged description makes of the unpickler, or of zipfile.
_SENSELESS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)


class _Storage(NamedTuple):
    """A run of elements; `dtype` is None for bytes whose type a tensor tells."""

    key: str
    dtype: DType | None
    elements: int


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it. `first` and `stride` count elements of the storage."""

    storage: _Storage
    dtype: DType
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Foreign:
    """An object of a class that is not known here; it is made, and holds nothing."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...


def scan(path: Path) -> Header:
    """Read which tensors a file holds, and where; no code of the file is run.

    A dictionary under "model" or "state_dict" is taken for the weights where tensors are not at the top. Raises
    FormatError when the file is damaged, its tensors are not contiguous, or it holds no weights.
    """
    with open_to_read(path) as (_, size):
        try:
            with path.open("rb") as stream:
                is_zip = stream.read(4) == b"PK\x03\x04"
                stream.seek(0)
                content, places = _read_zip(stream) if is_zip else _read_old(stream, size)
            tensors = {name: _record(name, tensor, places) for name, tensor in _weights(content).items()}
        except (Malformed, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError) as error:
            raise FormatError(f"{path}: no PyTorch file that can be read: {error}") from None
        except _SENSELESS as error:
            raise FormatError(f"{path}: damaged, its description of tensors makes no sense ({error!r})") from None
        for record in tensors.values():
            for segment in record.segments:
                if segment.offset + segment.length > size:
                    raise FormatError(f"{path}: truncated: {record.spec.name!r} reaches over the end of the file")
    return Header(path, "torch", size, tensors, {}, None)


def _read_zip(stream: BinaryIO) -> tuple[object, Mapping[str, Segment]]:
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        described = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(described) != 1:
            raise Malformed("a zip archive without one data.pkl; a TorchScript or numpy file, perhaps")
        prefix = described[0][: -len("data.pkl")]
        order = entries.get(f"{prefix}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise Malformed("saved on a big-endian machine; save it again on another")
        if entries[described[0]].file_size > _PICKLE_LIMIT:
            raise Malformed("its data.pkl is over 1 GiB")
        content = _Unpickler(io.BytesIO(archive.read(described[0]))).load()
        places = {}
        for name, entry in entries.items():
            if name.startswith(f"{prefix}data/"):
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise Malformed(f"{name} is compressed; save it with torch.save")
                stream.seek(entry.header_offset + 26)
                name_size, extra_size = struct.unpack("<HH", stream.read(4))
                offset = entry.header_offset + _LOCAL_HEADER + name_size + extra_size
                places[name[len(prefix) + len("data/") :]] = Segment(offset, entry.file_size)
    return content, places


def _read_old(stream: BinaryIO, size: int) -> tuple[object, Mapping[str, Segment]]:
    start = stream.read(64)
    stream.seek(0)
    if start[:1] != b"\x80":
        raise Malformed(describe_foreign_file(start))
    if _Unpickler(stream).load() != _MAGIC or _Unpickler(stream).load() != _PROTOCOL:
        raise Malformed("a Python pickle, but not one of torch.save")
    machine = _Unpickler(stream).load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Malformed("saved on a big-endian machine; save it again on another")
    unpickler = _Unpickler(stream)
    content = unpickler.load()
    keys = _Unpickler(stream).load()
    if not isinstance(keys, list):
        raise Malformed("it has no list of storages")
    places = {}
    for key in keys:
        (elements,) = struct.unpack("<q", stream.read(8))
        dtype = unpickler.storages[key].dtype
        length = elements * (dtype.itemsize if dtype else 1)
        if elements < 0 or stream.tell() + length > size:
            raise Malformed("truncated, or a storage of an impossible size")
        places[key] = Segment(stream.tell(), length)
        stream.seek(length, os.SEEK_CUR)
    return content, places


class _Clipped:
    """A stream that is not asked for more than it has: a damaged length must not reserve memory."""

    def __init__(self, stream: BinaryIO | io.BytesIO) -> None:
        self._stream = stream
        start = stream.tell()
        self._end = stream.seek(0, os.SEEK_END)
        stream.seek(start)

    def read(self, size: int) -> bytes:
        return self._stream.read(max(0, min(size, self._end - self._stream.tell())))

    def readline(self) -> bytes:
        return self._stream.readline()


class _Unpickler(pickle._Unpickler):
    """Knows how tensors are described, and nothing else.

    It is the unpickler in Python, because the one in C reserves memory by the numbers that a file names.
    """

    def __init__(self, stream: BinaryIO | io.BytesIO) -> None:
        super().__init__(_Clipped(stream), encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILDERS:
            return _REBUILDERS[name]
        if module in ("torch", "torch.storage"):
            if name in _STORAGES:
                return by_name(_STORAGES[name])
            if name in ("UntypedStorage", "TypedStorage"):
                return None
            if name in _DTYPES:
                return by_name(name)
        return _Foreign

    def persistent_load(self, reference: Any) -> Any:
        kind, dtype, key, _, elements, *_ = reference
        if kind != "storage" or not (dtype is None or isinstance(dtype, DType)) or not isinstance(key, str):
            raise Malformed("it refers to something that is no storage")
        self.storages[key] = _Storage(key, dtype, int(elements))
        return self.storages[key]


def _rebuild(storage: _Storage, first: int, shape: Sequence[int], stride: Sequence[int], *_: object) -> _Tensor:
    if storage.dtype is None:
        raise Malformed("a storage without an element type")
    return _Tensor(storage, storage.dtype, first, tuple(shape), tuple(stride))


def _rebuild_typed(
    storage: _Storage,
    first: int,
    shape: Sequence[int],
    stride: Sequence[int],
    requires_grad: object,
    hooks: object,
    dtype: DType,
    *_: object,
) -> _Tensor:
    return _Tensor(storage, dtype, first, tuple(shape), tuple(stride))


def _rebuild_parameter(tensor: _Tensor, *_: object) -> _Tensor:
    return tensor


_REBUILDERS = {
    "_rebuild_tensor": _rebuild,
    "_rebuild_tensor_v2": _rebuild,
    "_rebuild_tensor_v3": _rebuild_typed,
    "_rebuild_parameter": _rebuild_parameter,
    "_rebuild_parameter_with_state": _rebuild_parameter,
}


def _weights(content: object) -> dict[str, _Tensor]:
    """The tensors of a state dict, which may be one entry of what was saved."""
    if isinstance(content, dict):
        found = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
        if found:
            others = [name for name in content if name not in found and name != "_metadata"]
            if others:
                raise Malformed(f"beside tensors it holds {others[:5]}, which are none")
            return found
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), dict):
                return _weights(content[wrapper])
    raise Malformed("it holds no dictionary of tensors")


def _record(name: object, tensor: _Tensor, places: Mapping[str, Segment]) -> TensorRecord:
    if not isinstance(name, str):
        raise Malformed(f"a tensor has the name {name!r}")
    if any(not isinstance(extent, int) or extent < 0 for extent in (*tensor.shape, tensor.first)):
        raise Malformed(f"tensor {name!r} has the shape {tensor.shape}")
    spec = TensorSpec(name, tensor.dtype, tensor.shape)
    expected = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    strides_count = [(have, want) for extent, have, want in zip(tensor.shape, tensor.stride, expected) if extent > 1]
    if spec.size and any(have != want for have, want in strides_count):
        raise Malformed(f"tensor {name!r} is not contiguous; save it with .contiguous()")
    place = places.get(tensor.storage.key)
    if place is None:
        raise Malformed(f"the storage of tensor {name!r} is not there")
    start = tensor.first * tensor.dtype.itemsize
    if start + spec.nbytes > place.length:
        raise Malformed(f"tensor {name!r} is larger than its storage")
    return TensorRecord(spec, (Segment(place.offset + start, spec.nbytes),) if spec.nbytes else ())
