"""`.metadata` of a distributed checkpoint: its tensors, the boxes of them that are stored, and where each is.

PyTorch (torch.distributed.checkpoint, DCP) writes one for a folder of .distcp files; hyper-parallel, whose classes have
the same fields, for one of .safetensors files. It is a pickle, of which these classes are known and nothing else:

    Metadata                 state_dict_metadata: name -> TensorStorageMetadata, or BytesStorageMetadata: no tensor
                             planner_data: name -> its path in the dictionaries and lists that were saved
                             storage_data: MetadataIndex -> _StorageInfo
    TensorStorageMetadata    properties (the element type first), size, chunks
    ChunkStorageMetadata     offsets, sizes
    MetadataIndex            fqn, offset
    _StorageInfo             relative_path, offset, length; hyper-parallel's: tensor_key, and a length of -1

Where ranks save without talking to each other every rank writes its own (`__0.metadata`); together they are one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import FormatError, raise_problems, system_errors
from mindformers_ckpt.formats.dtypes import DType, by_name
from mindformers_ckpt.formats.pickled import Builder, Foreign, Known, PickleReader, Record
from mindformers_ckpt.formats.tensor_file import Malformed, check_shape, open_to_read
from mindformers_ckpt.formats.torch_bin import torch_dtype
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.objects.path import names_of
from mindformers_ckpt.objects.reading import stream_of

METADATA_FILE = ".metadata"
_OF_A_RANK = re.compile(r"__\d+\.metadata|\d+\.metadata|\.rank\d+_metadata")
# A chunk takes some 85 instructions, and an optimizer triples the tensors of a model: for 380,000 chunks.
_MOST = 4
_SHOWN = 3  # names that are not known
# The names that a pickle may use: these classes of these modules, `torch.Size`, and element types.
MODULES = (
    *("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"),
    "torch.distributed._shard.sharded_tensor.metadata",  # of TensorProperties before PyTorch 2.3
    *("hyper_parallel.core.distributed_checkpoint.metadata", "hyper_parallel.core.distributed_checkpoint.storage"),
    *("hyper_parallel.core.checkpoint.metadata", "hyper_parallel.core.checkpoint.storage"),
)
CLASSES = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("MetadataIndex", "_StorageInfo", "StorageInfo"),
)


class Chunk(NamedTuple):
    """A box of a tensor, and where it is: `length` bytes of a file from `offset` on, or a tensor of it.

    `key` is the name of that tensor, "" where bytes are told.
    """

    box: Box
    file: str
    offset: int
    length: int
    key: str


class Described(NamedTuple):
    """A tensor as it was before it was cut, and its chunks, no two of the same box."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class DcpMetadata:
    """What a `.metadata` says.

    Attributes:
        path: of the file, for messages.
        tensors: name -> what is recorded of it.
        paths: name -> where it was in what was saved; names that are not there were at the top.
        others: names of what is no tensor.
        is_torch: whether PyTorch wrote it.
    """

    path: Path
    tensors: Mapping[str, Described]
    paths: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]
    is_torch: bool

    @cached_property
    def by_file(self) -> Mapping[str, Sequence[tuple[str, Chunk]]]:
        """The chunks of every file, each with the name of its tensor."""
        found: dict[str, list[tuple[str, Chunk]]] = {}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                found.setdefault(chunk.file, []).append((name, chunk))
        return found


def chunk_name(name: str, box: Box, shape: Sequence[int]) -> str:
    """What a box of a tensor is called in a file without names: as the tensor, and where it is not whole, the box."""
    return name if box == Box.whole(shape) else f"{name}{box}"


def metadata_files(folder: Path) -> list[Path]:
    """The `.metadata` of a folder, or those of its ranks where there is no other; none where it has none."""
    if (folder / METADATA_FILE).exists():
        return [folder / METADATA_FILE]
    with system_errors(FormatError, f"{folder}: cannot be read"):
        names = sorted(name for name in names_of(folder) if _OF_A_RANK.fullmatch(name))
    return [folder / name for name in names]


# What was read last, by the states of its files: all files of a folder need it, and two folders may be compared.
_KEPT = 4
_recent: dict[tuple[object, ...], DcpMetadata] = {}


