"""Layout: how one parameter is cut over the ranks of a pipeline stage.

The rules were established on compiled MindSpore networks:

- The device matrix is row-major over the ranks of the stage (the rightmost axis varies fastest).
- A tensor-map value `m` names the device axis `len(device_matrix) - 1 - m`.
- A dimension that is cut along several axes is cut in mixed radix; the first axis listed is the most
  significant.
- An optimizer shard cuts dimension 0 of the slice that a rank already holds into `optimizer_shards`
  further pieces. A rank takes the piece of its position among the ranks that hold the same slice (sorted),
  modulo the number of pieces. -1 means as many pieces as there are such ranks.

All cuts are even, so a layout cuts a tensor into a regular grid, and a rank holds one cell of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache

from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.geometry.box import Box

# A file of a hundred bytes can name any number of ranks; what is made for each of them needs a bound.
MOST_RANKS = 1 << 20
_MOST_DIMENSIONS = 64


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut over the ranks of a stage.

    Attributes:
        device_matrix: extents of the device axes; their product is the number of ranks in the stage.
        tensor_map: for every dimension of the tensor the tensor-map values that cut it; () is not cut.
        optimizer_shards: pieces into which an optimizer shard cuts dimension 0 further; 0 and 1 for none,
            -1 for all ranks that hold the same slice (`opt_weight_shard_size` in strategy files).
        optimizer_step: `opt_weight_shard_step` as recorded; kept for writing, no rule needs it.
        flat_shape: `tensor_shape` of a JSON strategy, where a dimension that is cut along several axes is
            written as several dimensions; empty otherwise. `for_shard` and `for_whole` undo it.
    """

    device_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    optimizer_shards: int = 0
    optimizer_step: int = 0
    flat_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_bounds()
        used = [axis for axes in self.tensor_map for axis in axes]
        if any(not 0 <= axis < len(self.device_matrix) for axis in used):
            raise StrategyError(
                f"the tensor map {self.describe_map()} names an axis that the device matrix "
                f"{list(self.device_matrix)} does not have"
            )
        if len(set(used)) != len(used):
            raise StrategyError(f"the tensor map {self.describe_map()} cuts along the same axis twice")
        if self.flat_shape and len(self.flat_shape) != len(self.tensor_map):
            raise StrategyError(
                f"the tensor map {self.describe_map()} is not that of the recorded shape {list(self.flat_shape)}"
            )
        if any(extent < 0 for extent in self.flat_shape):
            raise StrategyError(f"the recorded shape {list(self.flat_shape)} has a negative dimension")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Layouts are keys of everything that is found once for all tensors that are cut alike.
        return hash((self.device_matrix, self.tensor_map, self.optimizer_shards, self.optimizer_step, self.flat_shape))

    def _check_bounds(self) -> None:
        """Refuse numbers that no job has, before anything is made for every rank of it."""
        if len(self.device_matrix) > _MOST_DIMENSIONS or len(self.tensor_map) > _MOST_DIMENSIONS:
            raise StrategyError(
                f"a device matrix of {len(self.device_matrix)} axes and a tensor map of {len(self.tensor_map)} "
                f"dimensions; at most {_MOST_DIMENSIONS} of each make sense"
            )
        if any(extent < 1 for extent in self.device_matrix):
            raise StrategyError(f"the device matrix {list(self.device_matrix)} has an axis of no ranks")
        if self.rank_count > MOST_RANKS:
            raise StrategyError(
                f"the device matrix {list(self.device_matrix)} is for {self.rank_count} ranks; "
                f"no job has more than {MOST_RANKS}"
            )
        if not -1 <= self.optimizer_shards <= self.rank_count:
            raise StrategyError(
                f"an optimizer shard of {self.optimizer_shards} pieces on {self.rank_count} ranks means nothing"
            )

    @classmethod
    def on(cls, mesh: Mapping[str, int], *dimensions: str | Sequence[str] | None, optimizer_shards: int = 0) -> Layout:
        """A layout from named axes: `Layout.on({"dp": 2, "mp": 4}, "mp", None)`.

        One argument a dimension: the axis that cuts it, several axes, or None. Raises StrategyError for an
        axis that the mesh lacks.
        """
        names = list(mesh)

        def values(dimension: str | Sequence[str] | None) -> tuple[int, ...]:
            axes = () if dimension is None else (dimension,) if isinstance(dimension, str) else dimension
            unknown = [axis for axis in axes if axis not in mesh]
            if unknown:
                raise StrategyError(f"axis {unknown[0]!r} is not in the mesh {names}")
            return tuple(len(names) - 1 - names.index(axis) for axis in axes)

        return cls(tuple(mesh.values()), tuple(map(values, dimensions)), optimizer_shards)

    @property
    def rank_count(self) -> int:
        """Number of ranks in the stage."""
        return math.prod(self.device_matrix)

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Number of even pieces of every dimension, optimizer shard included."""
        pieces = [math.prod(map(self._extent, axes)) for axes in self.tensor_map]
        if pieces:
            pieces[0] *= self.optimizer_pieces
        return tuple(pieces)

    @property
    def optimizer_pieces(self) -> int:
        """Number of pieces of the optimizer shard, 1 for none."""
        if self.optimizer_shards != -1:
            return max(1, self.optimizer_shards)
        used = math.prod(self._extent(axis) for axes in self.tensor_map for axis in axes)
        return self.rank_count // used

    @property
    def cells(self) -> tuple[tuple[int, ...], ...]:
        """The grid cell (one index a dimension) that each rank of the stage holds."""
        return _cells(self)

    def full_shape(self, shard_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole tensor, from the shape of one shard."""
        self._check_dimensions(shard_shape)
        return tuple(extent * cut for extent, cut in zip(shard_shape, self.cuts))

    def boxes(self, full_shape: Sequence[int]) -> tuple[Box, ...]:
        """The box of a tensor of `full_shape` that each rank of the stage holds.

        Raises StrategyError when a dimension does not divide into its cuts.
        """
        return _boxes(self, tuple(full_shape))

    def box(self, full_shape: Sequence[int], rank: int) -> Box:
        """The box that `rank` (counted within its stage) holds; see `boxes`."""
        return _boxes(self, tuple(full_shape))[rank]

    def shards(self, full_shape: Sequence[int]) -> tuple[tuple[Box, tuple[int, ...]], ...]:
        """The distinct boxes of a tensor, each with the ranks of the stage that hold it."""
        return _shards(self, tuple(full_shape))

    def same_slices(self, other: Layout) -> bool:
        """Whether every rank holds the same box of any tensor under both layouts."""
        return self.cuts == other.cuts and self.cells == other.cells

    def for_shard(self, shape: Sequence[int]) -> Layout:
        """The layout with one tensor-map entry a dimension, for a tensor whose shards have `shape`.

        Undoes what strategy files leave open: a JSON strategy flattens a dimension that is cut along
        several axes into several dimensions, and a protobuf strategy writes the several axes of a
        one-dimensional tensor like the axes of several dimensions. Raises StrategyError when the layout
        cannot be that of such a tensor.
        """
        return self._fitted(tuple(shape), of_shard=True)

    def for_whole(self, shape: Sequence[int]) -> Layout:
        """The layout with one tensor-map entry a dimension, for a whole tensor of `shape`; see `for_shard`."""
        return self._fitted(tuple(shape), of_shard=False)

    def _fitted(self, shape: tuple[int, ...], of_shard: bool) -> Layout:
        if not self.flat_shape:
            one_axis_each = all(len(axes) == 1 for axes in self.tensor_map)
            if len(shape) == 1 < len(self.tensor_map) and one_axis_each:
                return replace(self, tensor_map=(tuple(axes[0] for axes in self.tensor_map),))
            self._check_dimensions(shape)
            return self
        fitting = self._foldings(shape, of_shard)
        if not fitting:
            raise StrategyError(
                f"the strategy records the shape {list(self.flat_shape)} ({self.describe()}), which does not go "
                f"with {list(shape)}"
            )
        if len(fitting) > 1:
            raise StrategyError(
                f"the JSON layout ({self.describe()}, flattened shape {list(self.flat_shape)}) fits {list(shape)} "
                "in more than one way; save the strategy in the .ckpt flavour instead"
            )
        return replace(self, tensor_map=fitting[0], flat_shape=())

    def _foldings(self, shape: tuple[int, ...], of_shard: bool) -> list[tuple[tuple[int, ...], ...]]:
        """The tensor maps of joining flattened dimensions to those of a tensor or shard of `shape`; at most two.

        Of the dimensions that become one, all but the last are cut into pieces of one index. There are
        exponentially many ways to join them, so those of the last dimensions are found first and kept.
        """
        pieces = [math.prod(map(self._extent, axes)) for axes in self.tensor_map]

        def extent_of(first: int, last: int, dimension: int) -> int:
            extent = math.prod(self.flat_shape[first:last])
            if not of_shard:
                return extent
            return extent // (math.prod(pieces[first:last]) * (self.optimizer_pieces if dimension == 0 else 1))

        @cache
        def joined(first: int, dimension: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
            if dimension == len(shape):
                return ((),) if first == len(pieces) else ()
            found: dict[tuple[tuple[int, ...], ...], None] = {}
            for last in range(first + 1, len(pieces) + 1):
                if last - first > 1 and self.flat_shape[last - 2] != pieces[last - 2]:
                    break
                if extent_of(first, last, dimension) == shape[dimension]:
                    axes = sum(self.tensor_map[first:last], ())
                    found.update(dict.fromkeys((axes, *rest) for rest in joined(last, dimension + 1)))
            return tuple(found)[:2]

        return list(joined(0, 0)) if shape else []

    def _extent(self, axis: int) -> int:
        return self.device_matrix[len(self.device_matrix) - 1 - axis]

    def _check_dimensions(self, shape: Sequence[int]) -> None:
        if len(shape) != len(self.tensor_map):
            raise StrategyError(
                f"the layout ({self.describe()}) is that of a tensor of {len(self.tensor_map)} dimensions, "
                f"but the shape is {list(shape)}"
            )

    def describe_map(self) -> str:
        """The tensor map as strategy files write it."""
        return str([-1 if not axes else axes[0] if len(axes) == 1 else list(axes) for axes in self.tensor_map])

    def describe(self) -> str:
        """One line for messages."""
        text = f"device matrix {list(self.device_matrix)}, tensor map {self.describe_map()}"
        return text + (f", optimizer shard {self.optimizer_shards}" if self.optimizer_shards else "")


@lru_cache(maxsize=4096)
def without_optimizer_shards(layout: Layout) -> Layout:
    """The same cuts with the optimizer shard as further axes of dimension 0, the last ones that cut nothing yet.

    An axis of which a part is enough becomes two. Raises StrategyError where the pieces are not a product of axes.
    """
    left = layout.optimizer_pieces
    if left == 1:
        return replace(layout, optimizer_shards=0, optimizer_step=0)
    used = {len(layout.device_matrix) - 1 - axis for axes in layout.tensor_map for axis in axes}
    matrix: list[int] = []  # from the last axis on
    taken: list[int] = []
    moved: dict[int, int] = {}  # value of the tensor map -> that in the new matrix
    for position in reversed(range(len(layout.device_matrix))):
        extent = layout.device_matrix[position]
        part = 1 if position in used else math.gcd(extent, left)
        if 1 < part < extent:
            taken.append(len(matrix))
            matrix += [part, extent // part]
        else:
            moved[len(layout.device_matrix) - 1 - position] = len(matrix)
            taken += [len(matrix)] if part > 1 else []
            matrix.append(extent)
        left //= part
    rows = [tuple(moved[axis] for axis in axes) for axes in layout.tensor_map]
    plain = Layout(tuple(reversed(matrix)), ((*rows[0], *reversed(taken)), *rows[1:]))
    if not plain.same_slices(layout):
        raise StrategyError(f"its optimizer shard ({layout.describe()}) is not a cut along axes of the device matrix")
    return plain


@lru_cache(maxsize=4096)
def _cells(layout: Layout) -> tuple[tuple[int, ...], ...]:
    matrix, count = layout.device_matrix, layout.rank_count
    coordinates = [_coordinates(rank, matrix) for rank in range(count)]
    sliced: list[tuple[int, ...]] = []
    for coordinate in coordinates:
        indices: list[int] = []
        for axes in layout.tensor_map:
            index = 0
            for axis in axes:
                position = len(matrix) - 1 - axis
                index = index * matrix[position] + coordinate[position]
            indices.append(index)
        sliced.append(tuple(indices))
    pieces = layout.optimizer_pieces
    if pieces == 1:
        return tuple(sliced)
    if not layout.tensor_map:
        raise StrategyError(f"a scalar cannot have an optimizer shard of {pieces} pieces")
    holders: dict[tuple[int, ...], int] = {}
    cells = []
    for cell in sliced:
        position = holders.get(cell, 0)
        holders[cell] = position + 1
        cells.append((cell[0] * pieces + position % pieces, *cell[1:]))
    if min(holders.values()) < pieces:
        raise StrategyError(
            f"{layout.describe()}: only {min(holders.values())} ranks hold the same slice, "
            f"so nobody would hold some of the {pieces} pieces"
        )
    return tuple(cells)


@lru_cache(maxsize=4096)
def _boxes(layout: Layout, full_shape: tuple[int, ...]) -> tuple[Box, ...]:
    layout._check_dimensions(full_shape)
    cuts = layout.cuts
    for extent, cut in zip(full_shape, cuts):
        if extent % cut:
            raise StrategyError(
                f"a tensor of shape {list(full_shape)} cannot be cut evenly by {layout.describe()}: "
                f"a dimension of {extent} is to be cut into {cut} pieces"
            )
    pieces = _divided(full_shape, cuts)
    by_cell: dict[tuple[int, ...], Box] = {}
    for cell in layout.cells:
        if cell not in by_cell:
            start = tuple(index * piece for index, piece in zip(cell, pieces))
            by_cell[cell] = Box(start, tuple(map(sum, zip(start, pieces))))
    return tuple(by_cell[cell] for cell in layout.cells)


@lru_cache(maxsize=4096)
def _shards(layout: Layout, full_shape: tuple[int, ...]) -> tuple[tuple[Box, tuple[int, ...]], ...]:
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(_boxes(layout, full_shape)):
        holders.setdefault(box, []).append(rank)
    return tuple((box, tuple(ranks)) for box, ranks in holders.items())


def _divided(shape: Sequence[int], cuts: Sequence[int]) -> tuple[int, ...]:
    return tuple(extent // cut for extent, cut in zip(shape, cuts))


def _coordinates(rank: int, matrix: Sequence[int]) -> tuple[int, ...]:
    coordinate = []
    for extent in reversed(matrix):
        rank, index = divmod(rank, extent)
        coordinate.append(index)
    return tuple(reversed(coordinate))
