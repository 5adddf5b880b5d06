from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mindformers_ckpt.errors import FormatError
from mindformers_ckpt.formats import dtypes


@pytest.mark.parametrize(
    ("name", "itemsize", "ckpt", "safetensors"),
    [
        ("bool", 1, "Bool", "BOOL"),
        ("int8", 1, "Int8", "I8"),
        ("uint16", 2, "UInt16", "U16"),
        ("uint32", 4, "UInt32", "U32"),
        ("uint64", 8, "UInt64", "U64"),
        ("float16", 2, "Float16", "F16"),
        ("bfloat16", 2, "BFloat16", "BF16"),
        ("float64", 8, "Float64", "F64"),
        ("float8_e4m3fn", 1, "Float8E4M3FN", "F8_E4M3"),
        ("float8_e5m2", 1, "Float8E5M2", "F8_E5M2"),
        ("complex64", 8, "Complex64", "C64"),
    ],
)
def test_every_name_of_a_type_finds_it(name: str, itemsize: int, ckpt: str, safetensors: str) -> None:
    expected = (name, itemsize, ckpt, safetensors)
    assert dtypes.by_name(name) == expected
    assert dtypes.from_ckpt(ckpt) == expected
    assert dtypes.from_safetensors(safetensors) == expected


@pytest.mark.parametrize("name", ["hifloat8", "complex128", "qint4x2", "str"])
def test_types_that_safetensors_lacks(name: str) -> None:
    assert dtypes.by_name(name).safetensors is None


@pytest.mark.parametrize(
    ("name", "carrier"),
    [
        ("bool", "uint8"),
        ("bfloat16", "uint16"),
        ("float32", "uint32"),
        ("complex64", "uint64"),
        ("complex128", "V16"),
        ("str", "uint8"),
    ],
)
def test_the_carrier_has_the_size_of_the_type(name: str, carrier: str) -> None:
    dtype = dtypes.by_name(name)
    assert dtype.carrier == np.dtype(carrier)
    assert dtype.carrier.itemsize == dtype.itemsize


def test_unknown_types_are_refused_by_name() -> None:
    with pytest.raises(FormatError, match="unknown element type 'float7'"):
        dtypes.by_name("float7")
    with pytest.raises(FormatError, match=r"unknown \.ckpt element type 'float32'; known are Bool, Int8"):
        dtypes.from_ckpt("float32")
    with pytest.raises(FormatError, match=r"unknown \.safetensors element type 'F8_E8M0'"):
        dtypes.from_safetensors("F8_E8M0")


def test_reading_headers_needs_neither_numpy_nor_a_framework() -> None:
    code = (
        "import sys, mindformers_ckpt.formats as f, mindformers_ckpt.formats.ckpt, "
        "mindformers_ckpt.formats.safetensors as s; "
        "print(sorted({'numpy', 'mindspore', 'safetensors', 'google.protobuf'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