def read_metadata(folder: Path) -> DcpMetadata:
    """What the metadata of a folder says.

    Raises FormatError when it is not there, is damaged, or contradicts itself, with everything that is wrong in it.
    """
    paths = metadata_files(folder)
    if not paths:
        raise FormatError(
            f"{folder} holds no {METADATA_FILE}, which is written last and says where its tensors are: was the save "
            "cut off, or were hidden files left out when it was copied?"
        )
    with system_errors(FormatError, f"{paths[0]}: cannot be read"):
        states = ((path, path.stat()) for path in paths)
        state = tuple((path, status.st_ino, status.st_size, status.st_mtime_ns) for path, status in states)
    found = _recent.get(state)
    if found is None:
        found = _joined([read_metadata_file(path) for path in paths])
        for oldest in list(_recent)[: max(0, len(_recent) + 1 - _KEPT)]:
            _recent.pop(oldest, None)
        _recent[state] = found
    return found


def read_metadata_file(path: Path) -> DcpMetadata:
    """What one `.metadata` says; no code of it is run. Raises FormatError."""
    with open_to_read(path) as (handle, _), stream_of(handle) as stream:
        names = _Names()
        try:
            content = PickleReader(stream, names.find, _no_reference, _MOST).load()
            return _content(path, content, names.is_torch)
        except Malformed as error:
            others = f"; it is made of {', '.join(names.others)}" if names.others else ""
            raise FormatError(
                f"{path}: no metadata of a distributed checkpoint that can be read: {error}{others}"
            ) from None


def _joined(parts: Sequence[DcpMetadata]) -> DcpMetadata:
    """What the metadata of several ranks say together."""
    first = parts[0]
    if len(parts) == 1:
        return first
    tensors: dict[str, Described] = {}
    problems = []
    for part in parts:
        for name, tensor in part.tensors.items():
            own = tensors.setdefault(name, tensor)
            if (own.dtype, own.shape) != (tensor.dtype, tensor.shape):
                problems.append(f"{name}: {part.path.name} and {first.path.name} describe different tensors")
            chunks = {chunk.box: chunk for chunk in (*tensor.chunks, *own.chunks)}
            tensors[name] = own._replace(chunks=tuple(chunks.values()))
    raise_problems(FormatError, f"{first.path.parent}: the metadata of its ranks do not agree", problems)
    paths = {name: path for part in parts for name, path in part.paths.items()}
    others = dict.fromkeys(name for part in parts for name in part.others)
    return DcpMetadata(first.path, tensors, paths, tuple(others), first.is_torch)


# ------------------------------------------------------------------------------------------- the pickle


class _Names:
    """Knows the names of the classes, and whether they are PyTorch's; `others` are the first that it does not know."""

    def __init__(self) -> None:
        self.is_torch = False
        self.others: list[str] = []

    def find(self, module: str, name: str) -> object:
        if module in MODULES and name in CLASSES:
            self.is_torch |= module.startswith("torch.")
            return Known("_StorageInfo" if name == "StorageInfo" else name)
        if (module, name) == ("torch", "Size"):
            return Builder(_size)
        if module == "torch":
            return torch_dtype(name) or name  # of an element type that is not known: what to say
        if not module.startswith(("torch.", "pathlib")) and len(self.others) < _SHOWN:
            self.others.append(f"{module}.{name}"[:200])
        return Foreign()


def _no_reference(_: object) -> object:
    raise Malformed("it refers to storages, which belong into other files")


def _size(extents: object = ()) -> tuple[int, ...]:
    if not isinstance(extents, (tuple, list)) or not all(type(extent) is int for extent in extents):
        raise Malformed("a shape that is not made of numbers")
    return tuple(extents)


def _fields(value: object, kind: str) -> dict[Any, Any]:
    """The fields of an object of a class."""
    if not isinstance(value, Record) or value.kind != kind or not isinstance(value.state, dict):
        raise Malformed(f"it has something else where a {kind} must be")
    return value.state


def _mapping(fields: Mapping[Any, Any], name: str) -> dict[Any, Any]:
    found = fields.get(name)
    if not isinstance(found, dict):
        raise Malformed(f"it has no {name}")
    return found


# ------------------------------------------------------------------------------------------- what it says


class _Place(NamedTuple):
    file: str
    offset: int
    length: int
    key: str


