"""How far two samples of a tensor are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.formats import DType

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.float64]]

# Independent values correlate by chance: 16 of them by 0.25, one time in three.
_RELATED = 0.5
_FEW_VALUES = 8


class Comparison(NamedTuple):
    """What two samples have in common.

    Attributes:
        distance: the largest difference, relative to the largest value; 1 where that cannot be said.
        is_unrelated: whether neither follows from the other. Constant values follow from anything.
        words: how far they are apart, for messages.
    """

    distance: float
    is_unrelated: bool
    words: str


def compare(first: bytes, second: bytes, dtype: DType) -> Comparison:
    """Compare two samples of as many bytes. Equal bytes are equal, NaN included."""
    if first == second:
        return Comparison(0.0, False, "equal")
    a, b = _numbers(first, dtype), _numbers(second, dtype)
    if a is None or b is None or len(a) != len(b):
        return Comparison(1.0, False, "other bytes")
    if len(a) == 1:
        return Comparison(_distance(a, b, dtype), False, f"{a[0]:.6g} and {b[0]:.6g}")
    return Comparison(_distance(a, b, dtype), _are_unrelated(a, b), _words(a, b, dtype))


def are_constant(sample: bytes, dtype: DType) -> bool:
    """Whether a sample has so few different elements that equality with another proves nothing."""
    unit, found = dtype.itemsize, set()
    if sample == sample[:unit] * (len(sample) // unit):
        return True
    for start in range(0, len(sample), unit):
        found.add(sample[start : start + unit])
        if len(found) == _FEW_VALUES:
            return False
    return True


def _is_float(dtype: DType) -> bool:
    return dtype.name.startswith(("float", "bfloat"))


def _numbers(sample: bytes, dtype: DType) -> Numbers | None:
    """The elements as float64; None for types that are not numbers of their own."""
    import numpy as np

    name = dtype.name
    if _is_float(dtype):
        import ml_dtypes

        kind = np.dtype(getattr(ml_dtypes, name, name))
    elif name == "bool" or name.lstrip("u").startswith("int"):
        kind = np.dtype(name)
    else:
        return None
    with np.errstate(all="ignore"):
        return np.frombuffer(sample, kind).astype(np.float64)


def _distance(a: Numbers, b: Numbers, dtype: DType) -> float:
    import numpy as np

    if not _is_float(dtype):
        return 1.0
    with np.errstate(all="ignore"):
        both = np.isfinite(a) == np.isfinite(b)
        finite = np.isfinite(a) & np.isfinite(b)
        if not both.all() or not finite.any():
            return 1.0
        largest = float(np.abs(a[finite]).max())
        apart = float(np.abs(a[finite] - b[finite]).max())
        return apart / largest if largest and np.isfinite(apart) else 1.0


def _are_unrelated(a: Numbers, b: Numbers) -> bool:
    import numpy as np

    with np.errstate(all="ignore"):
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = a[finite], b[finite]
        if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
            return False
        # To the same scale first: squares of large numbers overflow.
        a, b = a / np.abs(a).max(), b / np.abs(b).max()
        correlation = np.corrcoef(a, b)[0, 1]
    return bool(abs(correlation) < _RELATED)


def _words(a: Numbers, b: Numbers, dtype: DType) -> str:
    import numpy as np

    if not _is_float(dtype):
        return f"{np.mean(a != b):.0%} of the elements"
    if (np.isfinite(a) != np.isfinite(b)).any():
        return "only one of them has infinite or undefined values"
    distance = _distance(a, b, dtype)
    return f"{distance:.2g} of the largest value apart"
