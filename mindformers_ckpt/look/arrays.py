"""Between our boxes and numpy's indices and types."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.formats import DType
from mindformers_ckpt.geometry.box import Box

if TYPE_CHECKING:
    import numpy as np


def numpy_type(dtype: DType) -> np.dtype[Any]:
    """The numpy type of an element type; of those that numpy and ml_dtypes lack, unsigned integers of its size."""
    import ml_dtypes
    import numpy as np

    if dtype.name == "str":
        return np.dtype("u1")
    for known in (np, ml_dtypes):
        found = getattr(known, {"bool": "bool_"}.get(dtype.name, dtype.name), None)
        if found is not None:
            return np.dtype(found)
    return dtype.carrier


def to_part(index: Any, shape: Sequence[int]) -> tuple[Box, tuple[Any, ...]]:
    """The smallest box that holds what an index takes of a tensor, and the index of that in the box.

    Raises IndexError for indices outside, TypeError for others than integers, slices and `...`.
    """
    items = _filled(index if isinstance(index, tuple) else (index,), len(shape))
    start, stop = [], []
    rest: list[Any] = []
    for item, extent in zip(items, shape):
        if isinstance(item, slice):
            taken = range(*item.indices(extent))
            first, last = (min(taken[0], taken[-1]), max(taken[0], taken[-1]) + 1) if taken else (0, 0)
            rest.append(slice(None, None, taken.step))
        else:
            first = _number(item, extent)
            last = first + 1
            rest.append(0)
        start.append(first)
        stop.append(last)
    return Box(tuple(start), tuple(stop)), (*rest, ...)


def _filled(items: tuple[Any, ...], dimensions: int) -> list[Any]:
    """One index a dimension, for those that are left out, too."""
    ellipses = [number for number, item in enumerate(items) if item is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can only have one ellipsis ('...')")
    if len(items) - len(ellipses) > dimensions:
        raise IndexError(f"too many indices: the tensor has {dimensions} dimensions, {len(items)} were indexed")
    place = ellipses[0] if ellipses else len(items)
    before, after = list(items[:place]), list(items[place + 1 :])
    return before + [slice(None)] * (dimensions - len(before) - len(after)) + after


def _number(item: Any, extent: int) -> int:
    if isinstance(item, bool):
        raise TypeError("an index is an integer, a slice or ...; read a part first, and take True or False of that")
    try:
        number = operator.index(item)
    except TypeError:
        raise TypeError(
            f"an index is an integer, a slice or ..., not {type(item).__name__}; read a part first, and index that"
        ) from None
    if not -extent <= number < extent:
        raise IndexError(f"index {number} is out of bounds for a dimension of {extent}")
    return number % extent
