"""Buffers begin at a multiple of 64, whatever their size."""

from __future__ import annotations

import numpy as np
import pytest

from mindformers_ckpt.engine.buffers import empty_bytes


@pytest.mark.parametrize("size", [1, 63, 4096, 100_001, 8 << 20, 40 << 20])
def test_the_first_byte_is_aligned(size: int) -> None:
    buffer = empty_bytes(size)
    assert buffer.dtype == np.uint8 and buffer.shape == (size,)
    assert buffer.flags.writeable and buffer.flags.c_contiguous
    assert buffer.ctypes.data % 64 == 0
