"""metadata.json of MindFormers' own format (checkpoint 2.0): layouts of all parameters, and which file holds a slice.

    state_dict_metadata[name]    global_shape, axis_fragmentations, layout (or null: whole everywhere),
                                 chunk: [{global_offset: [number of the slice], local_shape}, …]
    storage_data["('name', (number,))"]    [{file_name, storage_rank, rank_group}, …]

The number of a slice counts the cells of the tensor's grid in row-major order, which is the same as mixed radix over
the flattened tensor map. Counters of the training are not listed.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import StrategyError, describe_problems, raise_problems
from mindformers_ckpt.geometry.layout import MOST_RANKS, Layout
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.text_files import parse_json

METADATA_FILE = "metadata.json"
LARGEST = 1 << 30
MARK = "state_dict_metadata"
# What repr() writes of a string, and nothing else that Python would read there: see the escapes of str.__repr__.
_ESCAPE = r"\\(?:[\\'\"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4})"
_NAME = rf"""'(?:[^'\\\r\n\0]|{_ESCAPE})*'|"(?:[^"\\\r\n\0]|{_ESCAPE})*\""""
_KEY = re.compile(rf"\((?P<name>{_NAME}), \((?P<number>[0-9]{{1,9}}),?\)\)")


class Recorded(NamedTuple):
    """A tensor as metadata.json describes it: its layout (None: whole everywhere), and the first rank of that."""

    shape: tuple[int, ...]
    layout: Layout | None
    first: int


class Stored(NamedTuple):
    """A slice of a tensor: the number of its cell, the file that holds it and the rank that wrote it."""

    name: str
    cell: int
    file: str
    rank: int


