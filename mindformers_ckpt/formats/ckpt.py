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

import math
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats.dtypes import DType, from_ckpt
from mindformers_ckpt.formats.guesses import Pieces
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

VALUE = 0x0A
TAG = 0x0A
TENSOR = 0x12
MAP_TENSOR = 0x1A
DIMENSION = 0x08
TYPE = 0x12
CONTENT = 0x1A

TRAILER_MARK = b"crc_num"
TRAILER_SIZE = len(TRAILER_MARK) + 10
_CIPHER_MARKS = (b"\xd8\x5e\x3a\x7f", b"\xd9\x5e\x3a\x7f", b"\xda\x5e\x3a\x7f")  # AES-GCM, AES-CBC, SM4-CBC

_RESTORE = "the file is damaged or no MindSpore checkpoint, restore it from a good copy"

# By how many bytes after the name it is guessed what comes before the content: its size and the first dimension.
_LIKELY = 8
_WINDOW = 512
_HEAD_LIMIT = 256 * 1024
# Heads with less between them are read with it: on a network disk a request costs more than these bytes.
_GAP = 16 * 1024
_SPAN_LIMIT = 1024 * 1024


def scan(path: Path, *like: Header) -> Header:
    """Read the heads of all records; contents are hopped over.

    Where they are, byte for byte, those of one of `like`, its tensors are those of this file, too, and
    nothing is parsed: the files of a stage differ in their contents only.

    `dims` of none or [0] are a scalar; [0] with an empty content is a tensor of shape (0,). The shape of a
    `str` is its bytes (MindSpore ignores the dims of one). A file cut off exactly between two tensors
    cannot be told from a complete one. Raises FormatError.
    """
    with open_to_read(path, scattered=True) as (handle, size), closing(Pieces(handle, size)) as pieces:
        scanner = _Scanner(path, pieces, size)
        for other in like:
            if scanner.has_heads_of(other):
                return Header(path, "ckpt", size, other.tensors, {}, scanner.trailer(), other.frames)
        scanner.check_start()
        tensors = scanner.tensors()
        crc = scanner.trailer()
    return Header(path, "ckpt", size, tensors, {}, crc, tuple(scanner.frames))


class _Form(NamedTuple):
    """What stands between the name and the content of a record; layers repeat it, byte for byte."""

    raw: bytes
    dtype: DType
    shape: tuple[int, ...]
    length: int
    nbytes: int  # of the whole tensor, of which this may be a part


_Head = tuple[str, _Form, int]  # the name of a record, what stands after it, and where the content begins


