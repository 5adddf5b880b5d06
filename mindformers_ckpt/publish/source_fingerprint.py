"""What a run learns of its source while it copies: the checksums of the source tensors that it passes on as they are.

A source tensor is known when all of it goes into the result: renamed, so that it has the checksum of its target tensor,
or rearranged, so that it was counted apart. Of a tensor that is converted to other values, or of which only a part is
taken, nothing is told; then the source has no digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.checksums.digest import TensorChecksum, described, digest_of
from mindformers_ckpt.checksums.shares import checksum
from mindformers_ckpt.engine.tasks import SourceShare
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import Box, are_disjoint
from mindformers_ckpt.planning.model import Place, Plan, Transfer
from mindformers_ckpt.sources.shards import Shard

SOURCE_KEY = "source_fingerprint"
_Where = tuple[Path, str]


class Origin(NamedTuple):
    """A whole tensor of a source, and where it is: files, and its names in them."""

    spec: TensorSpec
    held: frozenset[_Where]

    @classmethod
    def of(cls, spec: TensorSpec, name: str, shards: Iterable[Shard]) -> Origin:
        """A tensor whose shards are in files, under this name where they have no other."""
        return cls(spec, frozenset((shard.path, shard.tensor or name) for shard in shards))


class _Unknown(Exception):
    """Why the checksum of a source tensor is not known."""


def describe_source(
    plan: Plan, origins: Iterable[Origin], targets: Sequence[TensorChecksum], shares: Iterable[SourceShare]
) -> dict[str, Any]:
    """What a manifest says of the source: its digest (None where a tensor is not known), its tensors, and why others
    are not known.

    `targets` are the checksums of the result, `shares` what was counted of rearranged tensors.
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
        self._counted: dict[tuple[_Where, str], list[int]] = {}
        for file, tensor, target, share in shares:
            self._counted.setdefault(((self._files[file], tensor), target), []).append(share)

    def value(self, origin: Origin) -> int:
        """The checksum of a source tensor. Raises _Unknown."""
        if not origin.spec.size:
            return 0
        readers = [reader for where in origin.held for reader in self._readers.get(where, ())]
        if not readers:
            raise _Unknown("the result does not have it")
        if any(place.compute is not None for _, place in readers):
            raise _Unknown("it is converted to other values")
        for transfer, _ in readers:
            if self._is_renamed(transfer, origin):
                return self._targets[transfer.name]
        if len(origin.held) > 1:
            raise _Unknown("it is in several files and rearranged")
        return self._rearranged(origin, readers)

    def _is_renamed(self, transfer: Transfer, origin: Origin) -> bool:
        """Whether a target tensor is, element for element, a source tensor of perhaps another name."""
        return math.prod(transfer.shape) == origin.spec.size and all(
            place.is_plain and self._where(transfer, place) in origin.held for place in transfer.sources
        )

    def _rearranged(self, origin: Origin, readers: Sequence[tuple[Transfer, Place]]) -> int:
        """The checksum of a tensor of one file, out of what was counted of target tensors that have all of it."""
        (where,) = origin.held
        boxes: dict[str, list[Box]] = {}
        spaces = set()
        for transfer, place in readers:
            box = Box.whole(place.box.shape) if place.view is None else place.view.box
            spaces.add(place.box.shape if place.view is None else place.view.shape)
            boxes.setdefault(transfer.name, []).append(box)
        whole_in_one = ([name] for name in boxes)
        for names in (*whole_in_one, list(boxes)):
            taken = [box for name in names for box in boxes[name]]
            is_whole = sum(box.volume for box in taken) == origin.spec.size
            is_counted = all((where, name) in self._counted for name in names)
            if is_whole and is_counted and (len(taken) == 1 or (len(spaces) == 1 and are_disjoint(taken))):
                shares = [share for name in names for share in self._counted[where, name]]
                return checksum(shares, origin.spec.nbytes)
        raise _Unknown("the result has a part of it")

    def _where(self, transfer: Transfer, place: Place) -> _Where:
        return self._files[place.file], place.tensor or transfer.name
