"""What one rank takes of a plan, as text: its tensors, and at which bytes of which files their parts are.

One rank of a job looks at the source and tells every other one this. It then reads contents alone: no folder is listed,
and no header is read again. Where a header is only likely the heads of what is read are told, too, to be compared.

    {"target": [path, rank, format], "tensors": [[name, element type, [shape]], …],
     "files": [[number, name from the root, bytes, [[tensor, element type, [shape], [offset, length, …]], …],
                [[offset, head], …]], …],
     "transfers": [[name, element type, [shape], [place, …], [place, …]], …]}

    place:   [file, start, stop, name in the file, view, computation], from its end without what is not there
    view:    [shape, start, stop, order]
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ckpt.errors import FormatError, PlanError, TransferError, system_errors
from mindformers_ckpt.formats import Header, Segment, TensorRecord, TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.tensor_file import Malformed
from mindformers_ckpt.planning.checked import DecodeError, box_of, list_of, number_of, numbers_of, spec_of, text_of
from mindformers_ckpt.planning.computations import Cast, Compute, Constant, Dequantise
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer, View, once
from mindformers_ckpt.text_files import parse_json

_dump = json.JSONEncoder(separators=(",", ":")).encode
_MAX_BYTES = 1 << 30  # of the text of one rank: that of a rank with all of 100,000 tensors has 20 MB
_PLAIN = ("", None, None)  # name, view and computation of a place that is a box of the file's tensor of that name


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
    for target, transfers in zip(plan.targets, plan.by_target()):
        yield encoder.text(target, transfers)


class _Encoder:
    """Makes the texts of targets out of pieces that many of them share."""

    def __init__(self, plan: Plan, root: Path, header_of: Callable[[Path], Header]) -> None:
        self._plan, self._root, self._header_of = plan, root, header_of
        self._headers: dict[int, Header] = {}
        self._names: dict[int, str] = {}
        self._heads: dict[str, str] = {}
        # Files of a stage, tensors that are cut alike, and ranks of a stage have many objects in common.
        self._record = once(_record_text)
        self._sources, self._targets, self._specs = once(_sources_text), once(_targets_text), once(_specs_text)

    def text(self, target: TargetFile, transfers: Sequence[Transfer]) -> str:
        read: dict[int, dict[str, None]] = {}
        for transfer in transfers:
            for place in transfer.sources:
                for file, tensor in _tensors_of(place, transfer.name):
                    read.setdefault(file, {})[tensor] = None
        files = ",".join(self._file(file, read[file]) for file in sorted(read))
        parts = ",".join(map(self._transfer, transfers))
        about = _dump([target.path, target.rank, target.format])
        text = f'{{"target":{about},"tensors":{self._specs(target.tensors)},"files":[{files}],"transfers":[{parts}]}}'
        return base64.b64encode(zlib.compress(text.encode("ascii"), 1)).decode("ascii")

    def _transfer(self, transfer: Transfer) -> str:
        if transfer.name not in self._heads:
            name, dtype, shape, _, _ = transfer
            self._heads[name] = _dump([name, dtype.name, shape])[:-1]
        return f"{self._heads[transfer.name]},{self._sources(transfer.sources)},{self._targets(transfer.targets)}]"

    def _file(self, number: int, tensors: Mapping[str, None]) -> str:
        if number not in self._headers:
            file = self._plan.sources[number]
            self._headers[number] = self._current(file)
            self._names[number] = f"[{number},{_dump(name_from(self._root, file.path))},{file.size}"
        header = self._headers[number]
        records = [header.tensors[tensor] for tensor in tensors]
        heads = _dump(_heads_of(header, records)) if header.is_likely else "[]"
        return f"{self._names[number]},[{','.join(map(self._record, records))}],{heads}]"

    def _current(self, file: SourceFile) -> Header:
        header = self._header_of(file.path)
        with system_errors(TransferError, f"{file.path}: cannot be read"):
            status = file.path.stat()
        if (status.st_size, status.st_mtime_ns) != (header.size, header.modified):
            raise TransferError(f"{file.path} was written after the job looked at it; start the job again")
        return header


def _record_text(record: TensorRecord) -> str:
    segments = [value for segment in record.segments for value in segment]
    return _dump([*_spec_to_json(record.spec), segments])


def _heads_of(header: Header, records: Iterable[TensorRecord]) -> list[tuple[int, str]]:
    """The heads of records: offset, bytes as text."""
    by_end = _frames_by_end(header.frames)
    heads = (by_end[segment.offset] for record in records for segment in record.segments)
    return [(offset, head.decode("latin-1")) for offset, head in heads]


@lru_cache(maxsize=64)
def _frames_by_end(frames: tuple[tuple[int, bytes], ...]) -> dict[int, tuple[int, bytes]]:
    return {offset + len(head): (offset, head) for offset, head in frames}


def _sources_text(places: Sequence[Place]) -> str:
    return _dump([_place_to_json(place) for place in places])


def _targets_text(places: Sequence[Place]) -> str:
    return _dump([_place_to_json(place._replace(file=0)) for place in places])


def _specs_text(specs: Sequence[TensorSpec]) -> str:
    return _dump([_spec_to_json(spec) for spec in specs])


def decode_rank(text: str, root: Path) -> RankPlan:
    """What a text says that another rank wrote; every type, number and name in it is checked.

    Raises PlanError where it is not a plan, or names a file outside of the root (or of its folder, where it is a file).
    """
    try:
        body = parse_json(_unpacked(text))
        headers: dict[int, Header] = {}
        numbers: dict[int, int] = {}
        for entry in list_of(body["files"]):
            number, *rest = list_of(entry, 5)
            position = numbers.setdefault(number_of(number), len(numbers))
            headers[position] = _header(rest, root)
        path, rank, format = list_of(body["target"], 3)
        specs = tuple(spec_of(entry) for entry in list_of(body["tensors"]))
        target = TargetFile(text_of(path), number_of(rank), text_of(format), specs)
        places = _Places(numbers)
        transfers = tuple(_transfer(entry, places) for entry in list_of(body["transfers"]))
        sources = tuple(SourceFile(header.path, header.size) for header in headers.values())
        if any(place.file for transfer in transfers for place in transfer.targets):
            raise DecodeError("a place in another target")
    except KeyError as error:
        raise PlanError(f"what another rank told of its plan lacks {error}") from None
    except (TypeError, ValueError, Malformed, FormatError, zlib.error) as error:
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


def _header(entry: Sequence[Any], root: Path) -> Header:
    name, size, records, told = entry
    tensors = {}
    for record in list_of(records):
        tensor, dtype, shape, flat = list_of(record, 4)
        spec = spec_of([tensor, dtype, shape])
        numbers = numbers_of(flat)
        segments = tuple(map(Segment, numbers[::2], numbers[1::2]))
        if len(numbers) % 2 or sum(segment.length for segment in segments) != spec.nbytes:
            raise DecodeError(f"{tensor!r} is not where it should be")
        tensors[spec.name] = TensorRecord(spec, segments)
    heads = tuple((number_of(offset), text_of(head).encode("latin-1")) for offset, head in map(list_of, list_of(told)))
    # Heads are those of a .ckpt file: any other one is read whole.
    path = path_in(root, text_of(name))
    return Header(path, "ckpt", number_of(size), tensors, {}, None, heads, is_likely=bool(heads))


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


def _tensors_of(place: Place, name: str) -> Iterator[tuple[int, str]]:
    """The tensors of files that a place reads: file, name there."""
    if isinstance(place.compute, Constant):
        return
    yield place.file, place.tensor or name
    if isinstance(place.compute, Dequantise):
        yield place.compute.scale_file, place.compute.scale


class _Places:
    """The places of tensors; tensors that are cut alike share theirs, and are looked at once."""

    def __init__(self, numbers: Mapping[int, int]) -> None:
        self._numbers = numbers
        self._known: dict[str, tuple[Place, ...]] = {}

    def of(self, entries: Any, numbers: Mapping[int, int] | None = None) -> tuple[Place, ...]:
        """The places of a list, whose files have `numbers` (by default those of the sources)."""
        key = repr((entries, numbers))  # not the list: True and 1.0 are equal to 1
        if key not in self._known:
            known = self._numbers if numbers is None else numbers
            self._known[key] = tuple(_place(place, known) for place in list_of(entries))
        return self._known[key]


def _transfer(entry: Any, places: _Places) -> Transfer:
    name, dtype, shape, sources, targets = list_of(entry, 5)
    spec = spec_of([name, dtype, shape])
    return Transfer(spec.name, spec.dtype, spec.shape, places.of(sources), places.of(targets, {0: 0}))


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


def _spec_to_json(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.dtype.name, spec.shape]


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
