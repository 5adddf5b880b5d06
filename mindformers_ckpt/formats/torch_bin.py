"""PyTorch files (`.bin`, `.pth`, `.pt`) as data: which tensors they hold and at which bytes. Read only.

A file of PyTorch 1.6 and later is a zip archive of stored entries: `data.pkl` describes the tensors, and
`data/<key>` holds the bytes of a storage. An older one is five pickles and then the storages, each after its
number of elements.

Pickles are programs; `pickled` reads them as data. Only the few names that describe tensors are known, storages
become references to byte ranges, and tensors become records. Everything else that a pickle may name stays
out: an object that holds nothing stands for it, and a file whose weights need one is refused.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats.dtypes import DType, by_name
from mindformers_ckpt.formats.pickled import MOST_BYTES, Builder, Foreign, PickleReader, Stream, with_plain_keys
from mindformers_ckpt.formats.tensor_file import (
    Header,
    Malformed,
    Segment,
    TensorRecord,
    TensorSpec,
    check_shape,
    describe_foreign_file,
    open_to_read,
)
from mindformers_ckpt.objects.reading import stream_of
from mindformers_ckpt.text_files import MAX_DEPTH

SUFFIXES = (".bin", ".pth", ".pt")

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LOCAL_HEADER = 30
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
# What zipfile makes of damaged bytes, besides its own error.
_DAMAGED_ZIP = (ValueError, LookupError, ArithmeticError, EOFError, NotImplementedError, RuntimeError)
# Where training scripts put the weights when they save more than these.
_WRAPPERS = ("state_dict", "model", "module")


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


def scan(path: Path) -> Header:
    """Read which tensors a file holds, and where; no code of the file is run.

    A dictionary under "model" or "state_dict" is taken for the weights where tensors are not at the top. Raises
    FormatError when the file is damaged, its tensors are not contiguous, or it holds no weights.
    """
    with open_to_read(path) as (handle, size), stream_of(handle) as stream:
        try:
            is_zip = stream.read(4) == b"PK\x03\x04"
            stream.seek(0)
            content, places = _read_zip(stream) if is_zip else _read_old(stream, size)
            records = [_record(name, tensor, places) for name, tensor in _weights(content).items()]
        except (Malformed, zipfile.BadZipFile, struct.error) as error:
            raise FormatError(f"{path}: no PyTorch file that can be read: {error}") from None
        except _DAMAGED_ZIP as error:
            raise FormatError(f"{path}: damaged, its list of entries makes no sense ({error!r:.200})") from None
        for record in records:
            for segment in record.segments:
                if segment.offset + segment.length > size:
                    raise FormatError(f"{path}: truncated: {record.spec.name!r} reaches over the end of the file")
    return Header(path, "torch", size, {record.spec.name: record for record in records}, {}, None)


def read_tensor(stream: BinaryIO, name: str) -> TensorRecord:
    """What and where the one tensor is that `torch.save` wrote; of that it gets the name.

    Raises Malformed for whatever is not one, and where its bytes are not all there.
    """
    try:
        content, places = _read_zip(stream)
        if not isinstance(content, _Tensor):
            raise Malformed("it is not a tensor")
        return _record(name, content, places)
    except zipfile.BadZipFile:
        raise Malformed("there is nothing that torch.save wrote") from None
    except (struct.error, *_DAMAGED_ZIP) as error:
        raise Malformed(f"its list of entries makes no sense ({type(error).__name__})") from None


def torch_dtype(name: str) -> DType | None:
    """The element type that PyTorch calls so, None for one that files of MindSpore cannot hold."""
    return by_name(name) if name in _DTYPES else None


def _read_zip(stream: BinaryIO) -> tuple[object, Mapping[str, Segment]]:
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise Malformed("a zip archive with two entries of one name")
        described = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(described) != 1:
            raise Malformed("a zip archive without one data.pkl; a TorchScript or numpy file, perhaps")
        prefix = described[0][: -len("data.pkl")]
        order = entries.get(f"{prefix}byteorder")
        if order is not None and _stored(archive, order, 16) != b"little":
            raise Malformed("saved on a big-endian machine; save it again on another")
        description = io.BytesIO(_stored(archive, entries[described[0]], MOST_BYTES))
        content = _Description(description).load()
        places = {
            name[len(prefix) + len("data/") :]: _place(stream, entry)
            for name, entry in entries.items()
            if name.startswith(f"{prefix}data/")
        }
    return content, places


def _check_stored(entry: zipfile.ZipInfo) -> None:
    """Refuse an entry that is compressed, as torch.save writes none: a small one may inflate without end."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise Malformed(f"{entry.filename[:80]} is compressed; save it with torch.save")


