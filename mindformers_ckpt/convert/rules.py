"""The language of conversion tables: which tensors of both sides hold the same elements, and where.

Every rule says one thing: a *whole* tensor on one side holds the same elements as *parts* on the other.
How a tensor's dimensions fall into named axes is written as in einops, "(group part dim) hidden" for rows of
heads in groups. An axis of the same name is the same axis, so that a reshape, an order of axes and a box say
where a part lies; nothing is computed, and both directions follow from the one rule.

- The axis `part` is the one that parts share out: each takes its `span` of it, in the order of the rule.
- An axis of the whole that is a capture in the parts' names ("…experts.{expert}.gate_proj.weight") is
  indexed by it: one part for every number below its size.
- Parts of one name are runs of that tensor along `part`, one behind the other, or `backwards`; of their axes some
  may be those of the whole, and all others are the same.
- Sizes come from the model's config.json; an axis that it does not tell follows from the shape on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations, groupby, product
from typing import Literal, NamedTuple, Union

from mindformers_ckpt.errors import ConfigError, raise_problems

Side = Literal["hf", "ms"]
Axes = tuple[tuple[str, ...], ...]

SIDES: tuple[Side, Side] = ("hf", "ms")
PART = "part"
_CAPTURE = re.compile(r"\{(\w+)\}")
_DIMENSION = re.compile(r"\(([^()]*)\)|(\w+)")


class Tensor(NamedTuple):
    """A tensor of a rule.

    Attributes:
        name: its full name, with captures of integers: "model.layers.{n}.self_attn.q_proj.weight".
        axes: the axes of every dimension, empty for any shape taken as it is.
        span: how much of the axis `part` it takes: a number, or the name of a size.
    """

    name: str
    axes: str = ""
    span: int | str = 1


class Rule(NamedTuple):
    """A tensor on one side whose elements are those of tensors on the other.

    Attributes:
        side: the side of the whole tensor.
        over: the run of captures it is repeated over ("layer"), empty for once.
        when: the flags of the model that it holds for, all of them; "!flag" for the absence of one.
        optional: tensors that need not be there; those of one tag and repetition come all or none.
        precise: never narrowed by a choice of element type.
        shape: the axes of a tensor that is only renamed, by which its shape is checked.
        integers: holds whole numbers, as a table of positions does; all others hold floating-point numbers.
        backwards: parts of one name lie in the reverse order in their own tensor.
        note: what the user should know where MindSpore weights get this tensor.
    """

    side: Side
    whole: Tensor
    parts: tuple[Tensor, ...]
    over: str = ""
    when: str = ""
    optional: str = ""
    precise: bool = False
    shape: str = ""
    integers: bool = False
    note: str = ""
    backwards: bool = False

    def tensors(self, side: Side) -> tuple[Tensor, ...]:
        """The tensors of the rule on a side."""
        return (self.whole,) if side == self.side else self.parts


class Copy(NamedTuple):
    """A tensor that repeats another of its side. Where it is read it must be equal, byte for byte.

    Attributes:
        name: of the copy, by side; a side that has none is absent.
        of: name of the original, by side.
        always: written on every conversion to its side, not only when copies are asked for.
    """

    name: Mapping[Side, str]
    of: Mapping[Side, str]
    over: str = ""
    when: str = ""
    optional: str = ""
    always: bool = False


class Drop(NamedTuple):
    """A Hugging Face tensor that MindSpore has no use for: a buffer that is computed anew.

    A name that ends with "*" is that of all tensors that begin so. A `note` says why where it is more than a buffer;
    it is told in both directions.
    """

    name: str
    over: str = ""
    when: str = ""
    note: str = ""


Entry = Union[Rule, Copy, Drop]
Table = tuple[Entry, ...]


class Bound(NamedTuple):
    """A rule with its captures filled in: the name of the whole, and parts with names and captures."""

    rule: Rule
    captures: Mapping[str, int]
    whole: str
    parts: tuple[tuple[Tensor, str, Mapping[str, int]], ...]

    def names(self, side: Side) -> list[str]:
        return [self.whole] if side == self.rule.side else list(dict.fromkeys(name for _, name, _ in self.parts))


def rename(
    hf: str,
    ms: str,
    axes: str = "",
    *,
    over: str = "",
    when: str = "",
    optional: str = "",
    precise: bool = False,
    integers: bool = False,
    note: str = "",
) -> Rule:
    """The same tensor under another name. `axes` say what shape it must have."""
    return Rule("ms", Tensor(ms), (Tensor(hf),), over, when, optional, precise, axes, integers, note)


def transpose(hf: str, ms: str, axes: str = "column row", *, over: str = "", when: str = "") -> Rule:
    """The same matrix under another name, its axes exchanged; `axes` are the two on the Hugging Face side."""
    turned = " ".join(reversed(axes.split()))
    return Rule("ms", Tensor(ms, turned), (Tensor(hf, axes),), over, when)


def join(
    ms: str,
    axes: str,
    *parts: tuple[str, int | str] | tuple[str, int | str, str],
    over: str = "",
    when: str = "",
    optional: str = "",
    backwards: bool = False,
) -> Rule:
    """Hugging Face tensors (name, span[, axes]) that MindSpore holds as one."""
    return Rule("ms", Tensor(ms, axes), _parts(axes, parts), over, when, optional, backwards=backwards)


def split(
    hf: str,
    axes: str,
    *parts: tuple[str, int | str] | tuple[str, int | str, str],
    over: str = "",
    when: str = "",
    optional: str = "",
) -> Rule:
    """A Hugging Face tensor that MindSpore holds as several (name, span[, axes])."""
    return Rule("hf", Tensor(hf, axes), _parts(axes, parts), over, when, optional)


def _parts(axes: str, parts: Iterable[tuple[str, int | str] | tuple[str, int | str, str]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(part[0], part[2] if len(part) == 3 else axes, part[1]) for part in parts)


def prefixed(entries: Iterable[Entry], hf: str, ms: str, **changes: str) -> list[Entry]:
    """The same rules with longer names: of a layer's inside for every place where such a layer stands."""

    def longer(tensor: Tensor, side: Side) -> Tensor:
        return tensor._replace(name=(hf if side == "hf" else ms) + tensor.name)

    found: list[Entry] = []
    for entry in entries:
        changed = entry._replace(**changes)  # type: ignore[arg-type]
        if isinstance(changed, Rule):
            other: Side = "ms" if changed.side == "hf" else "hf"
            parts = tuple(longer(part, other) for part in changed.parts)
            changed = changed._replace(whole=longer(changed.whole, changed.side), parts=parts)
        elif isinstance(changed, Drop):
            changed = changed._replace(name=hf + changed.name)
        found.append(changed)
    return found


