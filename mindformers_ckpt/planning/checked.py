"""Values out of JSON that somebody else wrote: each must be what a plan can hold.

Raise TypeError or ValueError saying what stands in the place of what; DecodeError where a number leads nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.formats.tensor_file import check_shape
from mindformers_ckpt.geometry.box import Box

LARGEST = (1 << 63) - 1

Made = TypeVar("Made")


class DecodeError(ValueError):
    """The JSON holds no plan that can be run; the text says what is wrong with it."""


def list_of(value: Any, length: int | None = None) -> list[Any]:
    """A list, of that length where one is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise TypeError(f"a list{'' if length is None else f' of {length}'} must stand where {value!r:.80} does")
    return value


def text_of(value: Any) -> str:
    """A text that can be a name of a file or a tensor."""
    if not isinstance(value, str) or "\0" in value:
        raise TypeError(f"a text must stand where {value!r:.80} does")
    return value


def bytes_of(value: Any) -> bytes:
    """Any bytes, told as a text of as many characters (latin-1)."""
    if not isinstance(value, str):
        raise TypeError(f"bytes must stand where {value!r:.80} does")
    return value.encode("latin-1")


def number_of(value: Any, least: int = 0) -> int:
    """A whole number of 63 bits."""
    if type(value) is not int or not least <= value <= LARGEST:  # True is not a number here
        raise TypeError(f"a number must stand where {value!r:.80} does")
    return value


def numbers_of(value: Any) -> tuple[int, ...]:
    """A list of numbers, as a tuple."""
    values = list_of(value)
    if set(map(type, values)) == {int} and min(values) >= 0 and max(values) <= LARGEST:  # as nearly always: quickly
        return tuple(values)
    return tuple(map(number_of, values))


def entry_of(table: Sequence[Made], number: Any) -> Made:
    """The entry of a table that a number names."""
    position = number_of(number)
    if position >= len(table):
        raise DecodeError(f"entry {position} of a table of {len(table)}")
    return table[position]


def spec_of(value: Any) -> TensorSpec:
    """A tensor: name, element type, shape."""
    name, dtype, shape = list_of(value, 3)
    spec = TensorSpec(text_of(name), by_name(text_of(dtype)), numbers_of(shape))
    check_shape(spec.name, spec.shape, spec.dtype.itemsize)
    return spec


def box_of(value: Any) -> Box:
    """A box: start, stop."""
    start, stop = list_of(value, 2)
    box = Box(numbers_of(start), numbers_of(stop))
    if len(box.start) != len(box.stop) or any(first > last for first, last in zip(box.start, box.stop)):
        raise ValueError(f"{box} is not a box")
    return box
