"""Distributed checkpoints as PyTorch and hyper-parallel write them, made without either of them.

The pickles are written instruction by instruction, so that the tests need no class of those libraries. What PyTorch
itself writes is in tests/data/dcp (tools/make_dcp_samples.py). That hyper-parallel writes the same was read in its
published source (hyper_parallel/core/distributed_checkpoint); there is no package of it to run.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface import CODES

from mindformers_ckpt.geometry.box import Box

TORCH = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "_StorageInfo")
HYPER = (
    "hyper_parallel.core.distributed_checkpoint.metadata",
    "hyper_parallel.core.distributed_checkpoint.storage",
    "StorageInfo",
)
_STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "bfloat16": "BFloat16Storage",
}

SAMPLES = Path(__file__).parent / "data" / "dcp"

Boxes = Mapping[str, Sequence[Box]]


class Raw(bytes):
    """A value that is instructions of a pickle already."""


def pickled(value: Any) -> bytes:
    """The instructions that make a value."""
    if isinstance(value, Raw):
        return bytes(value)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + len(text).to_bytes(4, "little") + text
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickled, value)) + b"e"
    return b"}(" + b"".join(pickled(key) + pickled(held) for key, held in value.items()) + b"u"


def name(module: str, attribute: str) -> Raw:
    return Raw(f"c{module}\n{attribute}\n".encode())


def made(module: str, kind: str, state: Any = None) -> Raw:
    """An object of a class, with its state."""
    return Raw(name(module, kind) + b")\x81" + (b"" if state is None else pickled(state) + b"b"))


def size(extents: Iterable[int]) -> Raw:
    return Raw(name("torch", "Size") + pickled((tuple(extents),)) + b"R")


def metadata(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    boxes: Boxes,
    places: Mapping[tuple[str, Box], Mapping[str, Any]],
    *,
    paths: Mapping[str, tuple[str | int, ...]] | None = None,
    others: Sequence[str] = (),
    library: tuple[str, str, str] = TORCH,
) -> bytes:
    """A `.metadata`: name -> (element type, shape), the boxes of each, and the fields of the place of each box."""
    module, storage_module, storage_kind = library
    is_torch = library == TORCH
    extents: Any = size if is_torch else tuple
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for tensor, (dtype, shape) in shapes.items():
        chunks = [
            made(module, "ChunkStorageMetadata", {"offsets": extents(box.start), "sizes": extents(box.shape)})
            for box in boxes[tensor]
        ]
        kind: Any = (name("torch", dtype), None, False, None, False) if is_torch else {"dtype": dtype.capitalize()}
        fields = {"properties": made(module, "TensorProperties", kind), "size": extents(shape), "chunks": chunks}
        described[tensor] = made(module, "TensorStorageMetadata", fields)
        for number, box in enumerate(boxes[tensor]):
            if (tensor, box) in places:
                index = {"fqn": tensor, "offset": extents(box.start), "index": number}
                stored[made(module, "MetadataIndex", index)] = made(storage_module, storage_kind, places[tensor, box])
    for other in others:
        described[other] = made(module, "BytesStorageMetadata")
        index = {"fqn": other, "offset": None, "index": None}
        place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 0}
        stored[made(module, "MetadataIndex", index)] = made(storage_module, storage_kind, place)
    content = {"state_dict_metadata": described, "planner_data": paths, "storage_data": stored, "version": "1.0.0"}
    return b"\x80\x04" + made(module, "Metadata", content) + b"."


def saved(array: Any) -> bytes:
    """What torch.save writes of a tensor."""
    kind = str(array.dtype)
    storage = Raw(pickled(("storage", name("torch", _STORAGES[kind]), "0", "cpu", array.size)) + b"Q")
    strides = tuple(step // array.itemsize for step in array.strides)
    hooks = Raw(name("collections", "OrderedDict") + b")R")
    arguments = (storage, 0, tuple(array.shape), strides, False, hooks)
    pickle = b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + pickled(arguments) + b"R."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        members = {"data.pkl": pickle, "byteorder": b"little", "data/0": array.tobytes(), "version": b"3\n"}
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{member}"), content)
    return stream.getvalue()


def write_dcp(
    folder: Path,
    tensors: Mapping[str, Any],
    boxes: Boxes | None = None,
    *,
    ranks: int = 2,
    paths: Mapping[str, tuple[str | int, ...]] | None = None,
    others: Sequence[str] = (),
    leave_out: Sequence[tuple[str, Box]] = (),
) -> Path:
    """A checkpoint of PyTorch; box n of a tensor is in the file of rank n % ranks. Without `boxes` all are whole."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    boxes = whole_boxes(tensors) if boxes is None else boxes
    files: dict[str, bytearray] = {}
    places = {}
    for tensor, array in tensors.items():
        for number, box in enumerate(boxes[tensor]):
            file = f"__{number % ranks}_0.distcp"
            content = files.setdefault(file, bytearray())
            item = saved(np.ascontiguousarray(array[box.slices()]).reshape(box.shape))
            if (tensor, box) not in leave_out:
                places[tensor, box] = {"relative_path": file, "offset": len(content), "length": len(item)}
            content += item
    for file, data in files.items():
        (folder / file).write_bytes(data)
    shapes = {tensor: (str(array.dtype), array.shape) for tensor, array in tensors.items()}
    (folder / ".metadata").write_bytes(metadata(shapes, boxes, places, paths=paths, others=others))
    return folder