@cache
def parse_axes(text: str) -> Axes:
    """The axes of every dimension of "(group part dim) hidden". Raises ValueError when it is not of this form."""
    if _DIMENSION.sub("", text).strip():
        raise ValueError(f"axes {text!r} are not of the form '(a b) c'")
    return tuple(tuple((match[1] or match[2]).split()) for match in _DIMENSION.finditer(text))


def flat(axes: Axes) -> tuple[str, ...]:
    """All axes in their order."""
    return tuple(axis for dimension in axes for axis in dimension)


def captures_of(name: str) -> tuple[str, ...]:
    """The captures of a name's pattern."""
    return tuple(_CAPTURE.findall(name))


def inner_captures(rule: Rule) -> tuple[str, ...]:
    """The axes of the whole that number the parts."""
    outer = captures_of(rule.whole.name)
    inside = {capture for part in rule.parts for capture in captures_of(part.name)}
    return tuple(axis for axis in flat(parse_axes(rule.whole.axes)) if axis in inside and axis not in outer)


def measure(
    axes: Axes, shape: Sequence[int], known: Mapping[str, int | None], *, partly: bool = False
) -> dict[str, int]:
    """The extent of every axis of a tensor of this shape, those of `known` given.

    Several unknown axes of one dimension cannot be told apart: an error, unless the extents are wanted `partly`.
    Raises ValueError that says what does not fit.
    """
    if len(axes) != len(shape):
        raise ValueError(f"has {len(shape)} dimensions, {len(axes)} are expected")
    extents: dict[str, int] = {}
    for dimension, extent in zip(axes, shape):
        open_axes = [axis for axis in dimension if known.get(axis) is None]
        given = {axis: size for axis in dimension if (size := known.get(axis)) is not None}
        rest = math.prod(given.values())
        if len(open_axes) > 1 and not partly:
            raise ValueError(f"the sizes {', '.join(open_axes)} are not known; config.json must tell them")
        if rest == 0 or extent % rest or (not open_axes and extent != rest):
            sizes = " · ".join(f"{axis} {size}" for axis, size in given.items())
            raise ValueError(f"a dimension of {extent} does not go with {sizes} of config.json")
        extents.update(given)
        if len(open_axes) == 1:
            extents[open_axes[0]] = extent // rest
    return extents


def bind(table: Table, runs: Mapping[str, Sequence[Mapping[str, int]]]) -> Iterator[tuple[Entry, Mapping[str, int]]]:
    """Every entry of a table with every set of captures it is repeated over, layer by layer."""
    for over, entries in groupby(table, key=lambda entry: entry.over):
        together = list(entries)
        for captures in runs[over] if over else ({},):
            for entry in together:
                yield entry, captures


