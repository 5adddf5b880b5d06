"""The `.safetensors` format: 8 bytes (the header's length, little-endian), a JSON header, the contents.

The checks are those of the reference library (https://github.com/huggingface/safetensors); duplicate keys,
which its format description forbids and it does not notice, are refused as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from json.encoder import encode_basestring
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats.dtypes import DType, by_name, from_safetensors
from mindformers_ckpt.formats.tensor_file import (
    FileLayout,
    Header,
    Malformed,
    Segment,
    TensorRecord,
    TensorSpec,
    check_names,
    check_shape,
    describe_foreign_file,
    open_to_read,
)
from mindformers_ckpt.objects.reading import Handle, pread
from mindformers_ckpt.text_files import check_structure

if TYPE_CHECKING:
    from typing import TypeGuard  # since Python 3.10

HEADER_LIMIT = 100_000_000

_MINUS_ZERO = re.compile(rb"-0(?![.\deE])")
_OTHER_PARTS = 1000  # the header itself, its metadata, and what is told better of one that is not
_METADATA = "__metadata__"
_METADATA_START = b'"__metadata__":{'
# A tensor as the reference library writes it, with the comma that comes after it.
_SIZE = r"(?:0|[1-9][0-9]{0,18})"
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)":'
    rf'\{{("dtype":"[A-Z0-9_]+","shape":\[(?:{_SIZE}(?:,{_SIZE})*)?\]),"data_offsets":\[({_SIZE}),({_SIZE})\]\}},'
)
_ENTRY_MARKS = len('"":{,"data_offsets":[,]},')
_LENGTH_SIZE = 8
_ALIGNMENT = 8
_LARGEST = (1 << 64) - 1
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def scan(path: Path, *like: Header) -> Header:
    """Read the header of a file; the tensors come in the order of their bytes.

    Where it is, byte for byte, one of `like`, its tensors are those of this file, too, and nothing is parsed.
    An I8 tensor that the metadata calls Int4 is a qint4x2, which is how MindSpore saves one. Raises
    FormatError when the file breaks any rule of the format.
    """
    with open_to_read(path, scattered=True) as (handle, size):
        try:
            text = _read_header_text(handle, size)
            frames = ((0, hashlib.blake2b(text).digest()),)
            for other in like:
                if (other.format, other.size, other.frames) == ("safetensors", size, frames):
                    return Header(path, "safetensors", size, other.tensors, other.metadata, None, frames)
            metadata, spans = _as_plain(text) or _as_json(text)
            tensors = _tensors(spans, _LENGTH_SIZE + len(text), size)
        except Malformed as error:
            raise FormatError(f"{path}: {error}; restore the file from a good copy") from None
    return Header(path, "safetensors", size, tensors, metadata, None, frames)


def layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    """Lay out a file; wide element types come first, so that every tensor is aligned to its element size.

    The order is otherwise that of `specs`. The metadata gets `"format": "ms"`, as MindSpore writes, unless
    it has a format; `crc_num`, MindSpore's checksum of other contents, is left out. Raises FormatError when
    the format has no such element type, or a name cannot be written.
    """
    frame, spans, end = _laid_out(specs, metadata)
    tensors = {spec.name: _record(spec, len(frame) + start, spec.nbytes) for spec, start in spans}
    return FileLayout(len(frame) + end, ((0, frame),), tensors)


def size(specs: Sequence[TensorSpec]) -> int:
    """The size of the file that `layout` lays out without metadata. Raises the same errors."""
    frame, _, end = _laid_out(specs, {})
    return len(frame) + end


def _laid_out(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, list[tuple[TensorSpec, int]], int]:
    """What stands before the contents of a file, where after it each tensor begins, and where the last one ends."""
    check_names(specs)
    metadata = {"format": "ms", **metadata}
    metadata.pop("crc_num", None)
    forms: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}  # what layers repeat
    entries: list[str] = []
    spans: list[tuple[TensorSpec, int]] = []
    end = 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        name, dtype, shape = spec
        if name == _METADATA:
            raise FormatError(f"a .safetensors file cannot hold a tensor of the name {_METADATA!r}")
        if dtype.name == "qint4x2":
            metadata[name] = dtype.ckpt
        key = dtype.name, shape
        if key not in forms:
            forms[key] = f'"dtype":"{_code(spec)}","shape":{_JSON.encode(shape)}', spec.nbytes
        form, nbytes = forms[key]
        start, end = end, end + nbytes
        entries.append(f'{encode_basestring(name)}:{{{form},"data_offsets":[{start},{end}]}}')
        spans.append((spec, start))
    text = f"{{{','.join([_JSON.encode({_METADATA: metadata})[1:-1], *entries])}}}".encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise FormatError(f"the .safetensors header would take {len(text)} bytes, over {HEADER_LIMIT}")
    return len(text).to_bytes(_LENGTH_SIZE, "little") + text, spans, end


def _code(spec: TensorSpec) -> str:
    """The code of the element type; a qint4x2 is stored as I8, and marked in the metadata."""
    code = "I8" if spec.dtype.name == "qint4x2" else spec.dtype.safetensors
    if code is None:
        raise FormatError(
            f"tensor {spec.name!r}: .safetensors has no element type {spec.dtype.name}; write a .ckpt instead"
        )
    return code


def _record(spec: TensorSpec, offset: int, nbytes: int) -> TensorRecord:
    return TensorRecord(spec, (Segment(offset, nbytes),) if nbytes else ())


def _read_header_text(handle: Handle, size: int) -> bytes:
    start = pread(handle, 32, 0)
    length = int.from_bytes(start[:_LENGTH_SIZE], "little")
    if start[_LENGTH_SIZE : _LENGTH_SIZE + 1] != b"{" or length > HEADER_LIMIT:
        kind = "it looks like a .ckpt file" if start.startswith(b"\n") else describe_foreign_file(start)
        raise Malformed(f"no .safetensors file, or truncated ({size} bytes): {kind}")
    if _LENGTH_SIZE + length > size:
        raise Malformed(f"truncated: the header ends at byte {_LENGTH_SIZE + length}, the file at {size}")
    return pread(handle, length, _LENGTH_SIZE)


class _Form(NamedTuple):
    """Type and shape of a tensor, and the bytes that it needs; layers repeat them."""

    dtype: DType
    shape: tuple[int, ...]
    nbytes: int


_Span = tuple[int, int, _Form, str]  # where a tensor starts and ends in the contents, what it is, its name
_Told = tuple[dict[str, str], list[_Span]]  # what a header says: its metadata and its tensors


def _as_plain(text: bytes) -> _Told | None:
    """What a header says that is to the letter as the reference library writes it: found in a fraction of the time.

    None for any other, which may be right or wrong.
    """
    try:
        return _as_written(text)
    except (ValueError, Malformed):
        return None


def _as_written(text: bytes) -> _Told | None:
    """`_as_plain`, and ValueError or Malformed for some of the others."""
    text = text.rstrip(b" ")
    body = text[1:-1] + b","
    metadata: dict[str, str] = {}
    if body.startswith(_METADATA_START):
        end = body.index(b"},") + 2
        metadata = _check_metadata(_parse_json(b"{%s}" % body[: end - 1])[_METADATA])
        body = body[end:]
    written = body.decode()
    found = _ENTRY.findall(written)
    # Commas and brackets around the texts that were found: is there anything between them?
    is_all = sum(map(len, chain.from_iterable(found))) + _ENTRY_MARKS * len(found) == len(written)
    if not is_all or text[-1:] != b"}" or "Int4" in metadata.values():
        return None
    forms: dict[str, _Form] = {}
    spans: list[_Span] = []
    for name, kind, first, last in found:
        form = forms.get(kind)
        if form is None:
            fields = json.loads(f"{{{kind}}}")
            form = forms[kind] = _form(name, fields["dtype"], fields["shape"], False)
        spans.append((int(first), int(last), form, name))
    names = {span[3] for span in spans}
    return (metadata, spans) if len(names) == len(spans) and _METADATA not in names else None


def _as_json(text: bytes) -> _Told:
    """What a header says, however it is written. Raises Malformed."""
    fields = _parse_json(text)
    metadata = _check_metadata(fields.pop(_METADATA, None))
    forms: dict[str, _Form] = {}
    return metadata, [_check_entry(name, entry, metadata, forms) for name, entry in fields.items()]


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        # Before a parser that recurses looks at it; MindSpore raises Python's own bound. A tensor has one object and
        # two lists.
        keys = check_structure(text, 3 * text.count(b'"data_offsets"') + _OTHER_PARTS)
        hooks: dict[str, Any] = {"parse_int": _whole} if _MINUS_ZERO.search(text) else {}
        fields = json.loads(text.decode(), parse_constant=_refuse_constant, **hooks)
        if _keys_of(fields) != keys:  # some stand twice, or deeper: a parser that looks at each takes twice the time
            json.loads(text.decode(), object_pairs_hook=_unique_keys)
        if b"\\u" in text:
            json.dumps(fields, ensure_ascii=False).encode()  # an escape may be half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the header is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(fields, dict):
        raise Malformed("the header is not a JSON object")
    return fields


def _keys_of(fields: Any) -> int:
    """How many keys an object and the objects in it have together."""
    if not isinstance(fields, dict):
        return 0
    return len(fields) + sum(len(inner) for inner in fields.values() if type(inner) is dict)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {name!r} appears twice")
        fields[name] = value
    return fields


def _whole(text: str) -> float:
    """A whole number; to the reference library -0 is none."""
    return -0.0 if text == "-0" else int(text)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}  # absent or null: the same to the reference library
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Malformed(f"{_METADATA} must map strings to strings")
    return metadata


def _tensors(spans: list[_Span], base: int, size: int) -> dict[str, TensorRecord]:
    """Check that the tensors fill the bytes from `base` to `size`, each with the bytes its shape needs."""
    spans.sort(key=itemgetter(0, 1))
    tensors: dict[str, TensorRecord] = {}
    position = 0
    for start, end, (dtype, shape, nbytes), name in spans:
        if start != position:
            raise Malformed(f"tensor {name!r} begins at byte {start} of the contents, not at {position}")
        if nbytes != end - start:
            raise Malformed(f"tensor {name!r} ({dtype.name}, shape {shape}) needs {nbytes} bytes and has {end - start}")
        tensors[name] = _record(TensorSpec(name, dtype, shape), base + start, nbytes)
        position = end
    if base + position != size:
        raise Malformed(f"the contents end at byte {base + position}, the file at byte {size}")
    return tensors


def _check_entry(name: str, entry: Any, metadata: dict[str, str], forms: dict[str, _Form]) -> _Span:
    """The span of a tensor. `forms` keeps what other tensors are."""
    if not isinstance(entry, dict):
        raise Malformed(f"the entry of tensor {name!r} is not a JSON object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if type(code) is not str or not _are_two_sizes(offsets):
        raise Malformed(f"the entry of tensor {name!r} is not of the form dtype, shape, data_offsets")
    is_packed = code == "I8" and metadata.get(name) == "Int4"
    key = f"{is_packed} {code} {shape!r}"  # not the list: True and 1.0 are equal to 1
    form = forms.get(key)
    if form is None:
        if not _are_sizes(shape):
            raise Malformed(f"the entry of tensor {name!r} is not of the form dtype, shape, data_offsets")
        form = forms[key] = _form(name, code, shape, is_packed)
    return offsets[0], offsets[1], form, name


def _form(name: str, code: str, shape: Sequence[int], is_packed: bool) -> _Form:
    try:
        dtype = by_name("qint4x2") if is_packed else from_safetensors(code)
    except FormatError as error:
        raise Malformed(f"tensor {name!r}: {error}") from None
    check_shape(name, shape, dtype.itemsize)
    return _Form(dtype, tuple(shape), math.prod(shape) * dtype.itemsize)


def _are_two_sizes(numbers: object) -> TypeGuard[list[int]]:
    if type(numbers) is not list or len(numbers) != 2:
        return False
    first, last = numbers
    return type(first) is int and type(last) is int and 0 <= first <= _LARGEST and 0 <= last <= _LARGEST


def _are_sizes(numbers: object) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n <= _LARGEST for n in numbers)
