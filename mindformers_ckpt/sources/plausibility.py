"""Do the contents of a sharded checkpoint agree with the strategy it is read under?

Shapes cannot tell whether a strategy is the right one: under a wrong one every size may still divide. The
contents can, and a few kilobytes of some tensors are enough:

- ranks that hold the same box must hold the same values;
- ranks that hold different boxes do not all hold the same values.

This finds strategies of another run, files that were saved whole although the strategy cuts them
(`aggregated_save`), and parameters that are cut although no strategy names them (strategies saved for
trainable parameters only). It cannot find two dimensions mixed up where nothing is replicated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from mindformers_ckpt.errors import PlanError, describe_problems
from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.sources.checkpoint import Checkpoint, LogicalTensor

_T = TypeVar("_T")
_SAMPLED_TENSORS = 32
_SMALLEST = 16  # elements; smaller tensors are counters, which may differ from rank to rank
_WINDOW = 4096  # bytes, at the start and in the middle of a shard
# Replicas are trained by the same operations, but not every reduction repeats bit for bit.
_DRIFT = 0.02


class _Pair(NamedTuple):
    """Two ranks to compare: they should hold the same box, or different ones."""

    tensor: str
    first: int
    second: int


def check_contents(source: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> list[str]:
    """Compare samples of shards; returns warnings.

    Raises PlanError that names the tensors and ranks when the strategy cannot be that of the files.
    """
    if source.strategy.is_complete:
        return []
    named = source.strategy.names()
    if tensors and not named & tensors.keys():
        raise PlanError(
            f"{source.files.root} and its strategy ({source.strategy.origin}) have no parameter in common: the files "
            f"hold {min(tensors)}, …, the strategy names {min(named)}, …; it is the strategy of another model"
        )
    chosen = _chosen(tensors.values())
    warnings, differing = [], []
    for pair in _pairs(source, chosen, same=True):
        dtype = tensors[pair.tensor].spec.dtype
        distance = _distance(_sample(source, pair.first, pair.tensor), _sample(source, pair.second, pair.tensor), dtype)
        if distance > _DRIFT:
            differing.append(f"{pair.tensor}: ranks {pair.first} and {pair.second} should hold the same values")
        elif distance:
            warnings.append(
                f"{pair.tensor}: the replicas of ranks {pair.first} and {pair.second} differ slightly; "
                f"those of rank {pair.first} are taken"
            )
    if differing:
        raise PlanError(
            describe_problems(
                f"the contents of {source.files.root} contradict its strategy ({source.strategy.origin}): is it the "
                "strategy of this run, and does it name all parameters (only_trainable_params: False)?",
                differing,
            )
        )
    _check_distinct(source, chosen)
    return warnings


def _check_distinct(source: Checkpoint, chosen: list[LogicalTensor]) -> None:
    """Refuse a source in which two ranks hold the same values of every tensor, but should hold different boxes."""
    alike: dict[tuple[int, int], list[bool]] = {}
    for pair in _pairs(source, chosen, same=False):
        first = _sample(source, pair.first, pair.tensor)
        if len(set(first)) > 8:  # constant tensors (norms at their start, empty moments) tell nothing
            same = first == _sample(source, pair.second, pair.tensor)
            alike.setdefault((pair.first, pair.second), []).append(same)
    problems = [
        f"ranks {first} and {second} hold the same values of all {len(found)} tensors looked at"
        for (first, second), found in alike.items()
        if all(found)
    ]
    if problems:
        raise PlanError(
            describe_problems(
                f"the contents of {source.files.root} contradict its strategy ({source.strategy.origin}), which says "
                "that these ranks hold different parts: the checkpoint was saved whole, or under another strategy",
                problems,
            )
        )


def _chosen(tensors: Iterable[LogicalTensor]) -> list[LogicalTensor]:
    """Tensors to sample: of every layout and stage the first ones, and those that no strategy names."""
    by_kind: dict[tuple[Layout | None, tuple[int, ...]], list[LogicalTensor]] = {}
    for tensor in tensors:
        if tensor.spec.size >= _SMALLEST:
            by_kind.setdefault((tensor.layout, tensor.stages), []).append(tensor)
    chosen = []
    for (layout, _), members in by_kind.items():
        count = len(members) if layout is None else max(2, _SAMPLED_TENSORS // len(by_kind))
        chosen += members[:: max(1, len(members) // count)][:count]
    return chosen


def _pairs(source: Checkpoint, chosen: list[LogicalTensor], *, same: bool) -> list[_Pair]:
    pairs = []
    for tensor in chosen:
        stage = tensor.stages[0]
        first_rank = stage * source.strategy.stage_size
        if tensor.layout is None:
            groups: list[tuple[int, ...]] = [tuple(range(source.strategy.stage_size))]
        else:
            groups = [ranks for _, ranks in tensor.layout.shards(tensor.spec.shape)]
        held = [
            [first_rank + rank for rank in _spread(ranks) if source.holds(first_rank + rank, tensor.spec.name)]
            for ranks in (groups[:1] if same else _spread(groups))
        ]
        if same:
            pairs += [_Pair(tensor.spec.name, ranks[0], rank) for ranks in held for rank in ranks[1:]]
        elif held[0]:
            pairs += [_Pair(tensor.spec.name, held[0][0], ranks[0]) for ranks in held[1:] if ranks]
    return pairs


def _spread(items: Sequence[_T]) -> list[_T]:
    """The first item and those at distances 1, 2, 4, …: neighbours along every axis of a device matrix."""
    return [items[0]] + [items[1 << power] for power in range(len(items).bit_length()) if 1 << power < len(items)]


def _sample(source: Checkpoint, rank: int, name: str) -> bytes:
    """Some bytes of a rank's shard, from its start and its middle."""
    path, record = source.records_of(rank)[name]
    with path.open("rb") as stream:
        parts = []
        for segment in record.segments[:1]:
            for offset in {0, segment.length // 2 // record.spec.dtype.itemsize * record.spec.dtype.itemsize}:
                count = min(_WINDOW, segment.length - offset)
                parts.append(os.pread(stream.fileno(), count, segment.offset + offset))
    return b"".join(parts)


def _distance(first: bytes, second: bytes, dtype: DType) -> float:
    """How far two samples are apart, relative to their largest value; 1 for types that are no numbers."""
    if first == second:
        return 0.0
    if len(first) != len(second) or not dtype.name.startswith(("float", "bfloat")):
        return 1.0
    import ml_dtypes
    import numpy as np

    kind = np.dtype(getattr(ml_dtypes, dtype.name, dtype.name))
    a, b = (np.frombuffer(data, kind).astype(np.float64) for data in (first, second))
    with np.errstate(all="ignore"):
        largest = float(np.nanmax(np.abs(a)))
        apart = float(np.nanmax(np.abs(a - b)))
    return apart / largest if largest and np.isfinite(largest) and np.isfinite(apart) else 1.0