def fill(rule: Rule, captures: Mapping[str, int], sizes: Mapping[str, int | None]) -> Bound:
    """A rule with its captures filled in. Raises ConfigError when a number of parts is not known."""
    inner = inner_captures(rule)
    counts = []
    for axis in inner:
        size = sizes.get(axis)
        if size is None:
            raise ConfigError(f"{rule.whole.name}: config.json does not say the number of {axis}s; give --hf_config")
        counts.append(range(size))
    parts = []
    for numbers in product(*counts):
        own = {**captures, **dict(zip(inner, numbers))}
        parts += [(part, part.name.format(**own), own) for part in rule.parts]
    return Bound(rule, captures, rule.whole.name.format(**captures), tuple(parts))


def check_table(table: Table) -> None:
    """Check that every entry can be undone and that no name can be meant by two of them.

    Raises ConfigError that lists all faults.
    """
    problems = [fault for entry in table if isinstance(entry, Rule) for fault in _rule_faults(entry)]
    for side in SIDES:
        alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for entry in table:
            for name in _names(entry, side):
                # A literal number could be a captured one, so both count as a number here.
                form = re.sub(r"\{\w+\}|(?<=\.)\d+(?=\.)", "#", name)
                alike.setdefault((entry.over, form), []).append((name, entry.when))
        for names in alike.values():
            for (first, when), (second, other) in combinations(names, 2):
                if not _exclude(when, other):
                    problems.append(f"{first} and {second} can name the same tensor")
    raise_problems(ConfigError, "a conversion table cannot be right", problems)


def _exclude(when: str, other: str) -> bool:
    """Whether two conditions never hold together."""
    words = set(other.split())
    return any(("!" + word if word[0] != "!" else word[1:]) in words for word in when.split())


def _rule_faults(rule: Rule) -> Iterator[str]:
    """Why a rule could not be carried out in both directions."""
    name = rule.whole.name
    try:
        whole = flat(parse_axes(rule.whole.axes))
        axes_of_parts = [flat(parse_axes(part.axes)) for part in rule.parts]
    except ValueError as error:
        yield f"{name}: {error}"
        return
    if len(set(whole)) != len(whole):
        yield f"{name}: an axis stands twice in {rule.whole.axes!r}"
    if len(rule.parts) > 1 and PART not in whole:
        yield f"{name}: several parts need the axis {PART!r}"
    fixed = {PART, *inner_captures(rule)}
    for part, axes in zip(rule.parts, axes_of_parts):
        absent = set(whole) - set(axes)
        if len(set(axes)) != len(axes) or set(axes) - set(whole) or absent - fixed:
            yield f"{part.name}: the axes {part.axes!r} are not those of {rule.whole.axes!r}"
        if PART in absent and part.span != 1:
            yield f"{part.name}: takes {part.span} of an axis that it does not have"
        inside = set(captures_of(part.name)) & (fixed - {PART})
        if inside != fixed - {PART} or inside & set(axes):
            yield f"{part.name}: a capture of its name must be an axis of the whole, and not its own"
    runs = [run for run, _ in groupby(part.name for part in rule.parts)]
    yield from (f"{run}: its parts do not follow each other" for run in set(runs) if runs.count(run) > 1)
    for first, *others in _same_names(rule.parts):
        if others and (PART not in flat(parse_axes(first.axes)) or fixed != {PART}):
            yield f"{first.name}: stands for several parts, which needs the axis {PART!r} and no captures"
        common = axes_of_tensor(rule, first.name)
        for part in others:
            if part.axes not in (common, rule.whole.axes):
                yield f"{part.name}: the axes {part.axes!r} are neither {common!r} nor those of the whole"
    for tensor in (rule.whole, *rule.parts):
        if bool(rule.over) != bool(set(captures_of(tensor.name)) - fixed):
            yield f"{tensor.name}: is repeated over {rule.over or 'nothing'}, which its captures do not say"


def axes_of_tensor(rule: Rule, name: str) -> str:
    """The axes of a tensor that has parts of this name: those of the first part whose axes are not the whole's."""
    own = [part.axes for part in rule.parts if part.name == name]
    return next((axes for axes in own if axes != rule.whole.axes), rule.whole.axes)


def _same_names(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """The parts by their names."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    return list(found.values())


def _names(entry: Entry, side: Side) -> list[str]:
    if isinstance(entry, Rule):
        return list(dict.fromkeys(tensor.name for tensor in entry.tensors(side)))
    if isinstance(entry, Copy):
        return [entry.name[side]] if side in entry.name else []
    return [entry.name] if side == "hf" else []
