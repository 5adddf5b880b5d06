"""Samples of a sharded checkpoint: which tensors and ranks are compared, and a few kilobytes of each.

The number of files that are opened and of samples that are read is bounded, whatever the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TypeVar

from mindformers_ckpt.disk.waiting import each
from mindformers_ckpt.errors import TransferError
from mindformers_ckpt.formats import TensorRecord
from mindformers_ckpt.formats.guesses import Pieces
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.objects.reading import opened
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.shards import LogicalTensor

_T = TypeVar("_T")
SMALLEST = 16  # elements; smaller tensors are counters and factors, which prove nothing
_SAMPLED_TENSORS = 32
_SAMPLED_SMALL = 32
_MOST_FILES = 256
_MOST_SAMPLES = 2048
_WINDOW = 4096  # bytes, at the start and in the middle of a shard

Samples = Mapping[tuple[int, str], bytes]


class Pair(NamedTuple):
    """Two ranks that hold a tensor. Of replicas, `first` is the rank that is read."""

    tensor: str
    first: int
    second: int


class Chosen(NamedTuple):
    """Pairs to compare: ranks that should hold the same box, and ranks that should hold different ones."""

    replicas: list[Pair]
    distinct: list[Pair]
    samples: Samples


def choose(source: Checkpoint, tensors: Mapping[str, LogicalTensor]) -> Chosen:
    """Choose pairs of ranks, and read their samples. Raises TransferError that names the file."""
    chosen = _chosen_tensors(tensors.values())
    replicas = [_replicas(source, tensor) for tensor in chosen]
    distinct = [_distinct(source, tensor) for tensor in chosen if tensor.spec.size >= SMALLEST]
    # The first pair of every tensor before the second of any: the bounds must not leave a tensor out.
    kept = set(_bounded(source, [*_in_turn(replicas), *_in_turn(distinct)]))
    samples = read_samples(source, {(rank, pair.tensor) for pair in kept for rank in pair[1:]})
    return Chosen(
        [pair for pairs in replicas for pair in pairs if pair in kept],
        [pair for pairs in distinct for pair in pairs if pair in kept],
        samples,
    )


def _chosen_tensors(tensors: Iterable[LogicalTensor]) -> list[LogicalTensor]:
    """Of every layout and stage the first tensors, all that no strategy names, and some small ones."""
    by_kind: dict[tuple[Layout | None, tuple[int, ...]], list[LogicalTensor]] = {}
    small: list[LogicalTensor] = []
    for tensor in tensors:
        if tensor.spec.size >= SMALLEST:
            by_kind.setdefault((tensor.layout, tensor.stages), []).append(tensor)
        elif tensor.spec.size:
            small.append(tensor)
    chosen: list[LogicalTensor] = []
    for (layout, _), members in by_kind.items():
        count = len(members) if layout is None else max(2, _SAMPLED_TENSORS // len(by_kind))
        chosen += _evenly(members, count)
    return chosen + _evenly(small, _SAMPLED_SMALL)


def _evenly(items: Sequence[_T], count: int) -> list[_T]:
    return list(items[:: max(1, len(items) // count)])[:count]


def _replicas(source: Checkpoint, tensor: LogicalTensor) -> list[Pair]:
    """The rank that is read, with others that should hold the same: the last one, neighbours, and other stages.

    The last rank of a stage stands at another place than the first along every axis of the device matrix.
    """
    if not tensor.shards:
        return []
    name, taken = tensor.spec.name, tensor.shards[0].rank
    first, groups = _groups(source, tensor, taken)
    group = next(ranks for ranks in groups if taken - first in ranks)
    last = next(first + rank for rank in reversed(group) if source.holds(first + rank, name))
    shape = source.records_of(taken)[name][1].spec.shape
    size = source.strategy.stage_size
    elsewhere = (stage * size + taken - first for stage in tensor.stages if stage != taken // size)
    others = [last, *(first + rank for rank in _spread(group))]
    others = [rank for rank in others if source.holds(rank, name)]
    others += [
        rank for rank in elsewhere if source.holds(rank, name) and source.records_of(rank)[name][1].spec.shape == shape
    ]
    return [Pair(name, taken, rank) for rank in dict.fromkeys(others) if rank != taken]


def _distinct(source: Checkpoint, tensor: LogicalTensor) -> list[Pair]:
    """The rank that is read first, with some that should hold another box."""
    if not tensor.shards:
        return []
    name, taken = tensor.spec.name, tensor.shards[0].rank
    first, groups = _groups(source, tensor, taken)
    others = [group for group in _spread(groups) if taken - first not in group]
    holders = (next((first + rank for rank in group if source.holds(first + rank, name)), None) for group in others)
    return [Pair(name, taken, rank) for rank in holders if rank is not None]


def _groups(source: Checkpoint, tensor: LogicalTensor, taken: int) -> tuple[int, list[tuple[int, ...]]]:
    """The first rank of the stage of `taken`, and the ranks of that stage (counted from it) by the box they hold."""
    size = source.strategy.stage_size
    first = taken // size * size
    shard = source.records_of(taken)[tensor.spec.name][1].spec.shape
    # A tensor that stages share may be cut on one of them and whole on the other.
    if tensor.layout is None or tensor.layout.full_shape(shard) != tensor.spec.shape:
        return first, [tuple(range(size))]
    return first, [ranks for _, ranks in tensor.layout.shards(tensor.spec.shape)]


def _spread(items: Sequence[_T]) -> list[_T]:
    """The first item and those at distances 1, 2, 4, …: neighbours along every axis of a device matrix."""
    return [items[0]] + [items[1 << power] for power in range(len(items).bit_length()) if 1 << power < len(items)]


def _in_turn(pairs: Iterable[Sequence[Pair]]) -> Iterator[Pair]:
    return (pair for turn in zip_longest(*pairs) for pair in turn if pair is not None)


def _bounded(source: Checkpoint, pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs, in order, as long as they need no more files and samples than are read at most."""
    files: set[Path] = set()
    samples: set[tuple[int, str]] = set()
    for pair in pairs:
        wanted = {(rank, pair.tensor) for rank in pair[1:]}
        needed = {source.records_of(rank)[pair.tensor][0] for rank in pair[1:]}
        if len(files | needed) <= _MOST_FILES and len(samples | wanted) <= _MOST_SAMPLES:
            files |= needed
            samples |= wanted
            yield pair


