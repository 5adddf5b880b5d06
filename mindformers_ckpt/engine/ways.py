"""How tensors are copied that are cut alike: who takes what of whom, found once for all of them.

A model has thousands of tensors and some dozens of ways in which they are cut; the transfers of a plan share their
tuples of places (planning/places.py). What is found here holds for all transfers with the same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from mindformers_ckpt.engine.buffers import PIECE_BYTES
from mindformers_ckpt.geometry.box import Box, are_disjoint, offset_in
from mindformers_ckpt.planning.model import Place, Transfer, View

# What is kept: blocks of a way (a tensor of 500 MB has 64 of them), and ways.
_BLOCKS = 256
_WAYS = 256

Taker = tuple[Box, "View | None"]
T = TypeVar("T")


class Run(NamedTuple):
    """Bytes that files take of a source, one run of both: where it begins in the target shards and the whole tensor."""

    files: Sequence[int]
    length: int
    in_target: int
    in_whole: int


class Reading(NamedTuple):
    """Bytes of a source that are read at once: a run, or short ones that follow each other in the source."""

    place: Place
    start: int
    length: int
    runs: Sequence[Run]


class Way:
    """How the blocks of a transfer are copied, and of all others with the same places, shape and element size."""

    def __init__(self, transfer: Transfer, by_rows: bool) -> None:
        """`by_rows`: run by run, where both sides are cut so."""
        self._transfer = transfer
        self.takers: dict[Taker, list[int]] = {}
        for place in transfer.targets:
            self.takers.setdefault((place.box, place.view), []).append(place.file)
        is_so = by_rows and is_cut_by_rows(transfer)
        self._meetings = _row_meetings(transfer, self.takers) if is_so else None
        self._parts: dict[Box, Sequence[tuple[Place, Box]]] = {}
        self._readings: dict[Box, Sequence[Reading]] = {}

    @property
    def is_by_rows(self) -> bool:
        """Whether all that is copied are runs, by `readings`."""
        return self._meetings is not None

    def parts(self, block: Box) -> Sequence[tuple[Place, Box]]:
        """What is read of the sources to copy a block."""
        return _kept(self._parts, block, self._parts_of)

    def readings(self, block: Box) -> Sequence[Reading]:
        """The runs of a block, of tensors that are cut by rows."""
        return _kept(self._readings, block, self._readings_of)

    def _parts_of(self, block: Box) -> Sequence[tuple[Place, Box]]:
        boxes = [(place, place.box) for place in self._transfer.sources]
        if self._meetings is not None:
            boxes = [(meeting.place, meeting.common) for meeting in self._meetings]
        parts = ((place, box.intersect(block)) for place, box in boxes)
        return [(place, part) for place, part in parts if part is not None]

    def _readings_of(self, block: Box) -> Sequence[Reading]:
        assert self._meetings is not None
        itemsize, whole = self._transfer.dtype.itemsize, Box.whole(self._transfer.shape)
        found: list[Reading] = []
        for box, files, place, common in self._meetings:
            part = common.intersect(block)
            if part is None:
                continue
            start, *others = (offset_in(part, outer) * itemsize for outer in (place.box, box, whole))
            run = Run(files, part.volume * itemsize, *others)
            last = found[-1] if found else None
            follows = last is not None and last.place is place and last.start + last.length == start
            if last is not None and follows and last.length + run.length <= PIECE_BYTES:
                found[-1] = Reading(place, last.start, last.length + run.length, (*last.runs, run))
            else:
                found.append(Reading(place, start, run.length, (run,)))
        return found


class Ways:
    """The ways of the transfers that somebody copies."""

    def __init__(self, by_rows: bool) -> None:
        self._by_rows = by_rows
        self._known: dict[tuple[int, int, tuple[int, ...], int], Way] = {}

    def of(self, transfer: Transfer) -> Way:
        """The way of a transfer. It keeps the transfer that it was made of, so that the numbers of objects hold."""
        key = id(transfer.sources), id(transfer.targets), transfer.shape, transfer.dtype.itemsize
        way = self._known.get(key)
        if way is None:
            if len(self._known) >= _WAYS:
                self._known.clear()
            way = self._known[key] = Way(transfer, self._by_rows)
        return way


def is_cut_by_rows(transfer: Transfer) -> bool:
    """Whether sources and targets are cut along the first dimension only: all they share are single runs of both.

    Not where target boxes overlap without being equal, of which the common part would be read twice.
    """
    by_rows = bool(transfer.shape) and all(
        place.is_plain and place.box.shape[1:] == transfer.shape[1:] for place in (*transfer.sources, *transfer.targets)
    )
    return by_rows and are_disjoint(list({place.box for place in transfer.targets}))


class _Meeting(NamedTuple):
    """What a source holds of a target's box, and the files that take it."""

    box: Box
    files: Sequence[int]
    place: Place
    common: Box


def _row_meetings(transfer: Transfer, takers: Mapping[Taker, Sequence[int]]) -> list[_Meeting]:
    """Which sources a target that is cut by rows takes from; in one pass over both, however many ranks there are."""
    sources = sorted(transfer.sources, key=lambda place: place.box.start[0])
    found = []
    number = 0
    for (box, _), files in sorted(takers.items(), key=lambda taker: taker[0][0].start[0]):
        while number < len(sources) and sources[number].box.stop[0] <= box.start[0]:
            number += 1
        for place in itertools.islice(sources, number, None):
            if place.box.start[0] >= box.stop[0]:
                break
            common = place.box.intersect(box)
            if common is not None:
                found.append(_Meeting(box, files, place, common))
    return found


def _kept(known: dict[Box, T], block: Box, find: Callable[[Box], T]) -> T:
    """What is known of a block, found where it is not."""
    found = known.get(block)
    if found is None:
        if len(known) >= _BLOCKS:
            known.clear()
        found = known[block] = find(block)
    return found
