"""From a table and the tensors on disk to a plan: which boxes of which tensors make each target tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.convert.config import ModelConfig
from mindformers_ckpt.convert.matching import match, other_side
from mindformers_ckpt.convert.misfit import Misfit, describe
from mindformers_ckpt.convert.model import Facts
from mindformers_ckpt.convert.pieces import pieces_of
from mindformers_ckpt.convert.rules import PART, Bound, Rule, Side, Table, Tensor, flat, measure, parse_axes
from mindformers_ckpt.convert.weights import Found, Weights
from mindformers_ckpt.engine.compute import FLOATS
from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.formats import DType, TensorSpec
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Cast, Dequantise
from mindformers_ckpt.planning.model import Numbers, Place, SourceFile, Transfer, View
from mindformers_ckpt.state_names import find_states

_SCALE = "_scale_inv"
_FACTORS = ("float32", "bfloat16", "float16")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")


class Converted(NamedTuple):
    """A target tensor. `transfer.shape` is a row-major reshape of `spec.shape`: `groups` axes a dimension.

    `stages` are those of the source that hold it.
    """

    spec: TensorSpec
    transfer: Transfer
    groups: tuple[int, ...]
    stages: tuple[int, ...] = (0,)


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

    States of a training run are left aside, with a warning, on the way to Hugging Face.
    Raises Misfit with every name that is unknown or missing, and every shape and type that does not fit.
    """
    matching = match(table, facts, source, to)
    planner = _Planner(facts, config, source, dtype, matching.used)
    tensors: list[Converted] = []
    for entry in matching.entries:
        tensors += planner.convert(entry, to)
    by_target = {converted.spec.name: converted for converted in tensors}
    for copy, name in matching.repeated:
        if (copy.always or write_copies) and copy.of[to] in by_target:
            tensors.append(_renamed(by_target[copy.of[to]], name))
    unknown = [name for name in source.tensors if name not in matching.used]
    aside = find_states(unknown if to == "hf" else (), matching.used)
    unknown = [name for name in unknown if name not in aside.names()]
    if matching.missing or unknown or planner.shapes or planner.integers or planner.others:
        raise Misfit(source, matching.missing, unknown, planner.shapes, planner.integers, planner.others)
    warnings = [*matching.notes, *planner.warnings()]
    if aside:
        warnings.append(f"left aside, as they are not weights of the model: {aside}")
    files = tuple(SourceFile(path, path.stat().st_size) for path in planner.files)
    return Conversion(files, tuple(tensors), tuple(matching.copies), tuple(warnings))


