"""Plan: which bytes of which source files make which target files.

A plan is data. It is built from headers and strategies, checked before anything is written, can be priced,
printed and cut up, and it is all that `execute` needs. One `Transfer` a tensor says where its boxes lie in
the source files and where its boxes go in the target files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import DType, Header, TensorSpec
from mindformers_ckpt.geometry.box import Box, BoxIndex, are_disjoint, covered_volume, hull, meets
from mindformers_ckpt.planning.computations import Compute, files_of

DEFAULT_PREFIX = "checkpoint_"

Shared = TypeVar("Shared")
Numbered = TypeVar("Numbered", bound=Hashable)
Found = TypeVar("Found")


class SourceFile(NamedTuple):
    """A file to read, with the size it had when the plan was made.

    `header` is that of one which was looked at at samples only (`look_quickly`): who reads a tensor compares its heads.
    """

    path: Path
    size: int
    header: Header | None = None


class TargetFile(NamedTuple):
    """A file to write: its path under the target folder, its tensors in order, and what a header says of it."""

    path: str
    rank: int
    format: str
    tensors: tuple[TensorSpec, ...]
    metadata: tuple[tuple[str, str], ...] = ()


class View(NamedTuple):
    """Where a box is in a file's tensor that is not the box itself: fused, interleaved, stacked, transposed.

    Attributes:
        shape: a row-major reshape of the file's tensor.
        box: the part of that view.
        order: the view's axis that each dimension of the place's box runs along. Empty at a target, where
            both boxes have the same elements in the same row-major order, however many dimensions they have.
    """

    shape: tuple[int, ...]
    box: Box
    order: tuple[int, ...]

    @property
    def is_transposed(self) -> bool:
        """Whether elements that are neighbours in the place's box lie apart in the file."""
        extents = self.box.shape
        axes = [axis for axis in self.order if extents[axis] > 1]
        return bool(axes) and axes[-1] != max(axes)


class Place(NamedTuple):
    """A box of a whole tensor, and the file (an index into the plan's list) that holds it.

    The file's tensor is just this box, unless there is a `view`. `tensor` is its name in the file, "" for
    the name of the whole tensor. `compute` makes the elements out of those of the source.
    """

    file: int
    box: Box
    tensor: str = ""
    view: View | None = None
    compute: Compute | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the file's tensor is just the box, element for element."""
        return self.view is None and self.compute is None


class Numbers(dict[Numbered, int]):
    """Gives things numbers, from 0 on, in the order in which they are asked for first."""

    def __missing__(self, item: Numbered) -> int:
        number = self[item] = len(self)
        return number


def once(function: Callable[[Shared], Found]) -> Callable[[Shared], Found]:
    """A function that is called once for each object, however often it is asked.

    For what the transfers of one plan share (see `places`), and for as long as the plan keeps it.
    """
    known: dict[int, Found] = {}

    def found(shared: Shared) -> Found:
        key = id(shared)
        if key not in known:
            known[key] = function(shared)
        return known[key]

    return found


