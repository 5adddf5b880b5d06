"""Where two runs of bytes begin to differ."""

from __future__ import annotations

import numpy as np
import pytest

from mindformers_ckpt.look.holders import first_difference


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000])
def test_the_first_byte_that_differs(length: int) -> None:
    left = np.random.default_rng(0).integers(0, 256, length, np.uint8)
    assert first_difference(left, left.copy()) is None
    for at in {0, length // 2, length - 1}:
        right = left.copy()
        right[at] ^= 128
        right[-1] ^= 1 if at < length - 1 else 0
        assert first_difference(left, right) == at


def test_nothing_is_equal_to_nothing() -> None:
    assert first_difference(np.empty(0, np.uint8), np.empty(0, np.uint8)) is None
