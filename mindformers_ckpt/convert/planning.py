"""From a table and the tensors on disk to a plan: which boxes of which tensors make each target tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.model import Facts
from mindformers_ckpt.convert.pieces import pieces_of
from mindformers_ckpt.convert.rules import (
    PART,
    Bound,
    Copy,
    Rule,
    Side,
    Table,
    Tensor,
    bind,
    fill,
    flat,
    measure,
    parse_axes,
)
from mindformers_ckpt.convert.weights import Found, Weights
from mindformers_ckpt.engine.compute import FLOATS
from mindformers_ckpt.errors import ConfigError, PlanError, describe_problems
from mindformers_ckpt.formats import DType, TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Cast, Dequantise
from mindformers_ckpt.planning.model import Place, SourceFile, Transfer, View

_SCALE = "_scale_inv"


class Converted(NamedTuple):
    """A target tensor. `transfer.shape` is a row-major reshape of `spec.shape`: `groups` axes a dimension."""

    spec: TensorSpec
    transfer: Transfer
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """The target tensors in order, the source files, and what must be equal where one tensor repeats another."""

    files: tuple[SourceFile, ...]
    tensors: tuple[Converted, ...]
    copies: tuple[tuple[Found, Found], ...]
    warnings: tuple[str, ...] = ()


def plan_tensors(
    table: Table,
    facts: Facts,
    config: ModelConfig,
    source: Weights,
    to: Side,
    *,
    dtype: DType | None = None,
    write_copies: bool = False,
) -> Conversion:
    """Plan all target tensors of a side (without target files; the place's file is always 0).

    Raises PlanError that lists every name that is unknown or missing and every shape that does not fit.
    """
    matching = _match(table, facts, source, to)
    planner = _Planner(facts, config, source, dtype, matching.used)
    tensors: list[Converted] = []
    for entry in matching.entries:
        tensors += planner.convert(entry, to)
    by_target = {converted.spec.name: converted for converted in tensors}
    for copy, name in matching.repeated:
        if (copy.always or write_copies) and copy.of[to] in by_target:
            tensors.append(_renamed(by_target[copy.of[to]], name))
    unknown = [name for name in source.tensors if name not in matching.used]
    problems = [f"missing: {name}" for name in matching.missing]
    problems += [f"unknown: {name} {_describe(source.tensors[name].spec)}" for name in unknown]
    problems += planner.problems
    if problems:
        hint = "is it this model, and is its config.json the right one?"
        raise PlanError(describe_problems(f"{source.root} cannot be converted; {hint}", problems, limit=200))
    files = tuple(SourceFile(path, path.stat().st_size) for path in planner.files)
    return Conversion(files, tuple(tensors), tuple(matching.copies))


class _Matching(NamedTuple):
    """What a table finds in a source.

    Rules to convert, in order; copies to write, with their names; the names that it knows and that it lacks;
    tensors that must be equal.
    """

    entries: list[Bound]
    repeated: list[tuple[Copy, str]]
    used: set[str]
    missing: list[str]
    copies: list[tuple[Found, Found]]


def _match(table: Table, facts: Facts, source: Weights, to: Side) -> _Matching:
    origin: Side = "ms" if to == "hf" else "hf"
    bound = [
        (fill(entry, captures, facts.sizes) if isinstance(entry, Rule) else entry, captures)
        for entry, captures in bind(table, facts.runs)
        if facts.holds(entry.when)
    ]
    # Optional tensors of one tag and repetition come together: one that is there calls for the others.
    present = {
        (entry.rule.optional, *captures.values())
        for entry, captures in bound
        if isinstance(entry, Bound)
        and entry.rule.optional
        and any(name in source.tensors for name in entry.names(origin))
    }
    found = _Matching([], [], set(), [], [])
    for entry, captures in bound:
        if isinstance(entry, Bound):
            if entry.rule.optional and (entry.rule.optional, *captures.values()) not in present:
                continue
            names = entry.names(origin)
            found.missing.extend(name for name in names if name not in source.tensors)
            found.used.update(names)
            if all(name in source.tensors for name in names):
                found.entries.append(entry)
        elif isinstance(entry, Copy):
            if not entry.optional or (entry.optional, *captures.values()) in present:
                _match_copy(entry, captures, source, to, origin, found)
        elif origin == "hf":
            found.used.add(entry.name.format(**captures))
    return found


def _match_copy(
    copy: Copy, captures: Mapping[str, int], source: Weights, to: Side, origin: Side, found: _Matching
) -> None:
    if origin in copy.name:
        name = copy.name[origin].format(**captures)
        found.used.add(name)
        if name in source.tensors and copy.of[origin] in source.tensors:
            found.copies.append((source.tensors[name], source.tensors[copy.of[origin]]))
    if to in copy.name:
        found.repeated.append((copy, copy.name[to].format(**captures)))


class _Planner:
    """Turns bound rules into transfers, and collects what does not fit."""

    def __init__(self, facts: Facts, config: ModelConfig, source: Weights, dtype: DType | None, used: set[str]) -> None:
        self._facts = facts
        self._config = config
        self._source = source
        self._dtype = dtype
        self._used = used
        self._index: dict[Path, int] = {}
        self.problems: list[str] = []

    @property
    def files(self) -> list[Path]:
        """The source files that places refer to, in order."""
        return list(self._index)

    def convert(self, bound: Bound, to: Side) -> Iterator[Converted]:
        """The target tensors of a rule."""
        rule = bound.rule
        if not rule.whole.axes:
            yield from self._renamed(bound, to)
            return
        try:
            extents = self._extents(bound, to)
        except ValueError as error:
            self.problems.append(str(error))
            return
        if to == rule.side:
            yield from self._joined(bound, extents)
        else:
            yield from self._split(bound, extents)

    def _renamed(self, bound: Bound, to: Side) -> Iterator[Converted]:
        ((_, part, _),) = bound.parts
        name, source_name = (bound.whole, part) if to == bound.rule.side else (part, bound.whole)
        found = self._source.tensors[source_name]
        dtype = self._target_dtype(bound.rule, [found])
        box = Box.whole(found.spec.shape)
        place = self._place(found, box, None, dtype)
        if place is not None and dtype is not None:
            spec = TensorSpec(name, dtype, found.spec.shape)
            yield Converted(spec, Transfer(name, dtype, spec.shape, (place,), ()), (1,) * len(spec.shape))

    def _joined(self, bound: Bound, extents: Mapping[str, int]) -> Iterator[Converted]:
        """The whole tensor out of its parts."""
        found = [self._source.tensors[name] for _, name, _ in bound.parts]
        dtype = self._target_dtype(bound.rule, found)
        axes = parse_axes(bound.rule.whole.axes)
        places = []
        for piece, tensor in zip(pieces_of(bound, extents, self._spans(bound.rule), joined=True), found):
            view = View(piece.shape, piece.run, piece.order)
            places.append(self._place(tensor, piece.box, view, dtype))
        if dtype is not None and None not in places:
            yield _converted(bound.whole, dtype, axes, extents, tuple(filter(None, places)))

    def _split(self, bound: Bound, extents: Mapping[str, int]) -> Iterator[Converted]:
        """The parts out of their whole tensor."""
        whole = self._source.tensors[bound.whole]
        dtype = self._target_dtype(bound.rule, [whole])
        pieces = pieces_of(bound, extents, self._spans(bound.rule), joined=False)
        for name, together in groupby(pieces, key=lambda piece: piece.name):
            places = []
            for piece in together:
                order = tuple(map(piece.order.index, range(len(piece.order))))
                places.append(self._place(whole, piece.run, View(piece.space, piece.box, order), dtype))
            if dtype is None or None in places:
                return
            own = {**extents, PART: piece.extent}
            yield _converted(name, dtype, parse_axes(piece.axes), own, tuple(filter(None, places)), piece.shape)

    def _extents(self, bound: Bound, to: Side) -> dict[str, int]:
        """The extents of all axes, of `part` the sum; from config.json and the shapes of the source."""
        rule = bound.rule
        spans = self._spans(rule)
        extents: dict[str, int] = {}
        if to != rule.side:
            return self._measured(rule.whole, bound.whole, {**self._facts.sizes, PART: sum(spans)})
        shared: dict[str, int] = {}
        for part, span in zip(rule.parts, spans):
            shared[part.name] = shared.get(part.name, 0) + span
        for part, name, _ in bound.parts:
            own = self._measured(part, name, {**self._facts.sizes, PART: shared[part.name]})
            own.pop(PART, None)
            for axis, extent in own.items():
                if extents.setdefault(axis, extent) != extent:
                    raise ValueError(f"{name}: {axis} is {extent} here, but {extents[axis]} in its companions")
        for axis in flat(parse_axes(rule.whole.axes)):
            size = self._facts.sizes.get(axis)
            if axis not in extents and axis != PART and size is not None:
                extents[axis] = size
        return {**extents, PART: sum(spans)}

    def _measured(self, tensor: Tensor, name: str, known: Mapping[str, int | None]) -> dict[str, int]:
        shape = self._source.tensors[name].spec.shape
        try:
            return measure(parse_axes(tensor.axes), shape, known)
        except ValueError as error:
            raise ValueError(f"{name}{list(shape)}: {error}") from None

    def _spans(self, rule: Rule) -> list[int]:
        return [self._span(part) for part in rule.parts]

    def _span(self, tensor: Tensor) -> int:
        if isinstance(tensor.span, int):
            return tensor.span
        span = self._facts.sizes.get(tensor.span)
        if span is None:
            raise ConfigError(
                f"{tensor.name}: the size {tensor.span!r} is needed, and config.json does not tell it; "
                "give the folder that holds the model's config.json (--hf_config)"
            )
        return span

    def _target_dtype(self, rule: Rule, found: Sequence[Found]) -> DType | None:
        """The element type of a target tensor; None, and a problem, when its sources disagree."""
        dtypes = {tensor.spec.dtype for tensor in found}
        if len(dtypes) > 1:
            listed = ", ".join(f"{tensor.spec.name} {tensor.spec.dtype.name}" for tensor in found[:4])
            if self._dtype is None or rule.precise or not all(dtype.name in FLOATS for dtype in dtypes):
                self.problems.append(f"of several element types, choose one with --dtype: {listed}")
                return None
        dtype = next(iter(dtypes))
        if dtype.name not in FLOATS:
            return dtype
        if dtype.itemsize == 1:
            return self._dtype or by_name(self._config.text("dtype") or self._config.text("torch_dtype") or "bfloat16")
        if rule.precise and self._dtype is not None and self._dtype.itemsize < dtype.itemsize:
            return dtype
        return self._dtype or dtype

    def _place(self, found: Found, box: Box, view: View | None, dtype: DType | None) -> Place | None:
        """Where a box lies; None, and a problem, when the FP8 factors of it are missing."""
        file = self._index.setdefault(found.path, len(self._index))
        compute: Cast | Dequantise | None = None
        if dtype is not None and found.spec.dtype != dtype:
            compute = Cast(found.spec.dtype)
        if found.spec.dtype.name.startswith("float8"):
            compute = self._dequantise(found)
            if compute is None:
                return None
        return Place(file, box, found.spec.name, view, compute)

    def _dequantise(self, found: Found) -> Dequantise | None:
        spec = found.spec
        scale = self._source.tensors.get(spec.name + _SCALE)
        if scale is None:
            self.problems.append(f"missing: {spec.name}{_SCALE}, the factors of an FP8 tensor")
            return None
        self._used.add(spec.name + _SCALE)
        quantisation = self._config.values.get("quantization_config")
        block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
        if not isinstance(block, list) or len(block) != 2 or len(spec.shape) != 2:
            self.problems.append(f"{spec.name}: FP8, but config.json has no quantization_config.weight_block_size")
            return None
        task = Dequantise(
            spec.dtype,
            self._index.setdefault(scale.path, len(self._index)),
            scale.spec.name,
            (spec.shape[0], spec.shape[1]),
            (block[0], block[1]),
        )
        if scale.spec.shape != task.scale_shape or scale.spec.dtype.name != "float32":
            expected = f"float32{list(task.scale_shape)}"
            self.problems.append(f"{scale.spec.name} is {_describe(scale.spec)}, {expected} is expected")
            return None
        return task


def _converted(
    name: str,
    dtype: DType,
    axes: Sequence[Sequence[str]],
    extents: Mapping[str, int],
    places: tuple[Place, ...],
    space: tuple[int, ...] | None = None,
) -> Converted:
    shape = tuple(math.prod(extents[axis] for axis in dimension) for dimension in axes)
    whole = tuple(extents[axis] for dimension in axes for axis in dimension)
    groups = [len(dimension) for dimension in axes]
    if space is not None:
        groups[0] += len(space) - len(whole)  # axes of one index, that stand before the others
        whole = space
    return Converted(TensorSpec(name, dtype, shape), Transfer(name, dtype, whole, places, ()), tuple(groups))


def _renamed(converted: Converted, name: str) -> Converted:
    return Converted(converted.spec._replace(name=name), converted.transfer._replace(name=name), converted.groups)


def _describe(spec: TensorSpec) -> str:
    return f"{spec.dtype.name}{list(spec.shape)}"
