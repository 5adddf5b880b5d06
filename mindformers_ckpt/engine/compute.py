"""The few things that are computed on the way: casts, the dequantisation of FP8 blocks, merged LoRA branches.

Values come and go as the bytes of their element type (see `DType.carrier`); results are rounded once, from
the exact or the single-precision value.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Dequantise, Factor, Merge

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

# All bits of the exponent set: infinite, or no number.
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
# target -> types whose every number it holds
_WITHIN = {
    "bfloat16": ("float8_e4m3fn", "float8_e5m2"),
    "float32": ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    "float64": ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"),
}
# Rows of B and columns of A that are multiplied at a time.
UP_TILE, DOWN_TILE = (64, 1), (1, 256)
_STRIP_ELEMENTS = 64 << 10
FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


def cast(values: Array, source: DType, target: DType) -> Array:
    """The same numbers in another floating-point type, rounded to the nearest, ties to even.

    Raises TransferError when a finite number does not fit the target type.
    """
    return _converted(values.view(_numeric(source.name)), target)


def dequantise(
    values: Array, task: Dequantise, part: Box, view_shape: tuple[int, ...], scale: Array, target: DType
) -> Array:
    """The numbers of a part (a box of a view of the source matrix) times their blocks' factors."""
    import numpy as np

    rows, columns = (index.ravel() for index in _matrix_indices(part, view_shape, task.matrix))
    codes, table = values.view(np.uint8).reshape(len(rows), len(columns)), _fp8_values(task.dtype.name)
    row_blocks = rows // task.block[0]  # the least one comes first, the greatest last
    factors = scale[row_blocks[0] : row_blocks[-1] + 1].take(columns // task.block[1], axis=1)
    result = np.empty(codes.shape, target.carrier)
    # A strip stays in the processor's cache in all the forms that it goes through.
    height = max(1, _STRIP_ELEMENTS // len(columns))
    for first in range(0, len(rows), height):
        strip = slice(first, first + height)
        numbers = table.take(codes[strip])
        numbers *= factors.take(row_blocks[strip] - row_blocks[0], axis=0)
        result[strip] = _converted(numbers, target)
    return result.reshape(values.shape)


def scale_values(values: Array, dtype: DType) -> Array:
    """The factors of an FP8 tensor, given as bytes of their type, in single precision."""
    import numpy as np

    return values.view(_numeric(dtype.name)).astype(np.float32, copy=False)


def factor_values(values: Array, factor: Factor, tile: tuple[int, int]) -> Array:
    """The elements of a factor's view as a matrix in single precision, filled up with zeros to whole tiles."""
    import numpy as np

    padded = np.zeros([-(-extent // size) * size for extent, size in zip(factor.shape, tile)], np.float32)
    padded[: factor.shape[0], : factor.shape[1]] = values.view(_numeric(factor.dtype.name)).reshape(factor.shape)
    return padded


def merge(values: Array, task: Merge, part: Box, up: Array, down: Array) -> Array:
    """A part of a weight (a box of the whole matrix) with its LoRA branch added, as bytes of the weight's type.

    `up` and `down` are what `factor_values` makes with UP_TILE and DOWN_TILE. Computed in single precision and
    rounded once. The product is taken in tiles of one size that lie where they do for every part, so that an
    element does not depend on how a weight is cut: matrix products of other shapes may add in another order.

    Raises TransferError when a sum does not fit the type.
    """
    import numpy as np

    height, width = UP_TILE[0], DOWN_TILE[1]
    left, right = part.start[1] // width * width, -(-part.stop[1] // width) * width
    columns = down[:, left:right].reshape(len(down), -1, width).transpose(1, 0, 2)
    result = np.empty(part.shape, task.dtype.carrier)
    for top in range(part.start[0] // height * height, part.stop[0], height):
        covered = Box((top, left), (top + height, right))
        strip = covered.intersect(part)
        assert strip is not None
        with np.errstate(all="ignore"):
            product = np.matmul(up[top : top + height], columns).transpose(1, 0, 2).reshape(covered.shape)
            product *= np.float32(task.scaling)
        index = strip.relative_to(part).slices()
        numbers = product[strip.relative_to(covered).slices()]
        numbers += values[index].view(_numeric(task.dtype.name))
        result[index] = _converted(numbers, task.dtype)
    return result


def _converted(numbers: Array, target: DType) -> Array:
    """Numbers of a numpy type as the bytes of another type."""
    import numpy as np

    with np.errstate(all="ignore"):
        result = numbers.astype(_numeric(target.name)).view(target.carrier)
        if numbers.dtype.name in _WITHIN.get(target.name, ()):
            return result
        mask = result.dtype.type(_EXPONENT[target.name])
        lost = (result & mask) == mask
        if lost.any():
            values = numbers[lost].astype(np.float64)
            values = values[np.isfinite(values)]
            if len(values):
                largest = np.abs(values).max()
                raise TransferError(f"a value of magnitude {largest:g} does not fit {target.name}; choose bf16 or fp32")
    return result


def _matrix_indices(part: Box, view_shape: tuple[int, ...], matrix: tuple[int, int]) -> tuple[Array, Array]:
    """Row and column of every element of a part of a view of a matrix, in the shape of the part or broadcast to it."""
    import numpy as np

    axes = next(
        (count for count in range(len(view_shape) + 1) if math.prod(view_shape[:count]) == matrix[0]), len(view_shape)
    )
    found = []
    for first, last in ((0, axes), (axes, len(view_shape))):
        index = np.zeros((1,) * len(view_shape), dtype=np.int64)
        for axis in range(first, last):
            along = np.arange(part.start[axis], part.stop[axis])
            index = index * view_shape[axis] + along.reshape([-1 if a == axis else 1 for a in range(len(view_shape))])
        found.append(index)
    return found[0], found[1]


def _numeric(name: str) -> np.dtype[Any]:
    """The numpy type that computes with an element type; bf16 and fp8 are those of ml_dtypes."""
    import ml_dtypes
    import numpy as np

    return np.dtype(name) if name.startswith("float") and "_" not in name else np.dtype(getattr(ml_dtypes, name))


@lru_cache(maxsize=2)
def _fp8_values(name: str) -> Array:
    """The single-precision value of each of the 256 codes of an FP8 type."""
    import numpy as np

    return np.arange(256, dtype=np.uint8).view(_numeric(name)).astype(np.float32)
