"""The parameters of a checkpoint by what the headers say: quickly for thousands of files, and whatever is odd."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, StrategyError
from mindformers_ckpt.formats import DType, Header, TensorRecord, TensorSpec
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.lora_names import is_adapter_name
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.shards import LogicalTensor, cuts
from mindformers_ckpt.sources.source import Source
from mindformers_ckpt.state_names import find_states

KINDS = ("weights", "optimizer states", "adapter", "counters", "buffers")


class Parameter(NamedTuple):
    """A whole tensor, as the headers and the strategy tell it.

    Attributes:
        name, dtype, shape: of the whole tensor; without a strategy, of what a rank holds.
        kind: one of `KINDS`.
        layout: how it is cut; None where no strategy names it.
        stages: the pipeline stages that hold it.
        ranks: the ranks whose files hold it.
        expected: how many ranks hold it where nothing is left out.
        missing: boxes that no file holds.
        is_known: whether the strategy is, so that `shape` is that of the whole tensor.
        told: the tensor, where the source itself says which boxes of it files hold.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    kind: str
    layout: Layout | None
    stages: tuple[int, ...]
    ranks: tuple[int, ...]
    expected: int
    missing: tuple[Box, ...] = ()
    is_known: bool = True
    told: LogicalTensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, replicas not counted."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def cut(self) -> str:
        """How it is cut, in words: "rows / 8", "whole"."""
        if not self.is_known:
            return "a shard or all of it"
        pieces = self.pieces
        if pieces is None:
            return "whole" if self.told is None or not self.shape else f"{len(self.told.shards)} boxes"
        return _in_words(pieces, len(self.shape))

    @property
    def pieces(self) -> tuple[int, ...] | None:
        """Into how many pieces every dimension is cut; None where nothing says it, or they are no grid."""
        if self.told is not None:
            return cuts(self.told)
        return None if self.layout is None else self.layout.cuts

    @property
    def replicas(self) -> int:
        """How many ranks hold the same box (of one stage), where nothing is left out."""
        cuts = math.prod(self.layout.cuts) if self.layout is not None else 1
        return max(1, self.expected // max(1, len(self.stages)) // cuts)

    def boxes(self, stage_size: int) -> Iterator[tuple[Box, tuple[int, ...]]]:
        """The distinct boxes of the first stage that holds it, each with the ranks whose files hold it."""
        if self.told is not None:
            yield from ((shard.box, (shard.rank,)) for shard in self.told.shards)
            return
        first, held = self.stages[0] * stage_size, set(self.ranks)
        layout = self.layout
        shards = (
            ((Box.whole(self.shape), tuple(range(stage_size))),)
            if layout is None
            else layout.for_whole(self.shape).shards(self.shape)
        )
        for box, members in shards:
            yield box, tuple(first + member for member in members if first + member in held)


@lru_cache(maxsize=1024)
def _in_words(pieces: tuple[int, ...], dimensions: int) -> str:
    words = [f"{_axis(axis, dimensions)} / {cut}" for axis, cut in enumerate(pieces) if cut > 1]
    return ", ".join(words) or "whole"


def _axis(axis: int, dimensions: int) -> str:
    return {(0, 2): "rows", (1, 2): "columns", (0, 1): "length"}.get((axis, dimensions), f"axis {axis}")


def find_parameters(files: Checkpoint, headers: Mapping[Path, Header]) -> tuple[list[Parameter], list[str]]:
    """All tensors of a checkpoint whose headers were read, and what contradicts each other or the strategy."""
    if files.files.tensors is not None:
        return list(_with_kinds({name: _told(tensor) for name, tensor in files.files.tensors.items()})), []
    found: dict[str, Parameter] = {}
    problems: list[str] = []
    size = files.strategy.stage_size
    is_known = size == 1 or bool(files.strategy.names())
    for stage in range(len(files.strategy.stages)):
        for name, (spec, ranks, forms) in _holders(files.files, headers, stage, size).items():
            if forms > 1 and is_known:
                problems.append(f"{name}: the ranks of stage {stage} hold it in {forms} shapes or types")
            try:
                own = _parameter(files, name, stage, spec, ranks)._replace(is_known=is_known)
            except (PlanError, StrategyError) as error:
                problems.append(f"{name}: {error}")
                continue
            found[name] = _joined(found[name], own) if name in found else own
    return list(_with_kinds(found)), problems


def _told(tensor: LogicalTensor) -> Parameter:
    """A tensor whose boxes the source itself tells."""
    name, dtype, shape = tensor.spec
    return Parameter(name, dtype, shape, "", None, (0,), (0,), 1, told=tensor)


def _holders(
    source: Source, headers: Mapping[Path, Header], stage: int, size: int
) -> dict[str, tuple[TensorSpec, tuple[int, ...], int]]:
    """For every tensor of a stage: what the first rank holds of it, the ranks that hold it, and in how many forms.

    Ranks whose files have the same header are looked at once.
    """
    groups: dict[tuple[int, ...], tuple[list[Mapping[str, TensorRecord]], list[int]]] = {}
    for rank in range(stage * size, (stage + 1) * size):
        tables = [_assigned(source, headers[path]) for path in source.by_rank.get(rank, ()) if path in headers]
        if tables:
            groups.setdefault(tuple(map(id, tables)), (tables, []))[1].append(rank)
    specs: dict[str, list[TensorSpec]] = {}
    held: dict[str, list[list[int]]] = {}
    for tables, ranks in groups.values():
        for table in tables:
            for name, record in table.items():
                specs.setdefault(name, []).append(record.spec)
                held.setdefault(name, []).append(ranks)
    joined: dict[tuple[int, ...], tuple[int, ...]] = {}
    found = {}
    for name, lists in held.items():
        key = tuple(map(id, lists))
        if key not in joined:
            joined[key] = tuple(sorted({rank for ranks in lists for rank in ranks}))
        found[name] = (specs[name][0], joined[key], len({(spec.dtype, spec.shape) for spec in specs[name]}))
    return found


def _assigned(source: Source, header: Header) -> Mapping[str, TensorRecord]:
    """The tensors that are read from a file: all, but for where an index says so."""
    if source.owners is None:
        return header.tensors
    return {name: record for name, record in header.tensors.items() if source.assigns(name, header.path)}


def _parameter(files: Checkpoint, name: str, stage: int, spec: TensorSpec, ranks: tuple[int, ...]) -> Parameter:
    size = files.strategy.stage_size
    layout = files.layout_of(name, stage, spec)
    if layout is None:
        return Parameter(name, spec.dtype, spec.shape, "", None, (stage,), ranks, size)
    shape = layout.full_shape(spec.shape)
    missing: tuple[Box, ...] = ()
    if len(ranks) < size:
        held, first = set(ranks), stage * size
        missing = tuple(
            box for box, members in layout.shards(shape) if not any(first + member in held for member in members)
        )
    return Parameter(name, spec.dtype, shape, "", layout, (stage,), ranks, size, missing)


def _joined(first: Parameter, second: Parameter) -> Parameter:
    """One parameter of two stages that both hold it."""
    missing = () if not first.missing or not second.missing else first.missing
    return first._replace(
        layout=first.layout or second.layout,
        stages=first.stages + second.stages,
        ranks=first.ranks + second.ranks,
        expected=first.expected + second.expected,
        missing=missing,
    )


def _with_kinds(found: Mapping[str, Parameter]) -> Iterator[Parameter]:
    kinds = kinds_of(found)
    for name, parameter in found.items():
        yield parameter._replace(kind=kinds[name])


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """What each tensor is by its name: a word of `KINDS`."""
    names = list(names)
    states = find_states(names, set(names))
    kinds = dict.fromkeys(names, "weights")
    kinds.update((name, "adapter") for name in names if is_adapter_name(name))
    kinds.update(dict.fromkeys(states.optimizer, "optimizer states"))
    kinds.update(dict.fromkeys(states.counters, "counters"))
    kinds.update(dict.fromkeys(states.buffers, "buffers"))
    return kinds