class _Scanner:
    """One pass over the records of an open file."""

    __slots__ = (
        "_base",
        "_forms",
        "_last_good",
        "_path",
        "_pieces",
        "_position",
        "_size",
        "_tail",
        "_window",
        "frames",
    )

    def __init__(self, path: Path, pieces: Pieces, size: int) -> None:
        self._path = path
        self._pieces = pieces
        self._size = size
        self._window = b""
        self._base = 0
        self._position = 0
        self._last_good: str | None = None
        self._tail = b""  # what stands in the place of a trailer, once it was read
        self._forms: dict[bytes, _Form] = {}
        self.frames: list[tuple[int, bytes]] = []

    def has_heads_of(self, other: Header) -> bool:
        """Whether the records begin as those of another file of the same size; then they count as read."""
        if (other.format, other.size) != ("ckpt", self._size):
            return False
        end = self._size - (0 if other.crc is None else TRAILER_SIZE)
        spans = _spans(other.frames)
        ranges = [(start, length) for start, length, _ in spans]
        contents = self._pieces.read_all(ranges if other.crc is None else [*ranges, (end, TRAILER_SIZE)])
        for (_, _, heads), data in zip(spans, contents):
            if any(data[at : at + len(head)] != head for at, head in heads):
                return False
        self._tail = next(contents, b"")
        if other.crc is not None and not self._is_trailer(end):
            return False
        self._position, self._last_good = end, next(reversed(other.tensors), None)
        return True

    def check_start(self) -> None:
        """Refuse encrypted and foreign files by their first bytes."""
        start = self._window = self._pieces.read(0, _WINDOW)
        if start.startswith(_CIPHER_MARKS):
            raise FormatError(
                f"{self._path}: the file is encrypted; load it with mindspore.load_checkpoint(..., "
                "dec_key=...) and save it without a key"
            )
        if start[:1] == bytes([VALUE]):
            return
        if start[8:9] == b"{":
            kind = "it looks like a .safetensors file, and should be named so"
        elif start.startswith((b"\x08", b"\x12", b"{")):
            kind = "it looks like a strategy file"
        else:
            kind = describe_foreign_file(start)
        raise FormatError(f"{self._path}: no MindSpore checkpoint: {kind}")

    def tensors(self) -> dict[str, TensorRecord]:
        """Join the records of each tensor, and check their bytes against its shape."""
        tensors: dict[str, TensorRecord] = {}
        current: TensorSpec | None = None
        segments: list[Segment] = []
        missing = 0
        for name, form, offset in self._heads():
            if current is None or name != current.name:
                if missing:
                    break
                if name in tensors:
                    raise self._error(f"tensor {name!r} appears a second time")
                current, segments, missing = TensorSpec(name, form.dtype, form.shape), [], form.nbytes
            elif (form.dtype, form.shape) != (current.dtype, current.shape):
                raise self._error(f"the records of tensor {name!r} differ in dims or type")
            missing -= form.length
            if missing < 0:
                raise self._error(f"{_describe(current)} has {-missing} bytes too many")
            if form.length:
                segments.append(Segment(offset, form.length))
            if not missing:
                tensors[name] = TensorRecord(current, tuple(segments))
                self._last_good = name
        if current and missing:
            raise self._error(f"{_describe(current)} lacks {missing} bytes")
        return tensors

    def trailer(self) -> int | None:
        """The CRC-32 that stands after the records, None when the records fill the file."""
        if self._position == self._size:
            return None
        crc = int.from_bytes(self._tail[len(TRAILER_MARK) :], "big")
        if crc >> 32:
            raise self._error("the CRC-32 in the trailer is over 32 bits")
        return crc

    def _heads(self) -> Iterator[_Head]:
        frames, met = self.frames, self._pieces.met
        trailer = self._size - TRAILER_SIZE
        try:
            while self._position < self._size and not (self._position == trailer and self._is_trailer(trailer)):
                start, base = self._position, self._base
                try:
                    name, form, offset = head = self._parsed(start - base)
                except IndexError:
                    self._widen()
                    continue
                frames.append((start, self._window[start - base : offset - base]))
                yield head
                self._position = end = offset + form.length
                met(name, start, offset, end)
        except Malformed as error:
            raise self._error(*error.args) from None

    def _is_trailer(self, position: int) -> bool:
        if self._size - position != TRAILER_SIZE:
            return False
        self._tail = self._tail or self._pieces.read(position, TRAILER_SIZE)
        return self._tail.startswith(TRAILER_MARK)

    def _widen(self) -> None:
        """Read a window that begins at the position; a longer one when it begins there already."""
        known = len(self._window) if self._base == self._position else 0
        if known >= _HEAD_LIMIT:
            raise Malformed(f"the name and dims of a record take over {_HEAD_LIMIT} bytes")
        self._base = self._position
        self._window = b"" if known else self._pieces.window(self._base)
        if not self._window:
            self._window = self._pieces.read(self._base, max(self._pieces.least, 8 * known))
        if len(self._window) <= known:
            raise Malformed("the file ends inside a record: it is truncated")

    def _parsed(self, at: int) -> _Head:
        """The head of the record at `at` of the window.

        Raises IndexError when the window ends before the head does, Malformed when it is no head.
        """
        window, base = self._window, self._base
        if window[at] != VALUE:
            raise Malformed("no record begins here")
        length, at = _varint(window, at + 1)
        end = at + length
        if base + end > self._size:
            raise Malformed(f"a record of {length} bytes reaches over the end of the file: it is truncated")
        raw_name, at = _field(window, at, end, TAG)
        name = _text(raw_name)
        likely = window[at : at + _LIKELY]
        form = self._forms.get(likely)
        if form is None or not window.startswith(form.raw, at) or at + len(form.raw) + form.length != end:
            form = self._forms[likely] = _parse_form(window, at, end, name)
        return name, form, end - form.length + base

    def _error(self, what: str, advice: str = _RESTORE) -> FormatError:
        after = "before any tensor" if self._last_good is None else f"last good tensor {self._last_good!r}"
        return FormatError(f"{self._path}: {what} (at byte {self._position} of {self._size}, {after}); {advice}")


