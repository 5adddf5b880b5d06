"""The closed set of what a plan computes on the way: casts, dequantised FP8 blocks, merged LoRA branches, constants."""

from __future__ import annotations

from typing import NamedTuple, Union

from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box


class Cast(NamedTuple):
    """The source holds another floating-point type than the target."""

    dtype: DType


class Dequantise(NamedTuple):
    """The source is FP8, with a factor for every block of rows and columns.

    Attributes:
        dtype: of the source.
        scale_file, scale: the file (an index into the plan's list) and the tensor of the factors.
        matrix: rows and columns of the source tensor.
        block: rows and columns that share a factor; the last blocks may be smaller.
        scale_dtype: of the factors: single precision, or a type whose numbers are all exact in it.
    """

    dtype: DType
    scale_file: int
    scale: str
    matrix: tuple[int, int]
    block: tuple[int, int]
    scale_dtype: DType

    @property
    def scale_shape(self) -> tuple[int, int]:
        return -(-self.matrix[0] // self.block[0]), -(-self.matrix[1] // self.block[1])


class Piece(NamedTuple):
    """A tensor of a file (an index into the plan's list) that is, perhaps reshaped, a box of a factor."""

    file: int
    tensor: str
    box: Box


class Factor(NamedTuple):
    """A matrix of a LoRA branch, put together from pieces; what none of them holds is zero.

    Attributes:
        dtype: of the pieces.
        shape: rows and columns.
        view: a row-major reshape of the matrix, in which the boxes of the pieces lie.
    """

    dtype: DType
    shape: tuple[int, int]
    view: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Merge(NamedTuple):
    """The source is a weight without its LoRA branch: the target is W + scaling · up · down.

    Attributes:
        dtype: of the weight, before and after.
        up, down: the factors B [rows, rank] and A [rank, columns].
    """

    dtype: DType
    up: Factor
    down: Factor
    scaling: float


class Constant(NamedTuple):
    """The elements are not a tensor of a file: counters of the training that a checkpoint keeps as text.

    Attributes:
        dtype: of the elements.
        content: their bytes.
    """

    dtype: DType
    content: bytes


Compute = Union[Cast, Dequantise, Merge, Constant]


def files_of(compute: Compute | None) -> set[int]:
    """The files (indices) that a computation reads beside that of its place."""
    if isinstance(compute, Dequantise):
        return {compute.scale_file}
    if isinstance(compute, Merge):
        return {piece.file for factor in (compute.up, compute.down) for piece in factor.pieces}
    return set()
