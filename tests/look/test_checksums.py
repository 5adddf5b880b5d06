"""CRC-64/NVME against its definition, bit by bit, and shares of boxes against the CRC of the whole."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ckpt.checksums import crc64
from mindformers_ckpt.checksums.shares import checksum, share_of, share_of_run
from mindformers_ckpt.geometry.box import Box

# Of the catalogue of CRC algorithms (reveng): width 64, reflected, all ones at the beginning and at the end.
POLYNOMIAL = 0xAD93D23594C93659
CHECK = 0xAE8B14860A799888


def straight(data: bytes) -> int:
    """CRC-64/NVME bit by bit, in the order of the definition: nothing of the library is used."""
    register = (1 << 64) - 1
    for byte in data:
        for bit in range(8):
            register ^= (byte >> bit & 1) << 63
            register = (register << 1 & (1 << 64) - 1) ^ (POLYNOMIAL if register >> 63 else 0)
    return int(f"{register ^ (1 << 64) - 1:064b}"[::-1], 2)


@pytest.fixture(params=["awscrt", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hardware's instructions, where awscrt is installed, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(crc64, "_library", lambda: None)
    elif not crc64.has_library():
        pytest.skip("awscrt is not installed")


def test_the_published_check_value() -> None:
    assert straight(b"123456789") == CHECK
    assert crc64.crc64(b"123456789") == CHECK


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8, 9, 63, 64, 65, 255, 1000])
def test_every_length_agrees_with_the_definition(length: int) -> None:
    data = np.random.default_rng(length).bytes(length)
    assert crc64.crc64(data) == straight(data)
    for cut in {0, 1, length // 2, length}:
        first, second = data[:cut], data[cut:]
        assert crc64.raw(second, crc64.raw(first)) == crc64.raw(data)
        assert crc64.shifted(crc64.raw(first), len(second)) == crc64.raw(first + bytes(len(second)))
    assert crc64.raw(bytes(5) + data) == crc64.raw(data)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape, and boxes that make it up, cut unevenly along every dimension."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    edges = [sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))}) for extent in shape]
    spans = [list(zip(along, along[1:])) for along in edges]
    return shape, [Box(tuple(a for a, _ in cell), tuple(b for _, b in cell)) for cell in product(*spans)]


@settings(deadline=None, max_examples=60)
@given(cuts(), st.sampled_from([1, 2, 4, 8, 16]))
def test_shares_of_boxes_give_the_checksum_of_the_whole(cut: tuple[tuple[int, ...], list[Box]], size: int) -> None:
    shape, boxes = cut
    carrier = np.dtype(f"u{size}" if size <= 8 else f"V{size}")
    tensor = np.frombuffer(np.random.default_rng(0).bytes(math.prod(shape) * size), carrier).reshape(shape)
    shares = [share_of(np.ascontiguousarray(tensor[box.slices()]).reshape(box.shape), box, shape) for box in boxes]
    assert checksum(shares, tensor.nbytes) == straight(tensor.tobytes())


@pytest.mark.parametrize("columns", [3, 64, 100, 200])
def test_runs_on_both_sides_of_the_shortest_that_the_library_is_called_for(columns: int) -> None:
    tensor = np.random.default_rng(1).integers(0, 1 << 32, (7, 256), np.uint32)
    boxes = [Box((0, 0), (7, columns)), Box((0, columns), (7, 256))]
    shares = [share_of(np.ascontiguousarray(tensor[box.slices()]), box, tensor.shape) for box in boxes]
    assert checksum(shares, tensor.nbytes) == crc64.crc64(tensor.tobytes()) == straight(tensor.tobytes())


@pytest.mark.parametrize(
    "shape", [(700, 300), (3, 40, 200), (2, 150, 1024), (17, 2, 9, 5), (16, 2048), (15, 2048), (20, 2049)]
)
def test_rows_near_each_other_and_far_apart(shape: tuple[int, ...]) -> None:
    tensor = np.random.default_rng(3).integers(0, 1 << 16, shape, np.uint16)
    first = shape[-1] // 3
    boxes = [Box((0,) * len(shape), (*shape[:-1], first)), Box((*(0 for _ in shape[1:]), first), shape)]
    shares = [share_of(np.ascontiguousarray(tensor[box.slices()]), box, shape) for box in boxes]
    assert checksum(shares, tensor.nbytes) == crc64.crc64(tensor.tobytes())
    box = Box((0,) * len(shape), (shape[0], *(-(-extent // 2) for extent in shape[1:])))
    spread = np.zeros_like(tensor)
    spread[box.slices()] = tensor[box.slices()]
    share = share_of(np.ascontiguousarray(tensor[box.slices()]), box, shape)
    assert checksum([share], tensor.nbytes) == crc64.crc64(spread.tobytes())


def test_runs_of_bytes_give_the_checksum_of_all_in_any_order() -> None:
    data = np.random.default_rng(2).bytes(1000)
    spans = [(600, 1000), (0, 13), (14, 600), (13, 14)]
    shares = [share_of_run(memoryview(data)[first:last], first, len(data)) for first, last in spans]
    assert checksum(shares, len(data)) == straight(data)


def test_every_flipped_bit_changes_the_checksum() -> None:
    data = bytes(range(40))
    found = {
        crc64.crc64(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        for at, bit in product(range(40), range(8))
    }
    assert len(found) == 320
    assert crc64.crc64(data) not in found
