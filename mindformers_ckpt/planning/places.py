"""The places of tensors in source and target files. Tensors that are cut alike share theirs.

A model has thousands of tensors, a job thousands of ranks, but there are some dozens of ways in which a tensor is cut:
what is found once a way, and not once a tensor, does not grow with their product. A tuple of places is one object then,
so that `once` works for whatever else is made of it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ckpt.geometry.box import Box, hull, meets
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.model import Place, once
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.strategy.model import Strategy


def target_boxes(tensor: LogicalTensor, target: Strategy, ranks: Sequence[int]) -> list[tuple[int, Box]]:
    """The target ranks that get a tensor, each with its box. Raises StrategyError where it cannot be cut."""
    name, shape = tensor.spec.name, tensor.spec.shape
    size = target.stage_size
    named = [stage for stage, layouts in enumerate(target.stages) if name in layouts]
    layouts = _layouts(tensor, target, named, {rank // size for rank in ranks})
    if layouts is None:
        whole = Box.whole(shape)
        return [(rank, whole) for rank in ranks]
    boxes = {stage: layout.boxes(shape) for stage, layout in layouts.items()}
    return [(rank, boxes[rank // size][rank % size]) for rank in ranks if rank // size in boxes]


def _layouts(
    tensor: LogicalTensor, target: Strategy, named: Sequence[int], wanted: Container[int]
) -> dict[int, Layout] | None:
    """The stages that get a tensor, of those that are wanted, each with its layout.

    `named` are the stages whose strategy names it. None where there are none: then all get it whole.
    """
    if not named:
        return None
    stages = {*named}
    if len(tensor.stages) > 1:
        # Stages of the source share it, although a strategy file names it on one only: a tied embedding.
        # MindSpore ties the first and the last stage.
        stages.add(len(target.stages) - 1)
    found = {}
    for stage in sorted(stages):
        if stage in wanted:
            layout = target.layout(tensor.spec.name, stage)
            assert layout is not None
            found[stage] = layout.for_whole(tensor.spec.shape)
    return found


@dataclass
class Way:
    """A way in which a tensor is cut for the target.

    Attributes:
        targets: its places in the target files; empty where no rank gets it.
        holders: the shapes of what these files hold, and the files that hold such a box.
        needed: the smallest box around them.
        sources: the places that they take from, by the shards that a tensor has.
        seen: the same by the identity of these shards, which are kept: mostly they are one object where tensors are
            cut alike, and to take their hash takes longer than all else.
    """

    targets: tuple[Place, ...]
    holders: Mapping[tuple[int, ...], Sequence[int]]
    needed: Box | None
    sources: dict[tuple[Shard, ...], tuple[Place, ...]] = field(default_factory=dict)
    seen: dict[int, tuple[tuple[Shard, ...], tuple[Place, ...]]] = field(default_factory=dict)


_NOWHERE = Way((), {}, None)


class Places:
    """Finds the places of tensors for some ranks of a target. `files` are the numbers of the source files."""

    def __init__(self, target: Strategy, ranks: Sequence[int], files: Mapping[Path, int]) -> None:
        self._target, self._files = target, files
        # stage -> its ranks: the number of the target file, and the position in the stage
        self._ranks: dict[int, list[tuple[int, int]]] = {}
        for number, rank in enumerate(ranks):
            stage, position = divmod(rank, target.stage_size)
            self._ranks.setdefault(stage, []).append((number, position))
        self._named: dict[str, list[int]] = {}  # the stages that name a tensor
        for stage, layouts in enumerate(target.stages):
            for name in layouts:
                self._named.setdefault(name, []).append(stage)
        self._ways: dict[tuple[tuple[int, ...], tuple[tuple[int, Layout], ...] | None], Way] = {}

    def way(self, tensor: LogicalTensor) -> Way:
        """How a tensor is cut. Raises StrategyError where it cannot be."""
        name, _, shape = tensor.spec
        named = self._named.get(name, ())
        if named and len(tensor.stages) == 1 and self._ranks.keys().isdisjoint(named):
            return _NOWHERE
        layouts = _layouts(tensor, self._target, named, self._ranks) if named else None
        key = shape, None if layouts is None else tuple(layouts.items())
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = self._found(shape, layouts)
        return way

    def sources(self, tensor: LogicalTensor, way: Way) -> tuple[Place, ...]:
        """The shards of a tensor that its targets take from."""
        shards = tensor.shards
        seen = way.seen.get(id(shards))
        if seen is not None:
            return seen[1]
        if shards not in way.sources:
            assert way.needed is not None
            needed = way.needed
            way.sources[shards] = tuple(
                Place(self._files[shard.path], shard.box, shard.tensor) for shard in shards if meets(shard.box, needed)
            )
        way.seen[id(shards)] = shards, way.sources[shards]
        return way.sources[shards]

    def _found(self, shape: tuple[int, ...], layouts: Mapping[int, Layout] | None) -> Way:
        targets: list[Place] = []
        whole = Box.whole(shape)
        for stage, ranks in self._ranks.items():
            if layouts is None:
                targets += [Place(number, whole) for number, _ in ranks]
            elif stage in layouts:
                boxes = layouts[stage].boxes(shape)
                targets += [Place(number, boxes[position]) for number, position in ranks]
        shape_of = once(_shape)  # the layout has one box for all replicas
        holders: dict[tuple[int, ...], list[int]] = {}
        for place in targets:
            holders.setdefault(shape_of(place.box), []).append(place.file)
        return Way(tuple(targets), holders, hull([place.box for place in targets]) if targets else None)


def _shape(box: Box) -> tuple[int, ...]:
    return box.shape
