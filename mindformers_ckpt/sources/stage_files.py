"""Which files of a pipeline stage hold which tensors, and which boxes of them.

Files with equal headers, as those of a stage mostly are, are looked at together, and tensors that the same files hold
and that are cut alike have the same tuple of shards: a model has many more tensors than ways in which they are cut.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats import Header, TensorRecord, TensorSpec
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.sources.shards import Shard

if TYPE_CHECKING:
    from pathlib import Path


class Cut(NamedTuple):
    """The distinct boxes of a tensor: those that files hold, each in that of the first rank, and the others."""

    shards: tuple[Shard, ...]
    missing: tuple[tuple[Box, tuple[int, ...]], ...]


class _Alike(NamedTuple):
    """Files with equal headers, at most one of each rank."""

    tensors: Mapping[str, TensorRecord]
    files: dict[int, Path]


class StageFiles:
    """The files of a stage whose first rank is `first`: (rank, header) of each, by ascending ranks.

    Of a tensor no two files of a rank may be given. Tensors but `names` are left aside (None for none).
    """

    def __init__(self, first: int, files: Iterable[tuple[int, Header]], names: Container[str] | None) -> None:
        self._first = first
        alike: dict[tuple[int, int], _Alike] = {}
        last, number = -1, 0
        for rank, header in files:
            last, number = rank, number + 1 if rank == last else 0
            group = alike.setdefault((id(header.tensors), number), _Alike(header.tensors, {}))
            group.files[rank] = header.path
        self._groups = [*alike.values()]
        # Where all files are alike, as most are, and nothing is left aside, the tensors are those of each.
        self._holders = None if len(self._groups) == 1 and names is None else _holders(self._groups, names)
        self._joined: dict[tuple[int, ...], Mapping[int, Path]] = {}
        self._cuts: dict[tuple[Layout | None, tuple[int, ...], int], Cut] = {}

    @property
    def names(self) -> Iterable[str]:
        """The tensors, in the order of the files."""
        return self._groups[0].tensors.keys() if self._holders is None else self._holders.keys()

    def held(self, name: str) -> tuple[TensorSpec, Mapping[int, Path]]:
        """A tensor: its shard, and the file of every rank that has one, by ascending ranks.

        The files are one object for all tensors that the same files hold. Raises PlanError where shards of the tensor
        are of different types or shapes.
        """
        groups = self._groups if self._holders is None else self._holders[name]
        tensors, files = groups[0]
        spec = tensors[name].spec
        if len(groups) == 1:
            return spec, files
        for group in groups[1:]:
            other = group.tensors[name].spec
            if other != spec:
                rank, path = next(iter(group.files.items()))
                raise PlanError(
                    f"{path} holds {other.dtype.name}{list(other.shape)}, but other ranks of the stage hold "
                    f"{spec.dtype.name}{list(spec.shape)} (rank {rank} differs)"
                )
        key = tuple(map(id, groups))
        if key not in self._joined:
            self._joined[key] = dict(sorted(item for group in groups for item in group.files.items()))
        return spec, self._joined[key]

    def cut(self, files: Mapping[int, Path], layout: Layout | None, shape: tuple[int, ...]) -> Cut:
        """Where the boxes of a tensor of `shape` are in the files that `held` told; without a layout each has all."""
        key = layout, shape, id(files)
        cut = self._cuts.get(key)
        if cut is None:
            cut = self._cuts[key] = self._found(files, layout, shape)
        return cut

    def _found(self, files: Mapping[int, Path], layout: Layout | None, shape: tuple[int, ...]) -> Cut:
        if layout is None:
            rank, path = next(iter(files.items()))
            return Cut((Shard(rank, path, Box.whole(shape)),), ())
        shards: list[Shard] = []
        missing: list[tuple[Box, tuple[int, ...]]] = []
        for box, members in layout.shards(shape):
            ranks = tuple(self._first + member for member in members)
            holder = next((rank for rank in ranks if rank in files), None)
            if holder is not None:
                shards.append(Shard(holder, files[holder], box))
            else:
                missing.append((box, ranks))
        return Cut(tuple(shards), tuple(missing))


def _holders(groups: Sequence[_Alike], names: Container[str] | None) -> Mapping[str, Sequence[_Alike]]:
    """Which of the groups hold a tensor, by its name."""
    found: dict[str, list[_Alike]] = {}
    for group in groups:
        for name in group.tensors:
            if names is None or name in names:
                found.setdefault(name, []).append(group)
    return found