def _stored(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """The bytes of a small entry."""
    _check_stored(entry)
    if entry.file_size > limit:
        raise Malformed(f"its {entry.filename[:80]} has {entry.file_size} bytes, over {limit}")
    return archive.read(entry)


def _place(stream: BinaryIO, entry: zipfile.ZipInfo) -> Segment:
    _check_stored(entry)
    stream.seek(entry.header_offset + 26)
    name_size, extra_size = struct.unpack("<HH", stream.read(4))
    return Segment(entry.header_offset + _LOCAL_HEADER + name_size + extra_size, entry.file_size)


def _read_old(stream: BinaryIO, size: int) -> tuple[object, Mapping[str, Segment]]:
    start = stream.read(64)
    stream.seek(0)
    if start[:1] != b"\x80":
        raise Malformed(describe_foreign_file(start))
    description = _Description(stream)
    if [_number(description.load()), _number(description.load())] != [_MAGIC, _PROTOCOL]:
        raise Malformed("a Python pickle, but not one of torch.save")
    machine = description.load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Malformed("saved on a big-endian machine; save it again on another")
    content = description.load()
    keys = description.load()
    if not isinstance(keys, list):
        raise Malformed("it has no list of storages")
    places: dict[str, Segment] = {}
    for key in keys:
        storage = description.storages.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise Malformed("its list of storages is not that of its tensors")
        (elements,) = struct.unpack("<q", stream.read(8))
        length = elements * (storage.dtype.itemsize if storage.dtype else 1)
        if elements < 0 or stream.tell() + length > size:
            raise Malformed("truncated, or a storage of an impossible size")
        places[key] = Segment(stream.tell(), length)
        stream.seek(length, os.SEEK_CUR)
    return content, places


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


class _Description(PickleReader):
    """Knows how tensors are described, and nothing else."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream, _find, self._storage)
        self.storages: dict[str, _Storage] = {}

    def _storage(self, reference: object) -> _Storage:
        if not isinstance(reference, tuple) or not 5 <= len(reference) <= 6:
            raise Malformed("it refers to something that is not a storage")
        kind, dtype, key, _, elements, *view = reference
        if dtype is _UNTYPED:
            dtype = None
        elif not isinstance(dtype, DType):
            raise Malformed("it refers to something that is not a storage")
        if not isinstance(kind, str) or kind != "storage" or not isinstance(key, str) or type(elements) is not int:
            raise Malformed("it refers to something that is not a storage")
        if any(part is not None for part in view):
            raise Malformed("it refers to parts of storages, as PyTorch before 1.0 did; save it with a newer one")
        storage = _Storage(key, dtype, elements)
        if self.storages.setdefault(key, storage) != storage:
            raise Malformed(f"it describes the storage {key[:80]!r} in two ways")
        return storage


def _rebuild(storage: object, first: object, shape: object, stride: object, *_: object) -> _Tensor:
    if not isinstance(storage, _Storage) or storage.dtype is None:
        raise Malformed("a storage without an element type")
    return _Tensor(storage, storage.dtype, _count(first), _counts(shape), _counts(stride))


def _rebuild_typed(
    storage: object,
    first: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, DType):
        raise Malformed("a storage without an element type")
    return _Tensor(storage, dtype, _count(first), _counts(shape), _counts(stride))


def _rebuild_parameter(tensor: object, *_: object) -> object:
    return tensor if isinstance(tensor, _Tensor) else Foreign()


def _ordered(pairs: object = (), *_: object) -> dict[Any, Any]:
    """An OrderedDict, which old Pythons pickle with a list of its pairs."""
    if not isinstance(pairs, (list, tuple)) or any(
        not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in pairs
    ):
        raise Malformed("an OrderedDict of something that is not a list of pairs")
    return with_plain_keys(pairs)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:  # True is not a number here
        raise Malformed("a tensor has a dimension, stride or offset that is not a number of elements")
    return value


def _counts(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise Malformed("a tensor has a shape or strides that are not numbers of elements")
    return tuple(map(_count, values))


_UNTYPED = object()
_KNOWN = {
    ("collections", "OrderedDict"): Builder(_ordered),
    ("torch._utils", "_rebuild_tensor"): Builder(_rebuild),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_rebuild_typed),
    ("torch._utils", "_rebuild_parameter"): Builder(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_rebuild_parameter),
}


def _find(module: str, name: str) -> object:
    """What a name stands for."""
    known = _KNOWN.get((module, name))
    if known is None and module in ("torch", "torch.storage"):
        if name in _STORAGES:
            return by_name(_STORAGES[name])
        if name in ("UntypedStorage", "TypedStorage"):
            return _UNTYPED
        if name in _DTYPES:
            return by_name(name)
    return known or Foreign()


def _weights(content: object) -> dict[object, _Tensor]:
    """The tensors of a state dict, which may be one entry of what was saved."""
    for _ in range(MAX_DEPTH):
        if not isinstance(content, dict):
            break
        found = {name: value for name, value in content.items() if isinstance(value, _Tensor)}
        if found:
            others = [_shown(name) for name in content if name not in found and name != "_metadata"]
            if others:
                raise Malformed(f"beside tensors it holds {', '.join(others[:5])}, which are none")
            return found
        entries = [content[wrapper] for wrapper in _WRAPPERS if isinstance(content.get(wrapper), dict)]
        content = entries[0] if entries else None
    raise Malformed("it holds no dictionary of tensors")


def _shown(name: object) -> str:
    return repr(name[:80]) if isinstance(name, str) else f"an entry under no text ({type(name).__name__})"


def _record(name: object, tensor: _Tensor, places: Mapping[str, Segment]) -> TensorRecord:
    if not isinstance(name, str):
        raise Malformed(f"a tensor stands under {_shown(name)}")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise Malformed(f"the tensor name {name[:80]!r} is not valid Unicode") from None
    spec = TensorSpec(name, tensor.dtype, tensor.shape)
    check_shape(name, spec.shape, spec.dtype.itemsize)
    if len(tensor.stride) != len(spec.shape):
        raise Malformed(f"tensor {name!r} has the shape {spec.shape}, but {len(tensor.stride)} strides")
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
