"""A tensor as it is cut on both sides of a plan: boxes, ranks, and the bytes that go from one to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, did_you_mean
from mindformers_ckpt.geometry.box import Box, BoxIndex
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, Transfer
from mindformers_ckpt.sources.listing import rank_of
from mindformers_ckpt.words import shortened


class Drawn(NamedTuple):
    """A box of one side, and the ranks that hold it: of the source the one whose file is read."""

    box: Box
    ranks: tuple[int, ...]


class Flow(NamedTuple):
    """Bytes that go from a source rank to a target rank."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Picture:
    """One tensor of a plan.

    Attributes:
        name, dtype, shape, nbytes: of the whole tensor.
        source, target: the boxes of both sides, in order.
        origins: for every target box the numbers of the source boxes that it is made of.
        flows: bytes by source and target rank; a replica counts for each rank that gets it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    source: tuple[Drawn, ...]
    target: tuple[Drawn, ...]
    origins: tuple[tuple[int, ...], ...]
    flows: tuple[Flow, ...]

    @property
    def moved(self) -> int:
        """Bytes whose source rank has another number than the target rank."""
        return sum(flow.nbytes for flow in self.flows if flow.source != flow.target)

    @property
    def axes(self) -> tuple[int | None, int | None]:
        """The two axes to draw, down and across: those that are cut, else the first ones."""
        cut = [axis for axis in range(len(self.shape)) if len(self._starts(axis)) > 1]
        if len(cut) < 2:
            cut = sorted({*cut, *list(range(len(self.shape)))[: 2 - len(cut) + sum(axis < 2 for axis in cut)]})
        if len(cut) > 2:  # the two with the most pieces
            cut = sorted(sorted(cut, key=lambda axis: -len(self._starts(axis)))[:2])
        return (cut[0] if cut else None, cut[1] if len(cut) > 1 else None)

    def _starts(self, axis: int) -> set[int]:
        return {drawn.box.start[axis] for drawn in (*self.source, *self.target)}


def rank_of_file(file: SourceFile) -> int:
    """The rank of a source file by its folder; 0 for complete weights."""
    rank = rank_of(file.path.parent)
    return 0 if rank is None else rank


def picture(plan: Plan, name: str) -> Picture:
    """The picture of a tensor. Raises PlanError when the plan has none of that name."""
    found = next((transfer for transfer in plan.transfers if transfer.name == name), None)
    if found is None:
        names = [transfer.name for transfer in plan.transfers]
        parts = [known for known in names if name in known]
        like = "" if parts else did_you_mean(name, names)
        hint = like or f" {'Similar are' if parts else 'There are'} {shortened(parts or names, 8)}"
        raise PlanError(f"no tensor is called {name!r}.{hint}")
    return _picture(plan, found)


def _picture(plan: Plan, transfer: Transfer) -> Picture:
    sources = [rank_of_file(file) for file in plan.sources]
    targets = [file.rank for file in plan.targets]
    source = _drawn(transfer.sources, sources)
    target = _drawn(transfer.targets, targets)
    index = BoxIndex([drawn.box for drawn in source])
    origins = tuple(tuple(index.meeting(drawn.box)) for drawn in target)
    flows = tuple(Flow(*pair, nbytes) for pair, nbytes in sorted(_flows(transfer, source, target, origins).items()))
    size = Box.whole(transfer.shape).volume * transfer.dtype.itemsize
    return Picture(transfer.name, transfer.dtype.name, transfer.shape, size, source, target, origins, flows)


def _drawn(places: Sequence[Place], ranks: Sequence[int]) -> tuple[Drawn, ...]:
    held: dict[Box, list[int]] = {}
    for place in places:
        held.setdefault(place.box, []).append(ranks[place.file])
    return tuple(Drawn(box, tuple(sorted(set(found)))) for box, found in sorted(held.items()))


def _flows(
    transfer: Transfer, source: Sequence[Drawn], target: Sequence[Drawn], origins: Sequence[Sequence[int]]
) -> dict[tuple[int, int], int]:
    flows: dict[tuple[int, int], int] = {}
    for drawn, numbers in zip(target, origins):
        for number in numbers:
            common = source[number].box.intersect(drawn.box)
            if common is not None:
                for rank in drawn.ranks:
                    key = (source[number].ranks[0], rank)
                    flows[key] = flows.get(key, 0) + common.volume * transfer.dtype.itemsize
    return flows


def traffic(plan: Plan) -> dict[tuple[int, int], int]:
    """Bytes by source and target rank, of the whole plan. Tensors that are cut alike are looked at once."""
    elements: dict[object, tuple[Transfer, int]] = {}
    for transfer in plan.transfers:
        key = (transfer.shape, transfer.sources, transfer.targets)
        first, size = elements.get(key, (transfer, 0))
        elements[key] = first, size + transfer.dtype.itemsize
    total: dict[tuple[int, int], int] = {}
    for transfer, size in elements.values():
        for flow in _picture(plan, transfer).flows:
            pair = (flow.source, flow.target)
            total[pair] = total.get(pair, 0) + flow.nbytes // transfer.dtype.itemsize * size
    return total


class Grid(NamedTuple):
    """One side as rows and columns of cells; a cell is the numbers of its boxes. `more` is what is left out."""

    rows: list[str]
    columns: list[str]
    cells: list[list[tuple[int, ...]]]
    more: str


def grid(boxes: Sequence[Box], axes: tuple[int | None, int | None], limit: tuple[int, int]) -> Grid:
    """Boxes in their order along two axes; at most `limit` rows and columns."""
    down, across = (_intervals(boxes, axis) for axis in axes)
    cells: dict[tuple[int, int], list[int]] = {}
    for number, box in enumerate(boxes):
        row = 0 if axes[0] is None else down.index((box.start[axes[0]], box.stop[axes[0]]))
        column = 0 if axes[1] is None else across.index((box.start[axes[1]], box.stop[axes[1]]))
        cells.setdefault((row, column), []).append(number)
    rows, columns = range(min(limit[0], len(down))), range(min(limit[1], len(across)))
    left = " and ".join(_left(down, limit[0], "rows") + _left(across, limit[1], "columns"))
    return Grid(
        [f"{first}:{last}" for first, last in down[: len(rows)]],
        [f"{first}:{last}" for first, last in across[: len(columns)]],
        [[tuple(cells.get((row, column), ())) for column in columns] for row in rows],
        f"… {left} more" if left else "",
    )


def _intervals(boxes: Sequence[Box], axis: int | None) -> list[tuple[int, int]]:
    return [(0, 1)] if axis is None else sorted({(box.start[axis], box.stop[axis]) for box in boxes})


def _left(intervals: Sequence[object], limit: int, what: str) -> list[str]:
    return [f"{len(intervals) - limit} {what}"] if len(intervals) > limit else []