@lru_cache(maxsize=64)  # the files of a stage are compared with the same heads
def _spans(frames: tuple[tuple[int, bytes], ...]) -> list[tuple[int, int, list[tuple[int, bytes]]]]:
    """What to read of a file to compare its heads: (offset, length, heads), and the heads by their place in it."""
    spans: list[tuple[int, int, list[tuple[int, bytes]]]] = []
    for offset, head in frames:
        end = offset + len(head)
        if spans:
            start, length, heads = spans[-1]
            if offset - start - length <= _GAP and end - start <= _SPAN_LIMIT:
                heads.append((offset - start, head))
                spans[-1] = start, end - start, heads
                continue
        spans.append((offset, len(head), [(0, head)]))
    return spans


def _parse_form(window: bytes, start: int, end: int, name: str) -> _Form:
    """Parse what comes after the name of a tensor in its record, which ends at `end`."""
    if window[start] == MAP_TENSOR:
        raise Malformed(f"{name!r} is a MapParameter (hash table)", "save the checkpoint without it")
    at = _enter(window, start, end, TENSOR)
    dims: list[int] = []
    while window[at] == DIMENSION:
        dimension, at = _varint(window, at + 1)
        if dimension >> 63:
            raise Malformed(f"tensor {name!r} has a negative dimension")
        dims.append(dimension)
    raw_type, at = _field(window, at, end, TYPE)
    at = _enter(window, at, end, CONTENT)
    try:
        dtype = from_ckpt(_text(raw_type))
    except FormatError as error:
        raise Malformed(f"tensor {name!r}: {error}", "save it with a known type") from None
    length = end - at
    shape = tuple(dims)
    if dtype.name == "str":
        shape = (length,)
    elif shape == (0,) and length:
        shape = ()
    check_shape(name, shape, dtype.itemsize)
    return _Form(window[start:at], dtype, shape, length, math.prod(shape) * dtype.itemsize)


def _enter(window: bytes, at: int, end: int, key: int) -> int:
    """The start of the field `key`, the last one of its message, which must reach exactly to `end`."""
    if window[at] != key:
        raise Malformed(f"a record lacks field {key >> 3} where it must stand")
    length, at = _varint(window, at + 1)
    if at + length != end:
        raise Malformed("the lengths in a record contradict each other")
    return at


def _field(window: bytes, at: int, end: int, key: int) -> tuple[bytes, int]:
    """The bytes of the field `key` at `at`, and where the next one begins, which must lie in the window."""
    if window[at] != key:
        raise Malformed(f"a record lacks field {key >> 3} where it must stand")
    length, at = _varint(window, at + 1)
    stop = at + length
    if stop > end:
        raise Malformed("the lengths in a record contradict each other")
    if stop >= len(window):
        raise IndexError
    return window[at:stop], stop


def _varint(window: bytes, at: int) -> tuple[int, int]:
    """The base-128 number at `at`, and where it ends."""
    byte = window[at]
    if byte < 0x80:
        return byte, at + 1
    value = byte & 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = window[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise Malformed("a number in a record is longer than 10 bytes")


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Malformed(f"a name in a record is not UTF-8: {raw[:40]!r}") from None


def _describe(spec: TensorSpec) -> str:
    return f"tensor {spec.name!r} ({spec.dtype.ckpt}, shape {spec.shape}, {spec.nbytes} bytes)"
