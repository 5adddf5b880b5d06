"""A plan out of the JSON of a plan file: every type, number and path in it is checked.

The digest of a plan file tells damage, it does not keep anybody from writing one. What is not checked here is what
the plan checks itself (boxes in bounds, every element made exactly once) and what the reading of the sources does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from mindformers_ckpt.formats import DType, TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.tensor_file import Malformed, check_shape
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import MOST_RANKS
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer

_LARGEST = (1 << 63) - 1
_FORMATS = ("ckpt", "safetensors")

Made = TypeVar("Made")


class DecodeError(ValueError):
    """The JSON holds no plan that can be run; the text says what is wrong with it."""


def decode_plan(body: Mapping[str, Any]) -> Plan:
    """The plan in the body of a plan file. Raises DecodeError."""
    try:
        boxes = _table(body, "boxes", _box)
        sources = _table(body, "sources", _source)
        places = _table(body, "places", lambda entry: tuple(_place(place, boxes) for place in _list(entry)))
        specs = _table(body, "tensors", _spec)
        lists = _table(body, "lists", lambda entry: tuple(_at(specs, number) for number in _list(entry)))
        targets = _table(body, "targets", lambda entry: _target(entry, lists))
        transfers = _table(body, "transfers", lambda entry: _transfer(entry, places))
        warnings = _table(body, "warnings", _text)
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
            _at(sources, place.file)
        for place in transfer.targets:
            _at(targets, place.file)
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
    return [make(entry) for entry in _list(body[key])]


def _source(entry: Any) -> SourceFile:
    path, size, modified = _list(entry, 3)
    _number(modified, least=-_LARGEST)
    if not Path(_text(path)).is_absolute():
        raise ValueError(f"the source file {path!r} is not an absolute path")
    return SourceFile(Path(path), _number(size))


def _target(entry: Any, lists: Sequence[tuple[TensorSpec, ...]]) -> TargetFile:
    path, rank, format, number = _list(entry, 4)
    if _number(rank) >= MOST_RANKS:
        raise ValueError(f"no job has a rank {rank}")
    if format not in _FORMATS:
        raise ValueError(f"a target file of the format {format!r}")
    parts = PurePosixPath(_text(path)).parts
    if len(parts) != 2 or ".." in parts or parts[0] != f"rank_{rank}" or not path.endswith(f"{rank}.{format}"):
        raise ValueError(
            f"the target file {path!r} leads out of the target folder, or is not rank_{rank}/<prefix>{rank}.{format}"
        )
    return TargetFile(path, rank, format, _at(lists, number))


def _spec(entry: Any) -> TensorSpec:
    name, dtype, shape = _list(entry, 3)
    spec = TensorSpec(_text(name), by_name(_text(dtype)), _numbers(shape))
    check_shape(spec.name, spec.shape, spec.dtype.itemsize)
    return spec


def _box(entry: Any) -> Box:
    start, stop = _list(entry, 2)
    box = Box(_numbers(start), _numbers(stop))
    if len(box.start) != len(box.stop) or any(first > last for first, last in zip(box.start, box.stop)):
        raise ValueError(f"{box} is not a box")
    return box


def _place(entry: Any, boxes: Sequence[Box]) -> Place:
    file, box = _list(entry, 2)
    return Place(_number(file), _at(boxes, box))


def _transfer(entry: Any, places: Sequence[tuple[Place, ...]]) -> Transfer:
    name, dtype, shape, sources, targets = _list(entry, 5)
    spec = _spec([name, dtype, shape])
    if not _at(places, targets):
        raise ValueError(f"{name!r} is made for no file")
    return Transfer(spec.name, spec.dtype, spec.shape, _at(places, sources), _at(places, targets))


def _at(table: Sequence[Made], number: Any) -> Made:
    position = _number(number)
    if position >= len(table):
        raise DecodeError(f"entry {position} of a table of {len(table)}")
    return table[position]


def _list(value: Any, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise TypeError(f"a list{'' if length is None else f' of {length}'} must stand where {value!r:.80} does")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(f"a text must stand where {value!r:.80} does")
    return value


def _number(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _LARGEST:  # True is no number here
        raise TypeError(f"a number must stand where {value!r:.80} does")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    return tuple(_number(number) for number in _list(value))
