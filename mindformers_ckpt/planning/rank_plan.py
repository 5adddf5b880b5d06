"""What one rank takes of a plan, as text: its tensors, and at which bytes of which files their parts are.

One rank of a job looks at the source and tells every other one this. It then reads contents alone: no folder is listed,
and no header is read again. Where a header is only likely the heads of what is read are told, too, to be compared.

    {"target": [path, rank, format],
     "names": [text, …], "kinds": [[element type, [shape]], …],
     "tensors": [name, kind, …],
     "held": [[[name, kind, offset, length, …], [[offset, head], …]], …],
     "files": [[number, name from the root, bytes, held], …],
     "alike": [[[name, kind, …], [source place, …], [target place, …]], …]}

Names and kinds are told once, and are referred to by number; ranks of a stage are told all of both that any of them
needs. Transfers that are cut alike are told together, and what is read of files is told once where it is the same. A
tensor of a file has an offset and a length for each of its segments.

    place:   [file, start, stop, name in the file, view, computation], from its end without what is not there
    view:    [shape, start, stop, order]
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import FormatError, PlanError, TransferError, system_errors
from mindformers_ckpt.formats import DType, Header, Segment, TensorRecord, TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.headers import heads_by_content
from mindformers_ckpt.formats.tensor_file import Malformed
from mindformers_ckpt.planning.checked import (
    DecodeError,
    box_of,
    bytes_of,
    list_of,
    number_of,
    numbers_of,
    spec_of,
    text_of,
)
from mindformers_ckpt.planning.computations import Cast, Compute, Constant, Dequantise
from mindformers_ckpt.planning.model import Alike, Numbers, Place, Plan, SourceFile, TargetFile, Transfer, View, once
from mindformers_ckpt.text_files import parse_json

_dump = json.JSONEncoder(separators=(",", ":")).encode
_MAX_BYTES = 1 << 30  # of the text of one rank: that of a rank with all of 100,000 tensors has 20 MB
_HELD = 256  # texts of what is read of files that are kept for the next ranks
_ONE_TARGET = {0: 0}
_NOTHING = (Segment(0, 0),)  # of a tensor without elements
_PLAIN = ("", None, None)  # name, view and computation of a place that is a box of the file's tensor of that name


class _Kind(NamedTuple):
    """Element type and shape."""

    dtype: DType
    shape: tuple[int, ...]


class RankPlan(NamedTuple):
    """A plan with one target, and the headers of its sources as far as it reads them, by their number."""

    plan: Plan
    headers: Mapping[int, Header]

    def only(self, names: Container[str]) -> RankPlan:
        """The plan of some of the tensors."""
        target = self.plan.targets[0]
        target = target._replace(tensors=tuple(spec for spec in target.tensors if spec.name in names))
        transfers = tuple(transfer for transfer in self.plan.transfers if transfer.name in names)
        return self._replace(plan=replace(self.plan, targets=(target,), transfers=transfers))


def encode_ranks(plan: Plan, root: Path, header_of: Callable[[Path], Header]) -> Iterator[str]:
    """The text of every target, in their order. Source files are named from `root`.

    `header_of` gives what was read of a file when the plan was made. Raises TransferError for a file that was written
    since.
    """
    encoder = _Encoder(plan, root, header_of)
    for target, alike in zip(plan.targets, plan.alike_by_target()):
        yield encoder.text(target, alike)


class _Tables:
    """What texts refer to by number: names and kinds of tensors. Targets with the same tensors share them."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._names, self._kinds = Numbers[str](), Numbers[tuple[str, tuple[int, ...]]]()
        self.specs = _dump([number for spec in specs for number in self._numbers(spec.name, spec.dtype, spec.shape)])
        self.transfers = once(self._transfers_text)

    def text(self) -> str:
        return f'"names":{_dump([*self._names])},"kinds":{_dump([*self._kinds])},"tensors":{self.specs}'

    def records(self, records: Iterable[TensorRecord]) -> str:
        """The rows of tensors of a file."""
        rows: list[int] = []
        for (name, dtype, shape), segments in records:
            numbers = self._numbers(name, dtype, shape)
            for segment in segments or _NOTHING:
                rows += *numbers, *segment
        return _dump(rows)

    def _transfers_text(self, transfers: Sequence[Transfer]) -> str:
        """The rows of transfers that are cut alike."""
        return _dump([number for transfer in transfers for number in self._numbers(*transfer[:3])])

    def _numbers(self, name: str, dtype: DType, shape: tuple[int, ...]) -> tuple[int, int]:
        return self._names[name], self._kinds[dtype.name, shape]