class _Planner:
    """Turns bound rules into transfers, and collects what does not fit.

    Attributes:
        shapes, others: what is wrong, a line each.
        integers: tensors of whole numbers where the model has floating-point ones.
    """

    def __init__(self, facts: Facts, config: ModelConfig, source: Weights, dtype: DType | None, used: set[str]) -> None:
        self._facts = facts
        self._config = config
        self._source = source
        self._dtype = dtype
        self._used = used
        self.files: Numbers[Path] = Numbers()  # the source files that places refer to
        # Sizes that config.json does not tell: those of the first tensor that has them.
        self._learnt: dict[str, tuple[int, str]] = {}
        self._notes: dict[str, None] = {}
        self._kept: dict[str, list[str]] = {}
        self.shapes: list[str] = []
        self.integers: list[Found] = []
        self.others: list[str] = []

    def convert(self, bound: Bound, to: Side) -> Iterator[Converted]:
        """The target tensors of a rule."""
        rule = bound.rule
        if rule.note and to == "ms":
            self._notes[rule.note] = None
        if not self._types_fit(bound, to):
            return
        if not rule.whole.axes:
            yield from self._renamed(bound, to)
            return
        try:
            extents = self._extents(bound, to)
        except ValueError as error:
            self.shapes.append(str(error))
            return
        if to == rule.side:
            yield from self._joined(bound, extents)
        else:
            yield from self._split(bound, extents)

    def _types_fit(self, bound: Bound, to: Side) -> bool:
        """Whether the source tensors of a rule have numbers of its kind; a problem each when they do not."""
        allowed = _INTEGERS if bound.rule.integers else FLOATS
        found = [self._source.tensors[name] for name in bound.names(other_side(to))]
        wrong = [tensor for tensor in found if tensor.spec.dtype.name not in allowed]
        if bound.rule.integers:
            self.others += [f"{describe(tensor.spec)}: whole numbers are expected" for tensor in wrong]
        else:
            self.integers += wrong
        return not wrong

    def _renamed(self, bound: Bound, to: Side) -> Iterator[Converted]:
        ((_, part, _),) = bound.parts
        name, source_name = (bound.whole, part) if to == bound.rule.side else (part, bound.whole)
        found = self._source.tensors[source_name]
        dtype = self._target_dtype(bound.rule, [found])
        if bound.rule.shape:
            try:
                self._measured(bound.rule.shape, source_name, self._known(bound), partly=True)
            except ValueError as error:
                self.shapes.append(str(error))
        box = Box.whole(found.spec.shape)
        places = self._places(found, box, None, dtype)
        if places and dtype is not None:
            spec = TensorSpec(name, dtype, found.spec.shape)
            yield _plain(spec, tuple(places))

    def _joined(self, bound: Bound, extents: Mapping[str, int]) -> Iterator[Converted]:
        """The whole tensor out of its parts."""
        found = [self._source.tensors[name] for _, name, _ in bound.parts]
        dtype = self._target_dtype(bound.rule, found)
        axes = parse_axes(bound.rule.whole.axes)
        places = []
        for piece, tensor in zip(pieces_of(bound, extents, self._spans(bound.rule), joined=True), found):
            view = View(piece.shape, piece.run, piece.order)
            places.append(self._places(tensor, piece.box, view, dtype))
        if dtype is not None and [] not in places:
            yield _converted(bound.whole, dtype, axes, extents, tuple(chain.from_iterable(places)))

    def _split(self, bound: Bound, extents: Mapping[str, int]) -> Iterator[Converted]:
        """The parts out of their whole tensor."""
        whole = self._source.tensors[bound.whole]
        dtype = self._target_dtype(bound.rule, [whole])
        pieces = pieces_of(bound, extents, self._spans(bound.rule), joined=False)
        for name, together in groupby(pieces, key=lambda piece: piece.name):
            places = []
            for piece in together:
                order = tuple(map(piece.order.index, range(len(piece.order))))
                places.append(self._places(whole, piece.run, View(piece.space, piece.box, order), dtype))
            if dtype is None or [] in places:
                return
            own = {**extents, PART: piece.extent}
            sources = tuple(chain.from_iterable(places))
            yield _converted(name, dtype, parse_axes(piece.axes), own, sources, piece.shape)

    def _extents(self, bound: Bound, to: Side) -> dict[str, int]:
        """The extents of all axes, of `part` the sum; from config.json and the shapes of the source."""
        rule, known = bound.rule, self._known(bound)
        spans = self._spans(rule)
        extents: dict[str, int] = {}
        if to != rule.side:
            return self._measured(rule.whole.axes, bound.whole, {**known, PART: sum(spans)})
        shared: dict[str, int] = {}
        for part, span in zip(rule.parts, spans):
            shared[part.name] = shared.get(part.name, 0) + span
        for part, name, _ in bound.parts:
            own = self._measured(part.axes, name, {**known, PART: shared[part.name]})
            own.pop(PART, None)
            for axis, extent in own.items():
                if extents.setdefault(axis, extent) != extent:
                    raise ValueError(f"{name}: {axis} is {extent} here, but {extents[axis]} in its companions")
        for axis in flat(parse_axes(rule.whole.axes)):
            size = known.get(axis)
            if axis not in extents and axis != PART and size is not None:
                extents[axis] = size
        return {**extents, PART: sum(spans)}

    def _known(self, bound: Bound) -> Mapping[str, int | None]:
        """The sizes of config.json; a repetition may bring its own with it."""
        return {**self._facts.sizes, **bound.captures}

    def _measured(
        self, axes: str, name: str, known: Mapping[str, int | None], *, partly: bool = False
    ) -> dict[str, int]:
        shape = self._source.tensors[name].spec.shape
        try:
            extents = measure(parse_axes(axes), shape, known, partly=partly)
        except ValueError as error:
            raise ValueError(f"{name}{list(shape)}: {error}") from None
        for axis in extents.keys() & self._facts.sizes.keys():
            size, first = self._learnt.setdefault(axis, (extents[axis], name))
            if size != extents[axis]:
                raise ValueError(f"{name}{list(shape)}: {axis} is {extents[axis]} here, but {size} in {first}")
        return extents

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
            if self._dtype is None or rule.precise or rule.integers:
                self.others.append(f"of several element types, choose one with --dtype: {listed}")
                return None
        dtype = next(iter(dtypes))
        if dtype.itemsize == 1 and not rule.integers:
            return self._dtype or self._config.dtype()
        if rule.integers or (rule.precise and self._dtype is not None and self._dtype.itemsize < dtype.itemsize):
            self._kept.setdefault(dtype.name, []).append(found[0].spec.name)
            return dtype
        return self._dtype or dtype

    def warnings(self) -> list[str]:
        """What the user should know of the result."""
        found = list(self._notes)
        if self._dtype is not None:
            for kind, names in self._kept.items():
                what = "whole numbers" if kind in _INTEGERS else "the network computes with them in that precision"
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                found.append(f"{len(names)} tensors stay {kind} ({what}): {', '.join(names[:3])}{more}")
        return found

    def _places(self, found: Found, box: Box, view: View | None, dtype: DType | None) -> list[Place]:
        """Where a box lies; nowhere, and a problem, when the FP8 factors of it are missing, or it cannot be cut."""
        compute: Cast | Dequantise | None = None
        if dtype is not None and found.spec.dtype != dtype:
            compute = Cast(found.spec.dtype)
        if found.spec.dtype.name.startswith("float8"):
            compute = self._dequantise(found)
            if compute is None:
                return []
        try:
            return found.places(Place(0, box, "", view, compute), self.files.__getitem__)
        except ValueError as error:
            self.others.append(f"{found.spec.name}: {error}")
            return []

    def _dequantise(self, found: Found) -> Dequantise | None:
        spec = found.spec
        scale = self._source.tensors.get(spec.name + _SCALE)
        if scale is None:
            self.others.append(f"missing: {spec.name}{_SCALE}, the factors of an FP8 tensor")
            return None
        self._used.add(spec.name + _SCALE)
        if len(found.shards) > 1 or len(scale.shards) > 1:
            self.others.append(f"{spec.name}: FP8, and cut over several files; put the checkpoint together first")
            return None
        block = self._config.quantisation("weight_block_size")
        if not isinstance(block, list) or len(block) != 2 or len(spec.shape) != 2:
            self.others.append(f"{spec.name}: FP8, but config.json has no quantization_config.weight_block_size")
            return None
        task = Dequantise(
            spec.dtype,
            self.files[scale.path],
            scale.shards[0].tensor if scale.shards else scale.spec.name,
            (spec.shape[0], spec.shape[1]),
            (block[0], block[1]),
            scale.spec.dtype,
        )
        if scale.spec.shape != task.scale_shape or scale.spec.dtype.name not in _FACTORS:
            expected = f"{', '.join(_FACTORS[:-1])} or {_FACTORS[-1]} {list(task.scale_shape)}"
            self.others.append(f"{describe(scale.spec)}: {expected} is expected")
            return None
        return task


def identity(spec: TensorSpec, tensor: str) -> Converted:
    """A target tensor that is a tensor of the source, of this name."""
    return _plain(spec, (Place(0, Box.whole(spec.shape), tensor),))


def _plain(spec: TensorSpec, places: tuple[Place, ...]) -> Converted:
    return Converted(spec, Transfer(spec.name, spec.dtype, spec.shape, places, ()), (1,) * len(spec.shape))


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
    return converted._replace(spec=converted.spec._replace(name=name), transfer=converted.transfer._replace(name=name))