def write_hyper_parallel(
    folder: Path, tensors: Mapping[str, Any], boxes: Boxes, *, ranks: int = 2, own_metadata: bool = False
) -> Path:
    """A checkpoint of hyper-parallel; a tensor of which a rank has several boxes has a name for each of them.

    With `own_metadata` every rank describes its own boxes, as it does where ranks do not talk to each other.
    """
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    shapes = {tensor: (str(array.dtype), array.shape) for tensor, array in tensors.items()}
    places: dict[int, dict[tuple[str, Box], dict[str, Any]]] = {rank: {} for rank in range(ranks)}
    for rank in range(ranks):
        held: dict[str, Any] = {}
        for tensor, array in tensors.items():
            own = [box for number, box in enumerate(boxes[tensor]) if number % ranks == rank]
            for number, box in enumerate(own):
                key = tensor if len(own) == 1 else f"{tensor}.__dcp_chunk_{number}"
                held[key] = np.ascontiguousarray(array[box.slices()]).reshape(box.shape)
                place = {"relative_path": f"_rank{rank}_.safetensors", "offset": 0, "length": -1, "tensor_key": key}
                places[rank][tensor, box] = place
        write_safetensors(folder / f"_rank{rank}_.safetensors", held, {"format": "ms"})
    together = {key: place for own in places.values() for key, place in own.items()}
    if own_metadata:
        for rank, held_places in places.items():
            mine = {tensor: [box for box in boxes[tensor] if (tensor, box) in held_places] for tensor in tensors}
            (folder / f"{rank}.metadata").write_bytes(metadata(shapes, mine, held_places, library=HYPER))
    else:
        (folder / ".metadata").write_bytes(metadata(shapes, boxes, together, library=HYPER))
    return folder


def write_shards(folder: Path, tensors: Mapping[str, Any], boxes: Boxes, *, ranks: int = 2) -> Path:
    """What HuggingFaceStorageWriter leaves without consolidation; box n of a tensor is rank n's."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(ranks):
        own = {tensor: boxes[tensor][rank] for tensor in tensors if rank < len(boxes[tensor])}
        parts = {tensor: tensors[tensor][box.slices()] for tensor, box in own.items()}
        held = {tensor: np.ascontiguousarray(part).reshape(part.shape) for tensor, part in parts.items()}
        info = {tensor: {"saved_offsets": list(box.start)} for tensor, box in own.items()}
        told = {"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0", "format": "pt"}
        write_safetensors(folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", held, told)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, Any], told: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(told)}
    end = 0
    for tensor, array in tensors.items():
        entry = {"dtype": CODES[str(array.dtype)], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        header[tensor], end = entry, end + array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def whole_boxes(tensors: Mapping[str, Any]) -> dict[str, list[Box]]:
    return {tensor: [Box.whole(array.shape)] for tensor, array in tensors.items()}


def rows(tensors: Mapping[str, Any], ranks: int = 2) -> dict[str, list[Box]]:
    """The boxes that FSDP2 cuts: rows, as many as rounded up, until there are no more."""
    found = {}
    for tensor, array in tensors.items():
        step = -(-array.shape[0] // ranks) if array.ndim else 1
        starts = range(0, array.shape[0], step) if array.ndim else [0]
        found[tensor] = [
            Box((start, *(0,) * (array.ndim - 1)), (min(start + step, array.shape[0]), *array.shape[1:]))
            if array.ndim
            else Box((), ())
            for start in starts
        ]
    return found


def split(chance: random.Random, shape: Sequence[int], pieces: int = 5) -> list[Box]:
    """A tensor's shape cut into boxes of any sizes, also such as are no grid."""
    boxes = [Box.whole(shape)]
    for _ in range(pieces):
        number = chance.randrange(len(boxes))
        box = boxes[number]
        axes = [axis for axis, extent in enumerate(box.shape) if extent > 1]
        if not axes:
            continue
        axis = chance.choice(axes)
        at = chance.randrange(box.start[axis] + 1, box.stop[axis])
        below = Box(box.start, (*box.stop[:axis], at, *box.stop[axis + 1 :]))
        above = Box((*box.start[:axis], at, *box.start[axis + 1 :]), box.stop)
        boxes[number : number + 1] = [below, above]
    chance.shuffle(boxes)
    return boxes