class _Encoder:
    """Makes the texts of targets out of pieces that many of them share."""

    def __init__(self, plan: Plan, root: Path, header_of: Callable[[Path], Header]) -> None:
        self._plan, self._root, self._header_of = plan, root, header_of
        self._headers: dict[int, Header] = {}
        self._files: dict[int, tuple[str, int]] = {}
        self._first: dict[tuple[int, int], int] = {}  # of the files with the same tensors at the same places
        # Ranks of a stage have these in common.
        self._tables, self._sources, self._targets = once(_Tables), once(_sources_text), once(_targets_text)
        self._names = once(_names_of)
        self._held = lru_cache(maxsize=_HELD)(self._held_text)

    def text(self, target: TargetFile, alike: Sequence[Alike]) -> str:
        tables = self._tables(target.tensors)
        read: dict[int, dict[tuple[str, ...], None]] = defaultdict(dict)
        rows = []
        for transfers, sources, targets in alike:
            rows.append(f"[{tables.transfers(transfers)},{self._sources(sources)},{self._targets(targets)}]")
            for file, tensor in (file for place in sources for file in _tensors_of(place)):
                read[file][(tensor,) if tensor else self._names(transfers)] = None
        held, files = Numbers[str](), []
        for number in sorted(read):
            about, like = self._file(number)
            files.append(f"[{about},{held[self._held(like, tuple(read[number]), tables)]}]")
        lists = f'"held":[{",".join(held)}],"files":[{",".join(files)}],"alike":[{",".join(rows)}]'
        text = f'{{"target":{_dump([target.path, target.rank, target.format])},{tables.text()},{lists}}}'
        return base64.b64encode(zlib.compress(text.encode("ascii"), 1)).decode("ascii")

    def _file(self, number: int) -> tuple[str, int]:
        """What is told of a file itself, and the first file with the same tensors at the same places."""
        if number not in self._files:
            file = self._plan.sources[number]
            header = self._headers[number] = self._current(file)
            places = id(header.tensors), id(header.frames) if header.is_likely else 0
            about = f"{number},{_dump(name_from(self._root, file.path))},{file.size}"
            self._files[number] = about, self._first.setdefault(places, number)
        return self._files[number]

    def _held_text(self, number: int, names: tuple[tuple[str, ...], ...], tables: _Tables) -> str:
        """What is read of a file, and of those that are like it: where it is, and the heads to be compared."""
        header = self._headers[number]
        records = [header.tensors[name] for name in dict.fromkeys(chain.from_iterable(names))]
        heads = _dump(_heads_of(header, records)) if header.is_likely else "[]"
        return f"[{tables.records(records)},{heads}]"

    def _current(self, file: SourceFile) -> Header:
        header = self._header_of(file.path)
        with system_errors(TransferError, f"{file.path}: cannot be read"):
            status = file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (header.size, header.modified):
            raise TransferError(f"{file.path} was written after the job looked at it; start the job again")
        return header


def _heads_of(header: Header, records: Iterable[TensorRecord]) -> list[tuple[int, str]]:
    """The heads of records: offset, bytes as text."""
    heads_at = heads_by_content(header.frames)
    heads = (heads_at[segment.offset] for record in records for segment in record.segments)
    return [(offset, head.decode("latin-1")) for offset, head in heads]


def _names_of(transfers: Sequence[Transfer]) -> tuple[str, ...]:
    return tuple(transfer.name for transfer in transfers)


def _sources_text(places: Sequence[Place]) -> str:
    return _dump([_place_to_json(place) for place in places])