class Transfer(NamedTuple):
    """All that happens to one tensor. The source boxes are disjoint; equal target boxes are replicas."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]

    def for_places(self, targets: Sequence[Place]) -> Transfer:
        """The part of the transfer that some of its targets take."""
        needed = hull([place.box for place in targets])
        sources = tuple(place for place in self.sources if meets(place.box, needed))
        return self._replace(sources=sources, targets=tuple(targets))

    @property
    def bytes_written(self) -> int:
        return volume_of(self.targets) * self.dtype.itemsize

    @property
    def bytes_read(self) -> int:
        """Bytes of the source shards that are in the hull of the targets, in the type they have there: what is read."""
        wanted = hull([place.box for place in self.targets])
        boxes: dict[int, list[Box]] = {}
        for place in self.sources:
            dtype = self.dtype if place.compute is None else place.compute.dtype
            boxes.setdefault(dtype.itemsize, []).append(place.box)
        return sum(covered_volume(wanted, held) * size for size, held in boxes.items())


class Alike(NamedTuple):
    """Transfers that share their places, and those of them that one target file takes."""

    transfers: Sequence[Transfer]
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]


@dataclass(frozen=True)
class Plan:
    """What to read and what to write. `warnings` tell the user of choices that the plan made."""

    sources: tuple[SourceFile, ...]
    targets: tuple[TargetFile, ...]
    transfers: tuple[Transfer, ...]
    warnings: tuple[str, ...] = field(default=())

    @cached_property
    def kinds(self) -> list[tuple[Transfer, int]]:
        """One of the transfers that share their shape, their places and the size of their elements, and how many do."""
        known: dict[tuple[int, int, int, tuple[int, ...]], list[Transfer]] = {}
        for transfer in self.transfers:
            _, dtype, shape, sources, targets = transfer
            known.setdefault((id(sources), id(targets), dtype.itemsize, shape), []).append(transfer)
        return [(alike[0], len(alike)) for alike in known.values()]

    @cached_property
    def bytes_written(self) -> int:
        """Content bytes of all target files."""
        return sum(transfer.bytes_written * count for transfer, count in self.kinds)

    @cached_property
    def bytes_read(self) -> int:
        """Content bytes that are read, each source byte once however many targets take it."""
        return sum(transfer.bytes_read * count for transfer, count in self.kinds)

    @cached_property
    def files_read(self) -> tuple[int, ...]:
        """The source files (indices) of which something is read: of a plan for some ranks not all."""
        ways = {id(transfer.sources): transfer.sources for transfer, _ in self.kinds}
        places = [place for sources in ways.values() for place in sources]
        return tuple(sorted({place.file for place in places}.union(*(files_of(place.compute) for place in places))))

    def for_targets(self, files: Collection[int]) -> Plan:
        """The part of the plan that writes these target files (indices stay those of the whole plan)."""
        wanted = frozenset(files)
        transfers = []
        for transfer in self.transfers:
            targets = [place for place in transfer.targets if place.file in wanted]
            if targets:
                transfers.append(transfer.for_places(targets))
        return replace(self, transfers=tuple(transfers))

    def by_target(self, together: int = 1) -> list[list[Transfer]]:
        """For every target file, or every so many, the parts of the transfers that they take.

        In one pass, whatever their number.
        """
        taken: list[list[Transfer]] = [[] for _ in range(0, len(self.targets), together)]
        known: dict[tuple[int, int], list[_Taken]] = {}
        for transfer in self.transfers:
            key = id(transfer.sources), id(transfer.targets)
            if key not in known:
                known[key] = _taken(transfer, together)
            name, dtype, shape, _, _ = transfer
            for group, sources, targets in known[key]:
                taken[group].append(Transfer(name, dtype, shape, sources, targets))
        return taken

    def alike_by_target(self) -> list[list[Alike]]:
        """What every target file takes, by transfers that are cut alike: of many layers there are few kinds."""
        shared: dict[tuple[int, int], list[Transfer]] = {}
        for transfer in self.transfers:
            shared.setdefault((id(transfer.sources), id(transfer.targets)), []).append(transfer)
        taken: list[list[Alike]] = [[] for _ in self.targets]
        for transfers in shared.values():
            for target, sources, targets in _taken(transfers[0], 1):
                taken[target].append(Alike(transfers, sources, targets))
        return taken

    def check(self, most_comparisons: int | None = None) -> None:
        """Check that every target box is in bounds and made, exactly once, of source bytes.

        Raises PlanError that lists all tensors for which this does not hold. `most_comparisons` is for a plan from
        outside, whose boxes may be such that this never ends.
        """
        effort = _Effort(most_comparisons)
        faults = {_cut_of(transfer): _cover_fault(transfer, effort.spend) for transfer, _ in self.kinds}
        problems: list[str] = []
        if any(faults.values()):
            told = ((transfer.name, faults[_cut_of(transfer)]) for transfer in self.transfers)
            problems += (f"{name}: {fault}" for name, fault in told if fault is not None)
        raise_problems(PlanError, "the plan does not make whole tensors", problems)


class _Effort:
    """The comparisons that a check may still make."""

    def __init__(self, most: int | None) -> None:
        self._most = self._left = most

    def spend(self, count: int) -> None:
        """Raises PlanError when there are not so many left."""
        if self._left is None:
            return
        self._left -= count
        if self._left < 0:
            raise PlanError(f"it takes over {self._most:,} comparisons to check the boxes of the plan; make it again")


class _Taken(NamedTuple):
    """What a group of target files, or a single one, takes of a transfer."""

    group: int
    sources: tuple[Place, ...]
    targets: tuple[Place, ...]


def _taken(transfer: Transfer, together: int) -> list[_Taken]:
    places: dict[int, list[Place]] = {}
    for place in transfer.targets:
        places.setdefault(place.file // together, []).append(place)
    sources: dict[tuple[Box, ...], tuple[Place, ...]] = {}  # replicas take from the same ones
    index = BoxIndex([place.box for place in transfer.sources])
    found = []
    for group, targets in places.items():
        boxes = tuple(place.box for place in targets)
        if boxes not in sources:
            sources[boxes] = tuple(transfer.sources[number] for number in index.meeting(hull(boxes)))
        found.append(_Taken(group, sources[boxes], tuple(targets)))
    return found


def volume_of(places: Sequence[Place]) -> int:
    """How many elements places have together."""
    return sum(place.box.volume for place in places)


def _cut_of(transfer: Transfer) -> tuple[tuple[int, ...], int, int]:
    """The same for transfers that share their shape and their places."""
    return transfer.shape, id(transfer.sources), id(transfer.targets)


def _cover_fault(transfer: Transfer, compared: Callable[[int], None]) -> str | None:
    compared(len(transfer.sources) + len(transfer.targets))
    whole = Box.whole(transfer.shape)
    sources = [place.box for place in transfer.sources]
    targets = list(dict.fromkeys(place.box for place in transfer.targets))
    for box in (*sources, *targets):
        if not whole.contains(box):
            return f"the box {box} is outside of the shape {list(transfer.shape)}"
    if sum(box.volume for box in sources) > whole.volume or not are_disjoint(sources, compared):
        return "source shards overlap"
    index = BoxIndex(sources)
    for box in targets:
        held = covered_volume(box, [sources[number] for number in index.meeting(box, compared)])
        if held != box.volume:
            return f"of the box {box}, {box.volume - held} of {box.volume} elements are in no source file"
    return None
