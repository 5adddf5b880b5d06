"""Element types: the names that `.ckpt` and `.safetensors` files give them, and their sizes.

The bytes of a tensor are never interpreted here; bf16 and fp8 need no numpy extension to be moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.errors import FormatError

if TYPE_CHECKING:
    import numpy


class DType(NamedTuple):
    """An element type: MindSpore's name, bytes an element, and its names in the two file formats.

    `safetensors` is None where that format has no such type.
    """

    name: str
    itemsize: int
    ckpt: str
    safetensors: str | None

    @property
    def carrier(self) -> numpy.dtype[Any]:
        """The numpy type that carries the bytes of one element: an unsigned integer, or V16 (complex128)."""
        import numpy as np

        return np.dtype(f"u{self.itemsize}" if self.itemsize <= 8 else f"V{self.itemsize}")


# The `.ckpt` names are what `mindspore.save_checkpoint` (2.10) writes: str(tensor.dtype). It writes complex,
# fp8 and HiFloat8 too, although its own load_checkpoint refuses them.
# `qint4x2` packs two values in a byte and counts bytes in its shape. `str` counts bytes as well: its
# content is the text in UCS-4, four bytes a character.
_DTYPES = (
    DType("bool", 1, "Bool", "BOOL"),
    DType("int8", 1, "Int8", "I8"),
    DType("int16", 2, "Int16", "I16"),
    DType("int32", 4, "Int32", "I32"),
    DType("int64", 8, "Int64", "I64"),
    DType("uint8", 1, "UInt8", "U8"),
    DType("uint16", 2, "UInt16", "U16"),
    DType("uint32", 4, "UInt32", "U32"),
    DType("uint64", 8, "UInt64", "U64"),
    DType("float16", 2, "Float16", "F16"),
    DType("bfloat16", 2, "BFloat16", "BF16"),
    DType("float32", 4, "Float32", "F32"),
    DType("float64", 8, "Float64", "F64"),
    DType("float8_e4m3fn", 1, "Float8E4M3FN", "F8_E4M3"),
    DType("float8_e5m2", 1, "Float8E5M2", "F8_E5M2"),
    DType("hifloat8", 1, "HiFloat8", None),
    DType("complex64", 8, "Complex64", "C64"),
    DType("complex128", 16, "Complex128", None),
    DType("qint4x2", 1, "Int4", None),
    DType("str", 1, "str", None),
)
_BY_NAME = {dtype.name: dtype for dtype in _DTYPES}
_BY_CKPT = {dtype.ckpt: dtype for dtype in _DTYPES}
_BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in _DTYPES if dtype.safetensors}


def by_name(name: str) -> DType:
    """Look up a type by MindSpore's name for it ("bfloat16"). Raises FormatError when unknown."""
    return _find(_BY_NAME, name, "element type")


def from_ckpt(type_name: str) -> DType:
    """Look up a type by its name in a `.ckpt` file ("BFloat16"). Raises FormatError when unknown."""
    return _find(_BY_CKPT, type_name, ".ckpt element type")


def from_safetensors(code: str) -> DType:
    """Look up a type by its code in a `.safetensors` file ("BF16").

    Raises FormatError when unknown, or when MindSpore has no such type (F8_E8M0 and the types below 8 bits).
    """
    return _find(_BY_SAFETENSORS, code, ".safetensors element type")


def _find(table: dict[str, DType], key: str, what: str) -> DType:
    dtype = table.get(key)
    if dtype is None:
        raise FormatError(f"unknown {what} {key!r}; known are {', '.join(table)}")
    return dtype