def _targets_text(places: Sequence[Place]) -> str:
    return _dump([_place_to_json(place._replace(file=0)) for place in places])


def decode_rank(text: str, root: Path) -> RankPlan:
    """What a text says that another rank wrote; every type, number and name in it is checked.

    Raises PlanError where it is not a plan, or names a file outside of the root (or of its folder, where it is a file).
    """
    try:
        body = parse_json(_unpacked(text))
        names = [text_of(name) for name in list_of(body["names"])]
        kinds = [_kind(entry) for entry in list_of(body["kinds"])]
        headers: dict[int, Header] = {}
        numbers: dict[int, int] = {}
        held = [_held(entry, names, kinds) for entry in list_of(body["held"])]
        for entry in list_of(body["files"]):
            number, name, size, which = list_of(entry, 4)
            position = numbers.setdefault(number_of(number), len(numbers))
            headers[position] = _header(path_in(root, text_of(name)), number_of(size), held[number_of(which)])
        path, rank, format = list_of(body["target"], 3)
        specs = tuple(TensorSpec(names[name], *kinds[kind]) for name, kind in _rows(body["tensors"], 2))
        target = TargetFile(text_of(path), number_of(rank), text_of(format), specs)
        transfers = tuple(_transfers(body["alike"], names, kinds, numbers))
        sources = tuple(SourceFile(header.path, header.size) for header in headers.values())
    except KeyError as error:
        raise PlanError(f"what another rank told of its plan lacks {error}") from None
    except (TypeError, ValueError, IndexError, Malformed, FormatError, zlib.error) as error:
        raise PlanError(f"what another rank told of its plan cannot be read: {str(error)[:300]}") from None
    plan = Plan(sources, (target,), transfers)
    plan.check()
    return RankPlan(plan, headers)


def _unpacked(text: str) -> bytes:
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes, or is cut off")
    return data


def _rows(values: Any, width: int) -> Iterator[tuple[int, ...]]:
    """The rows of a table that is told as one list of numbers."""
    numbers = numbers_of(values)
    if len(numbers) % width:
        raise DecodeError(f"a table of {len(numbers)} numbers, in rows of {width}")
    return zip(*[iter(numbers)] * width)


def _kind(entry: Any) -> _Kind:
    dtype, shape = list_of(entry, 2)
    spec = spec_of(["a tensor", dtype, shape])
    return _Kind(spec.dtype, spec.shape)


def _records(rows: Any, names: Sequence[str], kinds: Sequence[_Kind]) -> dict[str, TensorRecord]:
    """Where the tensors of a file are in it."""
    found: dict[str, TensorRecord] = {}
    for number, kind, offset, length in _rows(rows, 4):
        name = names[number]
        before = found[name].segments if name in found else ()
        segments = (*before, Segment(offset, length)) if length else before
        found[name] = TensorRecord(TensorSpec(name, *kinds[kind]), segments)
    for name, (spec, segments) in found.items():
        if sum(segment.length for segment in segments) != spec.nbytes:
            raise DecodeError(f"{name!r} is not where it should be")
    return found


class _Held(NamedTuple):
    """What is read of a file: where its tensors are in it, and the heads to be compared."""

    tensors: dict[str, TensorRecord]
    heads: tuple[tuple[int, bytes], ...]


def _held(entry: Any, names: Sequence[str], kinds: Sequence[_Kind]) -> _Held:
    rows, told = list_of(entry, 2)
    heads = [(number_of(offset), bytes_of(head)) for offset, head in map(list_of, list_of(told))]
    return _Held(_records(rows, names, kinds), tuple(sorted(heads)))


def _header(path: Path, size: int, held: _Held) -> Header:
    """Heads are those of a .ckpt file: any other one is read whole."""
    return Header(path, "ckpt", size, held.tensors, {}, None, held.heads, is_likely=bool(held.heads))


def name_from(root: Path, path: Path) -> str:
    """The name of a file from the root, as text that JSON can hold: names may be any bytes."""
    return os.fsencode(os.path.relpath(path, root)).decode("latin-1")