def read_samples(source: Checkpoint, wanted: Iterable[tuple[int, str]]) -> Samples:
    """Some bytes of the shards of (rank, tensor), from their starts and middles; every file is opened once."""
    by_file: dict[Path, list[tuple[int, str, TensorRecord]]] = {}
    for rank, name in sorted(wanted):
        path, record = source.records_of(rank)[name]
        by_file.setdefault(path, []).append((rank, name, record))
    found = {(rank, name): b"" for records in by_file.values() for rank, name, _ in records}
    windows = {
        path: [(rank, name, *window) for rank, name, record in records for window in _windows(record)]
        for path, records in by_file.items()
    }
    contents = each(lambda path: _read(path, [window[2:] for window in windows[path]]), list(windows))
    for of_file, samples in zip(windows.values(), contents):
        for (rank, name, _, _), content in zip(of_file, samples):
            found[rank, name] += content
    return found


def repeats_itself(source: Checkpoint, rank: int, name: str) -> bool:
    """Whether a shard is made of equal blocks of rows, as far as samples tell: experts that are copies."""
    path, record = source.records_of(rank)[name]
    if len(record.segments) != 1 or not record.spec.shape:
        return False
    rows, (offset, length) = record.spec.shape[0], record.segments[0]
    # What repeats k times repeats q times too, for every prime q of k.
    for blocks in _primes(rows):
        block = length // blocks
        windows = [(offset + block * number, min(_WINDOW, block)) for number in (0, blocks - 1)]
        first, last = _read(path, windows)
        if first == last and len(set(first)) > 8:  # rows of zeros repeat in any matrix
            return True
    return False


def _primes(number: int) -> Iterator[int]:
    divisor = 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            yield divisor
            while number % divisor == 0:
                number //= divisor
        divisor += 1
    if number > 1:
        yield number


def _windows(record: TensorRecord) -> Iterator[tuple[int, int]]:
    """The bytes (offset, length) to read of a shard."""
    for offset, length in record.segments[:1]:
        if length <= 2 * _WINDOW:
            yield offset, length
            continue
        unit = math.lcm(record.spec.dtype.itemsize, 8)
        yield offset, _WINDOW
        yield offset + length // 2 // unit * unit, _WINDOW


def _read(path: Path, windows: Sequence[tuple[int, int]]) -> list[bytes]:
    try:
        with opened(path) as handle, closing(Pieces(handle)) as pieces:
            contents = list(pieces.read_all(windows))
    except OSError as error:
        raise TransferError(f"{path}: reading samples of its tensors failed: {error.strerror or error}") from error
    if any(len(content) < length for content, (_, length) in zip(contents, windows)):
        raise TransferError(f"{path} has become shorter while it was read; is it still being written?")
    return contents
