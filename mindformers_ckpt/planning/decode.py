"""A plan out of the JSON of a plan file: every type, number and path in it is checked.

The digest of a plan file tells damage, it does not keep anybody from writing one. What is not checked here is what
the plan checks itself (boxes in bounds, every element made exactly once) and what the reading of the sources does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

from mindformers_ckpt.formats import DType, TensorSpec
from mindformers_ckpt.formats.tensor_file import Malformed
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import MOST_RANKS
from mindformers_ckpt.objects.path import as_path
from mindformers_ckpt.planning.checked import (
    LARGEST,
    DecodeError,
    box_of,
    entry_of,
    list_of,
    number_of,
    spec_of,
    text_of,
)
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer

_FORMATS = ("ckpt", "safetensors")

Made = TypeVar("Made")


def decode_plan(body: Mapping[str, Any]) -> Plan:
    """The plan in the body of a plan file. Raises DecodeError."""
    try:
        boxes = _table(body, "boxes", box_of)
        sources = _table(body, "sources", _source)
        places = _table(body, "places", lambda entry: tuple(_place(place, boxes) for place in list_of(entry)))
        specs = _table(body, "tensors", spec_of)
        lists = _table(body, "lists", lambda entry: tuple(entry_of(specs, number) for number in list_of(entry)))
        targets = _table(body, "targets", lambda entry: _target(entry, lists))
        transfers = _table(body, "transfers", lambda entry: _transfer(entry, places))
        warnings = _table(body, "warnings", text_of)
    except KeyError as error:
        raise DecodeError(f"it lacks {error}") from None
    except (TypeError, ValueError, Malformed) as error:
        raise DecodeError(str(error)[:300]) from None
    _check_whole(sources, targets, transfers)
    return Plan(tuple(sources), tuple(targets), tuple(transfers), tuple(warnings))


def _check_whole(sources: Sequence[SourceFile], targets: Sequence[TargetFile], transfers: Sequence[Transfer]) -> None:
    """Refuse files that are not there, and target files that do not get just the tensors that they say."""
    if len({target.path for target in targets}) < len(targets) or len({x.rank for x in targets}) < len(targets):
        raise DecodeError("two target files of one rank")
    if len({transfer.name for transfer in transfers}) < len(transfers):
        raise DecodeError("a tensor is made twice")
    made: list[dict[str, tuple[DType, tuple[int, ...]]]] = [{} for _ in targets]
    for transfer in transfers:
        for place in (*transfer.sources, *transfer.targets):
            if len(place.box.start) != len(transfer.shape):
                raise DecodeError(f"{transfer.name!r}: a box of {len(place.box.start)} dimensions")
        for place in transfer.sources:
            entry_of(sources, place.file)
        for place in transfer.targets:
            entry_of(targets, place.file)
            if place.tensor:
                raise DecodeError(f"{transfer.name!r} has another name in {targets[place.file].path}")
            if transfer.name in made[place.file]:
                raise DecodeError(f"{transfer.name!r} has two places in {targets[place.file].path}")
            made[place.file][transfer.name] = (transfer.dtype, place.box.shape)
    for target, found in zip(targets, made):
        if (
            len(found) != len(target.tensors)
            or {spec.name: (spec.dtype, spec.shape) for spec in target.tensors} != found
        ):
            raise DecodeError(f"the tensors of {target.path} are not those that the plan makes for it")


def _table(body: Mapping[str, Any], key: str, make: Callable[[Any], Made]) -> list[Made]:
    return [make(entry) for entry in list_of(body[key])]


def _source(entry: Any) -> SourceFile:
    path, size, modified = list_of(entry, 3)
    number_of(modified, least=-LARGEST)
    if not as_path(text_of(path)).is_absolute():
        raise ValueError(f"the source file {path!r} is not an absolute path")
    return SourceFile(as_path(path), number_of(size))


def _target(entry: Any, lists: Sequence[tuple[TensorSpec, ...]]) -> TargetFile:
    path, rank, format, number = list_of(entry, 4)
    if number_of(rank) >= MOST_RANKS:
        raise ValueError(f"no job has a rank {rank}")
    if format not in _FORMATS:
        raise ValueError(f"a target file of the format {format!r}")
    parts = PurePosixPath(text_of(path)).parts
    if len(parts) != 2 or ".." in parts or parts[0] != f"rank_{rank}" or not path.endswith(f"{rank}.{format}"):
        raise ValueError(
            f"the target file {path!r} leads out of the target folder, or is not rank_{rank}/<prefix>{rank}.{format}"
        )
    return TargetFile(path, rank, format, entry_of(lists, number))


def _place(entry: Any, boxes: Sequence[Box]) -> Place:
    file, box, *name = list_of(entry)
    if len(name) > 1:
        raise ValueError(f"a place of {len(name) + 2} values")
    return Place(number_of(file), entry_of(boxes, box), text_of(name[0]) if name else "")


def _transfer(entry: Any, places: Sequence[tuple[Place, ...]]) -> Transfer:
    name, dtype, shape, sources, targets = list_of(entry, 5)
    spec = spec_of([name, dtype, shape])
    if not entry_of(places, targets):
        raise ValueError(f"{name!r} is made for no file")
    return Transfer(spec.name, spec.dtype, spec.shape, entry_of(places, sources), entry_of(places, targets))
