"""The recorded configurations of tests/data/strategies, and checkpoints cut by what was recorded.

A configuration holds strategy files as MindSpore wrote them when it compiled a real network, and in
slices.json the slices that the framework itself cut. `cut` makes the rank files of a checkpoint from whole
tensors by these slices.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ckpt.formats import DType, TensorSpec, layout_file, read_header
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.strategy.files import read_strategy
from mindformers_ckpt.strategy.model import Strategy

STRATEGIES = Path(__file__).parent / "data" / "strategies"
CONFIGURATIONS = tuple(sorted(entry.name for entry in STRATEGIES.iterdir()))


class Tensor(NamedTuple):
    """A tensor as bits: its element type, and an array of the type's carrier."""

    dtype: DType
    bits: np.ndarray[Any, Any]

    def part(self, box: Box) -> Tensor:
        return Tensor(self.dtype, self.bits[box.slices()])


@dataclass(frozen=True)
class Parameter:
    """A parameter as it was recorded: `slices` where the slice itself was seen, `shapes` everywhere."""

    full_shape: tuple[int, ...]
    slices: Mapping[int, Box]
    shapes: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Recorded:
    """A recorded configuration."""

    name: str
    parameters: Mapping[str, Parameter]
    stage_of_rank: Mapping[int, int]

    @property
    def folder(self) -> Path:
        return STRATEGIES / self.name

    @property
    def ranks(self) -> list[int]:
        """The ranks whose slices were recorded."""
        return sorted({rank for parameter in self.parameters.values() for rank in parameter.shapes})

    @property
    def file(self) -> Path:
        """One strategy file that describes the whole job: the merged one of a pipeline, else any rank's."""
        merged = sorted(self.folder.glob("merged_ckpt_strategy.*"))
        return merged[0] if merged else min(self.folder.glob("ckpt_strategy_rank_*"))

    @cached_property
    def strategy(self) -> Strategy:
        return read_strategy(self.file)

    @property
    def is_complete(self) -> bool:
        """Whether the slices of all ranks were recorded."""
        return len(self.ranks) == self.strategy.rank_count

    def box(self, name: str, rank: int) -> Box | None:
        """What a rank holds of a parameter, None for nothing: as recorded, by the layout where it was not."""
        parameter = self.parameters[name]
        if rank in parameter.slices:
            return parameter.slices[rank]
        if rank in self.stage_of_rank and rank not in parameter.shapes:
            return None
        layout = self.strategy.stages[self.strategy.stage_of(rank)].get(name)
        if layout is None:
            return None
        return layout.for_whole(parameter.full_shape).box(parameter.full_shape, rank % self.strategy.stage_size)


@cache
def recorded(name: str) -> Recorded:
    content = json.loads((STRATEGIES / name / "slices.json").read_bytes())
    parameters = {}
    for parameter, entry in content["params"].items():
        slices, shapes = {}, {}
        for rank, part in entry["slices"].items():
            if isinstance(part, dict):
                shapes[int(rank)] = tuple(part["shape"])
            else:
                slices[int(rank)] = Box(*map(tuple, part))
                shapes[int(rank)] = slices[int(rank)].shape
        parameters[parameter] = Parameter(tuple(entry["full_shape"]), slices, shapes)
    stages = {int(rank): stage for rank, stage in content["stage_of_rank"].items()}
    return Recorded(name, parameters, stages)


def random_bits(dtype: DType, shape: Iterable[int], generator: np.random.Generator) -> Tensor:
    """A tensor of random values. Floats are finite: MindSpore rewrites NaNs of bfloat16."""
    shape = tuple(shape)
    if dtype.name == "bool":
        bits = generator.integers(0, 2, shape, np.uint8)
    elif dtype.name in ("float16", "float32", "float64"):
        bits = generator.standard_normal(shape).astype(dtype.name).view(dtype.carrier)
    elif dtype.name == "bfloat16":
        bits = (generator.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif dtype.itemsize == 16:
        bits = np.frombuffer(generator.bytes(16 * int(np.prod(shape))), dtype.carrier).reshape(shape)
    else:
        bits = generator.integers(0, 1 << (8 * dtype.itemsize), shape, np.dtype(f"u{dtype.itemsize}").type)
    return Tensor(dtype, np.asarray(bits, dtype.carrier))


_TYPES = ("float32", "bfloat16", "float16", "bfloat16", "float32", "int32", "bool", "int64")


def random_model(names: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random whole tensors of mixed element types; the type follows from the name."""
    generator = np.random.default_rng(seed)
    return {
        name: random_bits(by_name(_TYPES[zlib.crc32(name.encode()) % len(_TYPES)]), shape, generator)
        for name, shape in names.items()
    }


def touch(root: Path, *names: str) -> Path:
    """Files whose contents nobody looks at."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint file; the suffix tells the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, tensor.dtype, tensor.bits.shape) for name, tensor in tensors.items()]
    layout = layout_file(path.suffix[1:], specs)
    with path.open("wb") as file:
        file.truncate(layout.size)
        for offset, frame in layout.frames:
            os.pwrite(file.fileno(), frame, offset)
        for name, record in layout.tensors.items():
            content = tensors[name].bits.tobytes()
            for segment in record.segments:
                os.pwrite(file.fileno(), content[: segment.length], segment.offset)
                content = content[segment.length :]
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint file."""
    data = path.read_bytes()
    tensors = {}
    for name, record in read_header(path).tensors.items():
        content = b"".join(data[offset : offset + length] for offset, length in record.segments)
        bits = np.frombuffer(content, record.spec.dtype.carrier).reshape(record.spec.shape)
        tensors[name] = Tensor(record.spec.dtype, bits)
    return tensors


def read_ranks(root: Path) -> dict[int, dict[str, Tensor]]:
    """Read all files `root/rank_<n>/*`, one a rank."""
    ranks = {}
    for folder in root.glob("rank_*"):
        (path,) = folder.iterdir()
        ranks[int(folder.name[len("rank_") :])] = read_tensors(path)
    return ranks


def slices_of(
    config: Recorded, tensors: Mapping[str, Tensor], replicated: Iterable[str] = ()
) -> dict[int, dict[str, Tensor]]:
    """What every rank of a configuration holds of whole tensors: name -> its part, in the order of `tensors`."""
    return {
        rank: {
            name: part
            for name, tensor in tensors.items()
            if (part := _part(config, name, rank, tensor, replicated)) is not None
        }
        for rank in range(config.strategy.rank_count)
    }


def _part(config: Recorded, name: str, rank: int, tensor: Tensor, replicated: Iterable[str]) -> Tensor | None:
    if name in replicated:
        return tensor
    if name not in config.parameters:
        return None
    box = config.box(name, rank)
    return None if box is None else tensor.part(box)


def write_ranks(root: Path, ranks: Mapping[int, Mapping[str, Tensor]], format: str = "ckpt") -> Path:
    for rank, tensors in ranks.items():
        write_tensors(root / f"rank_{rank}" / f"checkpoint_{rank}.{format}", tensors)
    return root


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare tensors by name: types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].bits.shape == tensor.bits.shape, name
        assert found[name].bits.tobytes() == tensor.bits.tobytes(), name


def assert_ranks(root: Path, expected: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Compare all files `root/rank_<n>/*` with the tensors that every rank should hold."""
    found = read_ranks(root)
    assert found.keys() == expected.keys()
    for rank, tensors in expected.items():
        assert_same(found[rank], tensors)
