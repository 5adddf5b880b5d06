"""Casts and FP8 blocks, element by element."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.engine.compute import cast, dequantise
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Dequantise

BF16 = ml_dtypes.bfloat16


def bits(values: Any, name: str) -> Any:
    return np.asarray(values).view(by_name(name).carrier)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # half way, to even: down
        (0x3F818000, 0x3F82),  # half way, to even: up
        (0x3F808001, 0x3F81),
        (0xBF80FFFF, 0xBF81),
        (0x7F800000, 0x7F80),  # infinite
        (0x80000000, 0x8000),  # -0
        (0x00000001, 0x0000),
    ],
)
def test_rounding_to_bf16(value: int, expected: int) -> None:
    result = cast(np.array([value], np.uint32), by_name("float32"), by_name("bfloat16"))
    assert result.tolist() == [expected]


def test_no_number_stays_none() -> None:
    values = np.array([0x7F800001, 0x7FC00000, 0xFFFFFFFF], np.uint32)
    for name in ("bfloat16", "float16", "float64"):
        result = cast(values, by_name("float32"), by_name(name))
        assert np.isnan(cast(result, by_name(name), by_name("float64")).view(np.float64)).all()


@given(st.integers(0, 0xFFFF))
def test_bf16_survives_fp32(value: int) -> None:
    wide = cast(np.array([value], np.uint16), by_name("bfloat16"), by_name("float32"))
    assert wide.tolist() == [value << 16]
    number = wide.view(np.float32)[0]
    if not np.isnan(number):
        assert cast(wide, by_name("float32"), by_name("bfloat16")).tolist() == [value]


@pytest.mark.parametrize(
    ("value", "source", "target"),
    [(65520.0, "float32", "float16"), (3.4e38, "float32", "bfloat16"), (1e300, "float64", "float32")],
)
def test_finite_numbers_that_do_not_fit(value: float, source: str, target: str) -> None:
    values = np.array([1.0, np.inf, np.nan, value], source)
    with pytest.raises(TransferError, match="does not fit"):
        cast(bits(values, source), by_name(source), by_name(target))
    cast(bits(values[:3], source), by_name(source), by_name(target))


@given(st.data())
def test_factors_belong_to_the_blocks_of_the_matrix(data: st.DataObject) -> None:
    """Any part of any view of a matrix of ragged blocks."""
    a, b, c = (data.draw(st.integers(1, 4)) for _ in "abc")
    matrix = (a * b, c)
    block = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5)))
    task = Dequantise(by_name("float8_e4m3fn"), 0, "s", matrix, block, by_name("float32"))
    codes = np.arange(a * b * c, dtype=np.uint8).reshape(matrix) * 7 % 120
    scale = np.linspace(0.5, 2, int(np.prod(task.scale_shape)), dtype=np.float32).reshape(task.scale_shape)
    factors = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[: matrix[0], :c]
    expected = (codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * factors).reshape(1, a, b, c)
    start = tuple(data.draw(st.integers(0, extent - 1)) for extent in (1, a, b, c))
    stop = tuple(data.draw(st.integers(low + 1, extent)) for low, extent in zip(start, (1, a, b, c)))
    part = Box(start, stop)
    values = codes.reshape(1, a, b, c)[part.slices()]
    for name, dtype in (("float32", np.float32), ("bfloat16", BF16)):
        found = dequantise(values, task, part, (1, a, b, c), scale, by_name(name))
        np.testing.assert_array_equal(found, bits(expected[part.slices()].astype(dtype), name))