@dataclass(frozen=True)
class Metadata:
    """The content of a metadata.json.

    Attributes:
        path: of the file, for messages.
        tensors: name -> what is recorded of it.
        stored: all slices of all files.
        rank_count: ranks of the job that saved it.
        stage_size: ranks of one of its pipeline stages.
    """

    path: Path
    tensors: Mapping[str, Recorded]
    stored: tuple[Stored, ...]
    rank_count: int
    stage_size: int

    @cached_property
    def by_file(self) -> Mapping[str, Sequence[Stored]]:
        """The slices of every file."""
        found: dict[str, list[Stored]] = {}
        for slice in self.stored:
            found.setdefault(slice.file, []).append(slice)
        return found

    def files_by_rank(self) -> dict[int, tuple[str, ...]]:
        """The files that a rank wrote, by rank."""
        found: dict[int, dict[str, None]] = {}
        for slice in self.stored:
            found.setdefault(slice.rank, {})[slice.file] = None
        return {rank: tuple(names) for rank, names in sorted(found.items())}

    def strategy(self) -> Strategy:
        """The strategy of the job that saved it.

        A tensor is on its own stage, and on those that share it and cut it alike (a tied embedding; its optimizer
        shard may be on one of them only).
        """
        size = self.stage_size
        stages: list[dict[str, Layout]] = [{} for _ in range(self.rank_count // size)]
        alike: dict[tuple[str, int], bool] = {}
        for slice in self.stored:
            key = slice.name, slice.rank // size
            alike[key] = alike.get(key, True) and self.is_in_place(slice)
        for name, tensor in self.tensors.items():
            if tensor.layout is not None:
                stages[tensor.first // size][name] = _on_stage(tensor.layout, size)
        for (name, stage), is_alike in alike.items():
            layout = self.tensors[name].layout
            if layout is not None and is_alike:
                stages[stage][name] = _on_stage(layout, size)
        return Strategy(tuple(stages), size, str(self.path))

    def is_in_place(self, slice: Stored) -> bool:
        """Whether the rank that wrote a slice holds it by the layout of its tensor."""
        return number_of(self.tensors[slice.name].layout, slice.rank) == slice.cell


def is_metadata(data: bytes) -> bool:
    """Whether the bytes of a JSON file are a metadata.json, by what stands in it first."""
    return MARK.encode() in data[:4096]


def parse_metadata(path: Path, data: bytes) -> Metadata:
    """The content of a metadata.json. Raises StrategyError with everything that is wrong in it."""
    try:
        content = parse_json(data)
        described = content[MARK]
        stored = tuple(_stored(content["storage_data"]))
        if not isinstance(described, dict) or not described:
            raise ValueError("it describes no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StrategyError(f"{path} is not a metadata.json of MindFormers (checkpoint 2.0): {error!r:.200}") from None
    tensors: dict[str, Recorded] = {}
    problems = []
    for name, entry in described.items():
        try:
            tensors[name] = recorded_of(entry)
        except (StrategyError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: {error if isinstance(error, StrategyError) else f'{error!r:.200}'}")
    raise_problems(StrategyError, f"{path}: tensors whose description cannot be used", problems)
    return _checked(Metadata(path, tensors, stored, *_sizes(path, tensors, stored)))


def _stored(storage: Any) -> Iterator[Stored]:
    for key, places in storage.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key[:80]!r} is not the name of a slice")
        name = ast.literal_eval(match["name"])
        for place in places:
            file = place["file_name"]
            if not isinstance(file, str) or "/" in file or "\0" in file or not file.endswith(".safetensors"):
                raise ValueError(f"{file!r:.80} is not the name of a file in its folder")
            yield Stored(name, int(match["number"]), file, _rank(place["storage_rank"]))


def recorded_of(entry: Any) -> Recorded:
    """What an entry of `state_dict_metadata` says. Raises StrategyError, or what wrong types and keys lead to."""
    shape = _sizes_of(entry["global_shape"])
    found = entry["layout"]
    if found is None:
        return Recorded(shape, None, 0)
    if found.get("interleaved_parallel"):
        raise StrategyError("its slices are interleaved (interleaved_parallel), which cannot be read")
    matrix = tuple(_sizes_of(found["device_matrix"]))
    parts = [part if isinstance(part, list) else [part] for part in found["tensor_map"]]
    layout = Layout(matrix, tuple(tuple(axis for axis in part if axis != -1) for part in parts))
    ranks = [_rank(rank) for rank in found["rank_list"]]
    first = ranks[0] if ranks else 0
    if ranks != list(range(first, first + layout.rank_count)) or first % layout.rank_count:
        raise StrategyError(f"its ranks {ranks[:20]} are not the {layout.rank_count} ranks of a stage in their order")
    if layout.cuts != tuple(_sizes_of(entry["axis_fragmentations"])):
        raise StrategyError(
            f"it is cut into {entry['axis_fragmentations']!r:.80} pieces, but its layout ({layout.describe()}) says "
            f"{list(layout.cuts)}"
        )
    layout.boxes(shape)
    return Recorded(shape, layout, first)


def _sizes(path: Path, tensors: Mapping[str, Recorded], stored: tuple[Stored, ...]) -> tuple[int, int]:
    """Ranks of the job, and of one stage."""
    size = max((tensor.layout.rank_count for tensor in tensors.values() if tensor.layout is not None), default=0)
    last = max((slice.rank for slice in stored), default=0)
    ends = (tensor.first + tensor.layout.rank_count for tensor in tensors.values() if tensor.layout is not None)
    count = max([last + 1, *ends])
    size = size or count
    odd = [
        name for name, tensor in tensors.items() if tensor.layout is not None and size % tensor.layout.rank_count != 0
    ]
    raise_problems(StrategyError, f"{path}: layouts whose ranks are not part of a stage of {size}", odd)
    return -(-count // size) * size, size


def _checked(metadata: Metadata) -> Metadata:
    """Refuse slices that are not where the layout of their tensor has them. Raises StrategyError listing all."""
    size, problems = metadata.stage_size, {}
    for slice in metadata.stored:
        tensor = metadata.tensors.get(slice.name)
        if tensor is None:
            problems[slice.name] = "it is stored, but not described"
        elif tensor.first // size == slice.rank // size and not metadata.is_in_place(slice):
            cell = number_of(tensor.layout, slice.rank)
            problems[slice.name] = f"rank {slice.rank} wrote its slice {slice.cell}, but holds slice {cell}"
    if problems:
        listed = [f"{name}: {fault}" for name, fault in problems.items()]
        raise StrategyError(describe_problems(f"{metadata.path} contradicts itself", listed))
    return metadata


def number_of(layout: Layout | None, rank: int) -> int:
    """The number of the slice that a rank holds: that of its cell in row-major order."""
    if layout is None:
        return 0
    number = 0
    for index, cut in zip(layout.cells[rank % layout.rank_count], layout.cuts):
        number = number * cut + index
    return number


def _on_stage(layout: Layout, size: int) -> Layout:
    """A layout of a part of a stage's ranks for all of them: the other parts hold the same."""
    repeats = size // layout.rank_count
    return layout if repeats == 1 else Layout((repeats, *layout.device_matrix), layout.tensor_map)


def _sizes_of(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 1 << 63 for value in values):
        raise TypeError(f"{values!r:.80} where a list of sizes must stand")
    if math.prod(value or 1 for value in values) >= 1 << 63:
        raise ValueError(f"the shape {values!r:.80} overflows")
    return tuple(values)


def _rank(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST_RANKS:
        raise TypeError(f"{value!r:.80} where the number of a rank must stand")
    return value