def _content(path: Path, content: object, is_torch: bool) -> DcpMetadata:
    fields = _fields(content, "Metadata")
    places = dict(_places(_mapping(fields, "storage_data")))
    tensors: dict[str, Described] = {}
    others, problems = [], []
    for name, entry in _mapping(fields, "state_dict_metadata").items():
        _check_name(name)
        if isinstance(entry, Record) and entry.kind == "BytesStorageMetadata":
            others.append(name)
            continue
        try:
            tensors[name] = _described(name, entry, places)
        except (Malformed, FormatError) as error:
            problems.append(f"{name}: {error}")
    raise_problems(FormatError, f"{path}: tensors that cannot be read", problems)
    planned = fields.get("planner_data")
    paths = dict(_paths(planned)) if isinstance(planned, dict) else {}
    return DcpMetadata(path, tensors, paths, tuple(others), is_torch)


def _check_name(name: object) -> None:
    try:
        if not isinstance(name, str) or not name or not name.encode():
            raise Malformed("a tensor has a name that is not text")
    except UnicodeEncodeError:
        raise Malformed("a tensor has a name that is not valid Unicode") from None


def _places(storage: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...]], object]]:
    """Name and offsets of a chunk -> what is recorded of where it is; most of what is no tensor is left out."""
    for index, info in storage.items():
        key = _fields(index, "MetadataIndex")
        name, offsets = key.get("fqn"), key.get("offset")
        if isinstance(name, str) and offsets is not None:
            yield (name, _size(offsets)), info


def _place(name: str, info: object) -> _Place:
    fields = _fields(info, "_StorageInfo")
    file, start, length = fields.get("relative_path"), fields.get("offset"), fields.get("length")
    if not _is_file_name(file):
        raise Malformed("its place is not a file of the folder")
    if type(start) is not int or type(length) is not int or not 0 <= start < 1 << 63 or not -1 <= length < 1 << 63:
        raise Malformed("its place is not a range of bytes")
    transforms = fields.get("transform_descriptors")
    if transforms:
        words = ", ".join(word for word in transforms if isinstance(word, str)) if isinstance(transforms, list) else ""
        raise Malformed(f"it was changed when it was saved ({words[:80]}); save it without extensions")
    told = fields.get("tensor_key")
    return _Place(str(file), start, length, (told if isinstance(told, str) and told else name) if length < 0 else "")


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and not set(file) & {"/", "\0"} and file.isprintable()


def _described(name: str, entry: object, places: Mapping[tuple[str, tuple[int, ...]], object]) -> Described:
    fields = _fields(entry, "TensorStorageMetadata")
    dtype, shape = _dtype(fields.get("properties")), _size(fields.get("size"))
    if any(extent < 0 for extent in shape):
        raise Malformed(f"it has the shape {list(shape)[:64]}")
    check_shape(name, shape, dtype.itemsize)
    listed = fields.get("chunks")
    if not isinstance(listed, list):
        raise Malformed("it has no list of chunks")
    chunks: dict[Box, Chunk] = {}
    for each in listed:
        chunk = _fields(each, "ChunkStorageMetadata")
        box = _box(_size(chunk.get("offsets")), _size(chunk.get("sizes")), shape)
        if (name, box.start) not in places:
            raise Malformed(f"it is not told where its box {box} is")
        chunks.setdefault(box, Chunk(box, *_place(name, places[name, box.start])))
    return Described(dtype, shape, tuple(chunks.values()))


def _dtype(properties: object) -> DType:
    """The element type: PyTorch's, first of the state of its properties, or one that is called by its name."""
    state = properties.state if isinstance(properties, Record) and properties.kind == "TensorProperties" else None
    told = state[0] if isinstance(state, tuple) and state else state.get("dtype") if isinstance(state, dict) else None
    if isinstance(told, DType):
        return told
    if isinstance(told, str):
        return by_name(told.rpartition(".")[2].lower()[:80])
    raise Malformed("its element type is not known")


def _box(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> Box:
    """The box of a chunk, which must be one of the tensor."""
    if len(offsets) == len(sizes) == len(shape):
        box = Box(offsets, tuple(map(sum, zip(offsets, sizes))))
        if all(size >= 0 for size in sizes) and Box.whole(shape).contains(box):
            return box
    raise Malformed(f"a chunk at {list(offsets)[:64]} of {list(sizes)[:64]} is not a box of the shape {list(shape)}")


def _paths(planned: Mapping[Any, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, path in planned.items():
        if isinstance(name, str) and isinstance(path, tuple) and all(type(part) in (str, int) for part in path):
            yield name, tuple(map(str, path))