# ------------------------------------------------------------------------------------------- hostile metadata


def evil(instructions: bytes) -> bytes:
    return b"\x80\x04" + instructions + b"."


SIZES = {"w": ("float32", (5, 7))}
BOX = Box.whole((5, 7))
PLACE = {"relative_path": "__0_0.distcp", "offset": 0, "length": 10}
MODULE = "torch.distributed.checkpoint.metadata"


def described(**changes: Any) -> bytes:
    """Metadata with other fields of the place of its one box."""
    return metadata(SIZES, {"w": [BOX]}, {("w", BOX): {**PLACE, **changes}})


def of_tensor(kind: Any = None, shape: Any = (5, 7), chunks: Any = ()) -> bytes:
    properties = made(MODULE, "TensorProperties", (kind or name("torch", "float32"), None))
    fields = {"properties": properties, "size": shape, "chunks": list(chunks)}
    content = {"state_dict_metadata": {"w": made(MODULE, "TensorStorageMetadata", fields)}, "storage_data": {}}
    return evil(made(MODULE, "Metadata", content))


HOSTILE = {
    "a call": (evil(name("os", "system") + pickled(("touch hacked",)) + b"R"), "something else where a Metadata"),
    "an object": (evil(made("os", "system", {})), "something else where a Metadata must be; it is made of os.system"),
    "another kind": (evil(made("megatron.x", "MCoreMetadata", {})), "it is made of megatron.x.MCoreMetadata"),
    "a class that is called": (evil(name(MODULE, "Metadata") + b")R"), "something else where a Metadata"),
    "a reference": (evil(pickled("x") + b"Q"), "refers to storages"),
    "no fields": (evil(made(MODULE, "Metadata", ())), "something else where a Metadata"),
    "nothing in it": (evil(made(MODULE, "Metadata", {})), "it has no storage_data"),
    "its own state": (evil(made(MODULE, "Metadata") + b"\x94h\x00b"), "something else where a Metadata"),
    "nested": (evil(b"(" * 1000), "nested deeper"),
    "cut off": (described()[:-40], "truncated"),
    "another folder": (described(relative_path="../x.distcp"), "its place is not a file of the folder"),
    "no file": (described(relative_path=7), "its place is not a file of the folder"),
    "a negative offset": (described(offset=-1), "its place is not a range of bytes"),
    "a huge length": (described(length=1 << 70), "its place is not a range of bytes"),
    "compressed": (described(transform_descriptors=["stream.zstd/1"]), "changed when it was saved .stream.zstd/1"),
    "an unknown type": (of_tensor(name("torch", "float8_e8m0fnu")), "w: unknown element type 'float8_e8m0fnu'"),
    "a type that is none": (of_tensor(name("os", "float32")), "its element type is not known"),
    "a shape that overflows": (of_tensor(shape=(1 << 40, 1 << 40)), "overflows"),
    "a negative shape": (of_tensor(shape=(-5, 7)), r"it has the shape \[-5, 7\]"),
    "a shape of text": (of_tensor(shape=("a",)), "not made of numbers"),
    "chunks of something": (of_tensor(chunks=[3]), "something else where a ChunkStorageMetadata"),
    "a chunk outside": (
        of_tensor(chunks=[made(MODULE, "ChunkStorageMetadata", {"offsets": (4, 0), "sizes": (5, 7)})]),
        r"a chunk at \[4, 0\] of \[5, 7\] is not a box",
    ),
    "half a character": (
        evil(made(MODULE, "Metadata", {"state_dict_metadata": {"\ud800": None}, "storage_data": {}})),
        "not valid Unicode",
    ),
    "empty": (b"\x80\x04", "truncated"),
}
