"""Whole tensors, and the boxes of them that files hold: by a strategy, or as a source itself says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats import Header, TensorSpec
from mindformers_ckpt.geometry.box import Box, are_disjoint, covered_volume
from mindformers_ckpt.geometry.layout import Layout

if TYPE_CHECKING:
    from pathlib import Path


# Of one tensor, in half a minute; the boxes of a mesh of 256 by 256 ranks take as many.
_MOST_COMPARISONS = 1 << 24


class Shard(NamedTuple):
    """A box of a tensor and the file that holds it; `tensor` is its name there, "" for the name of the tensor."""

    rank: int
    path: Path
    box: Box
    tensor: str = ""


class LogicalTensor(NamedTuple):
    """A whole tensor, and where its distinct boxes lie: one replica of each, the first rank's.

    `shards` are disjoint. `missing` are boxes that no file holds, with the ranks that should.
    `layout` is None for a parameter that no strategy names: it is replicated, or the source itself says what is where.
    `stages` are the pipeline stages whose files hold it.
    """

    spec: TensorSpec
    shards: tuple[Shard, ...]
    missing: tuple[tuple[Box, tuple[int, ...]], ...]
    layout: Layout | None
    stages: tuple[int, ...]

    def lost(self, part: Box | None = None) -> list[str]:
        """A line for each box that no file holds, or for those of a part of the tensor."""
        return [
            f"{self.spec.name}: the box {box} is held by ranks {list(ranks[:8])}, none of whose files is there"
            for box, ranks in self.missing
            if part is None or box.intersect(part) is not None
        ]


def from_boxes(spec: TensorSpec, shards: Iterable[Shard]) -> LogicalTensor:
    """A tensor whose boxes a source itself tells; they may be of any sizes. Boxes that are there twice count once.

    Raises PlanError when they overlap without being equal, or leave a part of the tensor out.
    """
    distinct = {shard.box: shard for shard in reversed([*shards])}
    held = [shard for shard in reversed(distinct.values()) if shard.box.volume or not spec.size]
    if not spec.size:
        held = held[:1]
    boxes = [shard.box for shard in held]
    left = _MOST_COMPARISONS

    def compared(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise PlanError(f"its {len(boxes)} boxes are such that comparing them takes too long")

    if not are_disjoint(boxes, compared):
        raise PlanError(f"boxes that files hold of it overlap: {', '.join(map(str, boxes[:4]))}, …")
    whole = Box.whole(spec.shape)
    lacking = spec.size - covered_volume(whole, boxes)
    if lacking or not held:
        raise PlanError(f"{lacking} of its {spec.size} elements are in no file; the shape is {list(spec.shape)}")
    return LogicalTensor(spec, tuple(held), (), None, (0,))


def contradictions(tensors: Iterable[LogicalTensor], headers: Mapping[Path, Header]) -> list[str]:
    """What files hold otherwise than a source says of its boxes."""
    problems = []
    for tensor in tensors:
        for shard in tensor.shards:
            name = shard.tensor or tensor.spec.name
            record = headers[shard.path].tensors.get(name)
            expected = TensorSpec(name, tensor.spec.dtype, shard.box.shape)
            if record is None:
                problems.append(f"{shard.path.name} lacks {name}")
            elif record.spec != expected:
                found = f"{record.spec.dtype.name}{list(record.spec.shape)}"
                problems.append(
                    f"{shard.path.name}: {name} is {found}, {expected.dtype.name}{list(expected.shape)} is expected"
                )
    return problems


def cuts(tensor: LogicalTensor) -> tuple[int, ...] | None:
    """Into how many pieces its boxes cut every dimension; None where they are no grid."""
    starts = [{shard.box.start[axis] for shard in tensor.shards} for axis in range(len(tensor.spec.shape))]
    found = tuple(map(len, starts))
    return found if math.prod(found) == len(tensor.shards) else None