def path_in(root: Path, name: str) -> Path:
    """The file that `name_from` named, below the root or (where the root is a file) beside it.

    Raises ValueError for any other one.
    """
    path = Path(os.path.normpath(root / os.fsdecode(name.encode("latin-1"))))
    if os.path.isabs(name) or not path.is_relative_to(root.parent):
        raise DecodeError(f"the file {name!r} is not one of {root}")
    return path


def _tensors_of(place: Place) -> Iterator[tuple[int, str]]:
    """The tensors of files that a place reads: file, name there (none where it is that of the transfer)."""
    if isinstance(place.compute, Constant):
        return
    yield place.file, place.tensor
    if isinstance(place.compute, Dequantise):
        yield place.compute.scale_file, place.compute.scale


def _transfers(
    alike: Any, names: Sequence[str], kinds: Sequence[_Kind], numbers: Mapping[int, int]
) -> Iterator[Transfer]:
    """The transfers. Those that are cut alike share their places, and these are looked at once."""
    for entry in list_of(alike):
        rows, given, taken = list_of(entry, 3)
        sources = tuple(_place(place, numbers) for place in list_of(given))
        targets = tuple(_place(place, _ONE_TARGET) for place in list_of(taken))
        for name, kind in _rows(rows, 2):
            yield Transfer(names[name], *kinds[kind], sources, targets)


def _place_to_json(place: Place) -> list[Any]:
    values: list[Any] = [
        place.file,
        *place.box,
        place.tensor,
        _view_to_json(place.view),
        _compute_to_json(place.compute),
    ]
    while len(values) > 3 and values[-1] == _PLAIN[len(values) - 4]:
        values.pop()
    return values


def _place(entry: Any, numbers: Mapping[int, int]) -> Place:
    values = list_of(entry)
    if len(values) < 3 or len(values) > 6:
        raise DecodeError(f"a place of {len(values)} values")
    file, start, stop, tensor, view, compute = values + list(_PLAIN[len(values) - 3 :])
    computation = None if compute is None else _compute(compute, numbers)
    return Place(
        0 if isinstance(computation, Constant) else numbers[number_of(file)],
        box_of([start, stop]),
        text_of(tensor),
        None if view is None else _view(view),
        computation,
    )


def _view_to_json(view: View | None) -> list[Any] | None:
    return None if view is None else [view.shape, *view.box, view.order]


def _view(entry: Any) -> View:
    shape, start, stop, order = list_of(entry, 4)
    return View(numbers_of(shape), box_of([start, stop]), numbers_of(order))


def _compute_to_json(compute: Compute | None) -> list[Any] | None:
    if compute is None:
        return None
    if isinstance(compute, Cast):
        return ["cast", compute.dtype.name]
    if isinstance(compute, Constant):
        return ["constant", compute.dtype.name, compute.content.hex()]
    if isinstance(compute, Dequantise):
        dtype, file, name, matrix, block, scale_dtype = compute
        return ["dequantise", dtype.name, file, name, matrix, block, scale_dtype.name]
    raise PlanError("a plan that merges LoRA branches is not one of a job")


def _compute(entry: Any, numbers: Mapping[int, int]) -> Compute:
    kind, dtype, *rest = list_of(entry)
    of_type = by_name(text_of(dtype))
    if kind == "cast":
        list_of(rest, 0)
        return Cast(of_type)
    if kind == "constant":
        (content,) = list_of(rest, 1)
        return Constant(of_type, bytes.fromhex(text_of(content)))
    if kind != "dequantise":
        raise DecodeError(f"a computation {kind!r:.40}")
    file, name, matrix, block, scale_dtype = list_of(rest, 5)
    rows, columns = numbers_of(list_of(matrix, 2))
    block_rows, block_columns = (number_of(extent, least=1) for extent in list_of(block, 2))
    scale = numbers[number_of(file)], text_of(name)
    return Dequantise(of_type, *scale, (rows, columns), (block_rows, block_columns), by_name(text_of(scale_dtype)))
