"""The bytes of a `.ckpt` file: its records, laid out and encoded as `mindspore.save_checkpoint` does (see ckpt.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats.ckpt import CONTENT, DIMENSION, TAG, TENSOR, TYPE, VALUE
from mindformers_ckpt.formats.dtypes import DType, by_name
from mindformers_ckpt.formats.tensor_file import FileLayout, Segment, TensorRecord, TensorSpec, check_names

RECORD_LIMIT = 512 * 1024 * 1024

_NOTHING = "a .ckpt file needs at least one tensor with elements"


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
        segments = []
        for head, length in _records(spec):
            frames.append((end, head))
            segments.append(Segment(end + len(head), length))
            end += len(head) + length
        if segments:
            tensors[spec.name] = TensorRecord(spec, tuple(segments))
    if not tensors:
        raise FormatError(_NOTHING)
    return FileLayout(end, tuple(frames), tensors)


def size(specs: Sequence[TensorSpec]) -> int:
    """The size of the file that `layout` lays out, without what a file is written by. Raises the same errors."""
    check_names(specs)
    # Tensors that are alike but for the letters of their names take the same room.
    alike = Counter((len(name.encode()), dtype.name, shape) for name, dtype, shape in specs)
    size = 0
    for (name_length, dtype, shape), count in alike.items():
        records = _records(TensorSpec("x" * name_length, by_name(dtype), shape))
        size += count * sum(len(head) + length for head, length in records)
    if not size:
        raise FormatError(_NOTHING)
    return size


def _records(spec: TensorSpec) -> Iterator[tuple[bytes, int]]:
    """The head of each record of a tensor, and the bytes of its content."""
    nbytes = spec.nbytes
    for start in range(0, nbytes, RECORD_LIMIT):
        length = min(RECORD_LIMIT, nbytes - start)
        yield _encode_head(spec, length), length


def _encode_head(spec: TensorSpec, length: int) -> bytes:
    """The head of a record whose content is `length` bytes."""
    name = spec.name.encode()
    before, after = _encode_around(len(name), spec.dtype, spec.shape, length)
    return before + name + after


@lru_cache(maxsize=4096)
def _encode_around(name_length: int, dtype: DType, shape: tuple[int, ...], length: int) -> tuple[bytes, bytes]:
    """What comes before and after the name in a head: layers repeat it."""
    after = _encode_tensor((0,) if dtype.name == "str" else shape, dtype.ckpt, length)
    tag = bytes([TAG]) + _encode_varint(name_length)
    return bytes([VALUE]) + _encode_varint(len(tag) + name_length + len(after) + length) + tag, after


def _encode_tensor(dims: tuple[int, ...], type_name: str, length: int) -> bytes:
    tensor = b"".join(
        [
            *(bytes([DIMENSION]) + _encode_varint(dimension) for dimension in dims),
            bytes([TYPE]) + _encode_varint(len(type_name)) + type_name.encode(),
            bytes([CONTENT]),
            _encode_varint(length),
        ]
    )
    return bytes([TENSOR]) + _encode_varint(len(tensor) + length) + tensor


def _encode_varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
