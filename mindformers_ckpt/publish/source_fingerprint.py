"""What a run learns of its source while it copies: the checksums of the source tensors that it reads.

A source tensor is known when all of it was read: renamed, so that it has the checksum of its target tensor, or
rearranged or computed with, so that it was counted apart. Of a tensor of which the result has nothing or only a part,
nothing is told, since it would have to be read for that; then the source has no digest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.checksums.digest import TensorChecksum, described, digest_of
from mindformers_ckpt.checksums.shares import checksum
from mindformers_ckpt.engine.source_shares import Cuts
from mindformers_ckpt.engine.tasks import ALL, SourceShare
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.axes import common_strides, extents_between, runs, strides_of
from mindformers_ckpt.geometry.box import Box, are_disjoint
from mindformers_ckpt.planning.model import Place, Plan, Transfer
from mindformers_ckpt.planning.shards import in_whole
from mindformers_ckpt.sources.shards import Shard

SOURCE_KEY = "source_fingerprint"
_Where = tuple[Path, str]
# A box in a row-major view of a tensor, and the shape of that view.
Viewed = tuple[Box, "tuple[int, ...]"]


class Origin(NamedTuple):
    """A whole tensor of a source, and where its boxes are: file, and name there -> box."""

    spec: TensorSpec
    held: Mapping[_Where, Box]

    @classmethod
    def of(cls, spec: TensorSpec, name: str, shards: Iterable[Shard]) -> Origin:
        """A tensor whose shards are in files, under this name where they have no other."""
        return cls(spec, {(shard.path, shard.tensor or name): shard.box for shard in shards})


def cuts_of(plan: Plan, origins: Iterable[Origin]) -> Cuts:
    """Which tensors of the plan's source files are a box of a larger one."""
    numbers = {file.path: number for number, file in enumerate(plan.sources)}
    return {
        (numbers[path], tensor): (box, origin.spec.shape)
        for origin in origins
        for (path, tensor), box in origin.held.items()
        if path in numbers and box.shape != origin.spec.shape
    }


class _Unknown(Exception):
    """Why the checksum of a source tensor is not known."""


def describe_source(
    plan: Plan, origins: Iterable[Origin], targets: Sequence[TensorChecksum], shares: Iterable[SourceShare]
) -> dict[str, Any]:
    """What a manifest says of the source: its digest (None where a tensor is not known), its tensors, and why others
    are not known.

    `targets` are the checksums of the result, `shares` what was counted of tensors that are rearranged or computed.
    """
    learnt = _Learnt(plan, targets, shares)
    known: list[TensorChecksum] = []
    unknown: dict[str, list[str]] = {}
    for origin in origins:
        spec = origin.spec
        try:
            known.append(TensorChecksum(spec.name, spec.dtype.name, spec.shape, learnt.value(origin)))
        except _Unknown as reason:
            unknown.setdefault(str(reason), []).append(spec.name)
    return {
        "digest": None if unknown else digest_of(known),
        "tensors": described(known),
        "not_counted": {reason: sorted(names) for reason, names in unknown.items()},
    }


class _Learnt:
    """What is known after a run: who read which tensor of a file, and what was counted."""

    def __init__(self, plan: Plan, targets: Sequence[TensorChecksum], shares: Iterable[SourceShare]) -> None:
        self._targets = {tensor.name: tensor.crc64nvme for tensor in targets}
        self._files = [file.path for file in plan.sources]
        self._readers: dict[_Where, list[tuple[Transfer, Place]]] = {}
        for transfer in plan.transfers:
            for place in transfer.sources:
                self._readers.setdefault(self._where(transfer, place), []).append((transfer, place))
        self._counted: dict[tuple[_Where, str], int] = {}
        for file, tensor, target, share in shares:
            key = (self._files[file], tensor), target
            self._counted[key] = share if target == ALL else self._counted.get(key, 0) ^ share

    def value(self, origin: Origin) -> int:
        """The checksum of a source tensor. Raises _Unknown."""
        if not origin.spec.size:
            return 0
        if all((where, ALL) in self._counted for where in origin.held):
            return self._joined(origin, ALL)
        readers = [reader for where in origin.held for reader in self._readers.get(where, ())]
        if not readers:
            raise _Unknown("the result does not have it")
        for transfer, _ in readers:
            if self._is_renamed(transfer, origin):
                return self._targets[transfer.name]
        return self._rearranged(origin, readers)

    def _is_renamed(self, transfer: Transfer, origin: Origin) -> bool:
        """Whether a target tensor is, element for element, a source tensor of perhaps another name."""
        return math.prod(transfer.shape) == origin.spec.size and all(
            place.is_plain and self._where(transfer, place) in origin.held for place in transfer.sources
        )

    def _rearranged(self, origin: Origin, readers: Sequence[tuple[Transfer, Place]]) -> int:
        """The checksum of a tensor, out of what was counted of target tensors that have all of it."""
        taken: dict[str, list[Viewed]] = {}
        for transfer, place in readers:
            found = self._in_origin(origin, transfer, place)
            if found is None or (self._where(transfer, place), transfer.name) not in self._counted:
                raise _Unknown("its bytes were not counted")
            taken.setdefault(transfer.name, []).append(found)
        for names in (*([name] for name in taken), list(taken)):
            if is_all_of([box for name in names for box in taken[name]], origin.spec.size):
                return self._joined(origin, *names)
        raise _Unknown("the result has a part of it")

    def _in_origin(self, origin: Origin, transfer: Transfer, place: Place) -> Viewed | None:
        """What a place takes, as a box in a view of the whole source tensor."""
        box, shape = Box.whole(place.box.shape), place.box.shape
        if place.view is not None:
            box, shape = place.view.box, place.view.shape
        shard = origin.held[self._where(transfer, place)]
        return (box, shape) if shard.shape == origin.spec.shape else in_whole(box, shape, shard, origin.spec.shape)

    def _joined(self, origin: Origin, *targets: str) -> int:
        keys = [(where, target) for where in origin.held for target in targets]
        return checksum([self._counted[key] for key in keys if key in self._counted], origin.spec.nbytes)

    def _where(self, transfer: Transfer, place: Place) -> _Where:
        return self._files[place.file], place.tensor or transfer.name


def is_all_of(taken: Sequence[Viewed], size: int) -> bool:
    """Whether boxes in row-major views of one tensor are disjoint, and all of its `size` elements."""
    if sum(box.volume for box, _ in taken) != size:
        return False
    if len({shape for _, shape in taken}) > 1:
        try:
            strides = common_strides(stride for _, shape in taken for stride in strides_of(shape))
        except ValueError:
            return False  # it may be so, but that is not known
        return are_disjoint([part for viewed in taken for part in _refined(viewed, strides)])
    return are_disjoint([box for box, _ in taken])


def _refined(viewed: Viewed, strides: Sequence[int]) -> Iterator[Box]:
    """The boxes that make up one, in the view of these strides, whose axes make up those of its own view."""
    box, shape = viewed
    choices = []
    own = strides_of(shape)
    for outer, inner, first, last in zip(own, own[1:], box.start, box.stop):
        extents = extents_between(strides, outer, inner)
        choices.append([(run.start, run.stop) for run in runs(first, last, extents)] if extents else [((), ())])
    for choice in itertools.product(*choices):
        yield Box(
            tuple(itertools.chain.from_iterable(start for start, _ in choice)),
            tuple(itertools.chain.from_iterable(stop for _, stop in choice)),
        )
