"""The plan of one rank that knows its own boxes, from slices whose layouts and files are known.

No other rank is asked, and only the files are opened that this one takes from: for jobs whose ranks load each by
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.errors import PlanError, raise_problems
from mindformers_ckpt.formats import Header, TensorSpec
from mindformers_ckpt.formats.headers import sound_headers
from mindformers_ckpt.geometry.box import Box, meets
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer
from mindformers_ckpt.planning.rank_plan import RankPlan
from mindformers_ckpt.strategy.metadata import Recorded, number_of


class Wanted(NamedTuple):
    """A tensor that a rank wants: the shape of the whole one, and the box of it."""

    shape: tuple[int, ...]
    box: Box


class Held(NamedTuple):
    """The slices of a tensor that a checkpoint has: how they are cut, and what tells the file of one by its number."""

    recorded: Recorded
    file_of: Callable[[int], Path | None]


class _Part(NamedTuple):
    file: Path
    box: Box


def plan_of_rank(rank: int, wanted: Mapping[str, Wanted], held: Mapping[str, Held], origin: object) -> RankPlan:
    """The plan of what a rank wants, all of which `held` names, with the headers of its files.

    `origin` is the checkpoint, for messages. Raises PlanError that lists all tensors of another shape, all slices
    that no file holds, and all files that do not hold what was said of them; FormatError for damaged files.
    """
    problems: list[str] = []
    parts = {name: list(_parts(name, want, held[name], problems)) for name, want in wanted.items()}
    headline = f"{origin} cannot be loaded by rank {rank}; is it the checkpoint of this model, and is it complete?"
    raise_problems(PlanError, headline, problems)
    headers = sound_headers(sorted({part.file for taken in parts.values() for part in taken}))
    problems = _contradictions(parts, headers)
    headline = f"{origin}: files and their metadata do not belong together; copy the checkpoint again"
    raise_problems(PlanError, headline, problems)
    specs = {
        name: TensorSpec(name, headers[taken[0].file].tensors[name].spec.dtype, wanted[name].box.shape)
        for name, taken in parts.items()
    }
    numbers = {file: number for number, file in enumerate(headers)}
    transfers = tuple(
        Transfer(
            name,
            spec.dtype,
            wanted[name].shape,
            tuple(Place(numbers[part.file], part.box) for part in parts[name]),
            (Place(0, wanted[name].box),),
        )
        for name, spec in specs.items()
    )
    files = tuple(SourceFile(file, header.size) for file, header in headers.items())
    plan = Plan(files, (TargetFile("", rank, "safetensors", tuple(specs.values())),), transfers)
    plan.check()
    return RankPlan(plan, dict(enumerate(headers.values())))


def _parts(name: str, want: Wanted, held: Held, problems: list[str]) -> Iterator[_Part]:
    """The slices that share elements with a box."""
    shape, layout, _ = held.recorded
    if shape != want.shape:
        problems.append(f"{name}: {list(shape)} in the checkpoint, {list(want.shape)} in the network")
        return
    for number, box in _cells(layout, shape, want.box):
        file = held.file_of(number)
        if file is not None:
            yield _Part(file, box)
        else:
            problems.append(f"{name}{list(shape)}: the box {box} (slice {number}) is in no file")


@lru_cache(maxsize=1024)
def _cells(layout: Layout | None, shape: tuple[int, ...], wanted: Box) -> tuple[tuple[int, Box], ...]:
    """The cells of a tensor's grid that a box meets, each with its number; most tensors of a model are cut alike."""
    if layout is None:
        return ((0, Box.whole(shape)),)
    return tuple((number_of(layout, members[0]), box) for box, members in layout.shards(shape) if meets(box, wanted))


def _contradictions(parts: Mapping[str, Sequence[_Part]], headers: Mapping[Path, Header]) -> list[str]:
    """What files hold otherwise than was said of them: all slices of a tensor have one element type."""
    problems = []
    for name, taken in parts.items():
        dtype = None
        for file, box in taken:
            record = headers[file].tensors.get(name)
            if record is None:
                problems.append(f"{file.name} lacks {name}")
                continue
            dtype = dtype or record.spec.dtype
            if record.spec != TensorSpec(name, dtype, box.shape):
                found = f"{record.spec.dtype.name}{list(record.spec.shape)}"
                problems.append(f"{file.name}: {name} is {found}, {dtype.name}{list(box.shape)} is expected")
    return problems
