"""CRC-64/NVME, the checksum that S3 keeps of objects, as the linear function that it is but for two constants.

The *raw* CRC of bytes is the one without initial value and final inversion: the remainder of their polynomial times
x^64. It is linear, so that

    raw(a ^ b) = raw(a) ^ raw(b)                     for bytes of one length
    raw(a + b) = shifted(raw(a), len(b)) ^ raw(b)
    raw(zeros + a) = raw(a)

The hardware's instructions are used through awscrt where it is installed; numpy does the same, at a tenth of the speed.
A polynomial is an integer as the CRC has it, reflected: the highest of 64 bits is the coefficient of x^0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Values = np.ndarray[Any, np.dtype[np.uint64]]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# awscrt is called once for each run of bytes from this length on: for shorter ones numpy does all at once, which is
# quicker than so many calls.
SHORT_RUN = 256

# Runs that begin so many bytes apart are put into zeros, which are counted along: that takes less than a call for each.
_NEAR = 4096
_FEW = 16  # runs, for which it takes more
_SPREAD_BYTES = 256 << 10  # of runs and zeros, which stay in the cache of a core

_ONES = (1 << 64) - 1
_POLYNOMIAL = 0x9A6C9329AC4BC9B5
_ONE = 1 << 63
_CHUNK = 8192  # values that are multiplied at a time; they stay in the cache


def crc64(data: memoryview | bytes) -> int:
    """The CRC-64/NVME of bytes."""
    return finished(raw(data), len(data))


def finished(value: int, length: int) -> int:
    """The CRC-64/NVME of `length` bytes, from their raw CRC."""
    return value ^ shifted(_ONES, length) ^ _ONES


def raw(data: memoryview | bytes, before: int = 0) -> int:
    """The raw CRC of bytes, or with `before`, the raw CRC of what precedes them, of both."""
    library = _library()
    if library is not None:
        return library.of(data, before ^ _ONES) ^ _ONES
    import numpy as np

    run = np.frombuffer(data, np.uint8)
    if not len(run):
        return before
    return shifted(before, len(run)) ^ int(_by_numpy(run.reshape(1, -1))[0])


def raw_of_runs(runs: Bytes) -> Values:
    """The raw CRC of every row of a contiguous array of bytes, at least one a row."""
    import numpy as np

    library, length = _library(), runs.shape[1]
    if library is None or (length < SHORT_RUN and len(runs) > 1):
        return _by_numpy(runs)
    data = runs.reshape(-1).data
    found = [library.of(data[start : start + length], _ONES) for start in range(0, len(data), length)]
    return np.array(found, np.uint64) ^ np.uint64(_ONES)


def raw_of_rows(runs: Bytes, count: int, stride: int) -> Values:
    """The raw CRC of every `count` runs, which begin `stride` bytes apart, with zeros between them."""
    if not has_library() or stride > _NEAR or count < _FEW:
        return joined(raw_of_runs(runs).reshape(-1, count), stride)
    import numpy as np

    rows = min(count, _SPREAD_BYTES // stride)
    memory = np.zeros((rows, stride), np.uint8)
    values = []
    for start in range(0, len(runs), count):
        value = 0
        for at in range(start, start + count, rows):
            part = runs[at : min(at + rows, start + count)]
            memory[: len(part), stride - runs.shape[1] :] = part
            value = raw(memory[: len(part)].reshape(-1).data, value)
        values.append(value)
    return np.array(values, np.uint64)


def shifted(value: int, length: int) -> int:
    """The raw CRC of bytes that are followed by `length` zeros, from their raw CRC."""
    library = _library()
    return _product(value, _power(length)) if library is None else library.joined(value, 0, length)


def joined(values: Values, stride: int) -> Values:
    """The raw CRC of what the last axis counts together, where each begins `stride` bytes behind the one before.

    `values` are the raw CRCs of the elements, as if each were followed by zeros up to the next one's last byte. All
    neighbours are joined at once, then pairs of pairs, and so on.
    """
    import numpy as np

    while values.shape[-1] > 1:
        if values.shape[-1] % 2:
            values = np.concatenate([np.zeros((*values.shape[:-1], 1), np.uint64), values], -1)
        values = _products(values[..., ::2], _power(stride)) ^ values[..., 1::2]
        stride *= 2
    return values[..., 0]


class _Library(NamedTuple):
    """awscrt's functions: the CRC of bytes behind others of a given CRC, and of two parts with the length of the last.

    Two parts are joined as `shifted(first) ^ second`, which holds for raw CRCs as well.
    """

    of: Callable[[Any, int], int]
    joined: Callable[[int, int, int], int]


@lru_cache(maxsize=1)
def _library() -> _Library | None:
    """None where awscrt is not installed, or is too old to have them."""
    try:
        from awscrt.checksums import combine_crc64nvme, crc64nvme
    except ImportError:
        return None
    return _Library(crc64nvme, combine_crc64nvme)


def has_library() -> bool:
    """Whether the hardware's instructions can be used."""
    return _library() is not None


def _by_numpy(runs: Bytes) -> Values:
    """`raw_of_runs` without a library: words of eight bytes are the elements that are joined."""
    import numpy as np

    count, length = runs.shape
    words = np.zeros((count, -(-length // 8) * 8), np.uint8)
    words[:, words.shape[1] - length :] = runs  # zeros in front count nothing
    return _products(joined(words.view("<u8"), 8), _power(8))


def _product(left: int, right: int) -> int:
    product = 0
    while left:
        if left & _ONE:
            product ^= right
        left = left << 1 & _ONES
        right = _times_x(right)
    return product


def _times_x(value: int) -> int:
    return value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)


@lru_cache(maxsize=4096)
def _power(length: int) -> int:
    """x^(8 · length)."""
    if length <= 1:
        return _ONE >> 8 * length
    half = _power(length // 2)
    return _product(_product(half, half), _power(length % 2))


def _products(values: Values, factor: int) -> Values:
    """Every value times a polynomial: what each of its eight bytes contributes is looked up."""
    import numpy as np

    tables = _tables(factor)
    flat = np.ascontiguousarray(values).reshape(-1)
    result = np.empty_like(flat)
    for start in range(0, len(flat), _CHUNK):
        digits = flat[start : start + _CHUNK].view(np.uint8).reshape(-1, 8)
        products = tables[0].take(digits[:, 0])
        for place in range(1, 8):
            products ^= tables[place].take(digits[:, place])
        result[start : start + _CHUNK] = products
    return result.reshape(values.shape)


@lru_cache(maxsize=512)
def _tables(factor: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """For each byte of a value, lowest first: its product with a polynomial, for every value of the byte."""
    import numpy as np

    of_bits = [factor]  # from the highest bit, x^0, down to x^63
    for _ in range(63):
        of_bits.append(_times_x(of_bits[-1]))
    of_bits.reverse()
    tables = np.zeros((8, 256), np.uint64)
    for bit, product in enumerate(of_bits):
        place, known = bit // 8, 1 << bit % 8
        tables[place, known : 2 * known] = tables[place, :known] ^ np.uint64(product)
    return tables
