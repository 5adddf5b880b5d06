"""The few things that are computed on the way: casts, and the dequantisation of FP8 blocks.

Values come and go as the bytes of their element type (see `DType.carrier`); results are rounded once, from
the exact or the single-precision value.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.box import Box
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import DType

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

FLOATS = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


class Cast(NamedTuple):
    """The source holds another floating-point type than the target."""

    dtype: DType


class Dequantise(NamedTuple):
    """The source is FP8, with one single-precision factor for every block of rows and columns.

    Attributes:
        dtype: of the source.
        scale_file, scale: the file (an index into the plan's list) and the tensor of the factors.
        matrix: rows and columns of the source tensor.
        block: rows and columns that share a factor; the last blocks may be smaller.
    """

    dtype: DType
    scale_file: int
    scale: str
    matrix: tuple[int, int]
    block: tuple[int, int]

    @property
    def scale_shape(self) -> tuple[int, int]:
        return -(-self.matrix[0] // self.block[0]), -(-self.matrix[1] // self.block[1])


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

    numbers = _fp8_values(task.dtype.name)[values.view(np.uint8)]
    rows, columns = _matrix_indices(part, view_shape, task.matrix)
    numbers *= scale[rows // task.block[0], columns // task.block[1]]
    return _converted(numbers, target)


def _converted(numbers: Array, target: DType) -> Array:
    import numpy as np

    with np.errstate(all="ignore"):
        result = numbers.astype(_numeric(target.name))
        too_large = np.isfinite(numbers) & ~np.isfinite(result)
    if too_large.any():
        largest = np.abs(numbers[too_large]).max()
        raise TransferError(f"a value of magnitude {float(largest):g} does not fit {target.name}; choose bf16 or fp32")
    return result.view(target.carrier)


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
