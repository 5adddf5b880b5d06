"""The arithmetic: every element the same however a weight is cut, and memory that does not grow with the weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ckpt.engine.compute import DOWN_TILE, UP_TILE, factor_values, merge
from mindformers_ckpt.engine.sinks import FileSink
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.planning.computations import Factor, Merge
from mindformers_ckpt.planning.model import TargetFile

ROWS, COLUMNS = 150, 530
ROOT = Path(__file__).resolve().parent.parent.parent


@st.composite
def parts(draw: st.DrawFn) -> Box:
    """A box of a matrix."""
    spans = [sorted(draw(st.tuples(st.integers(0, extent - 1), st.integers(1, extent)))) for extent in (ROWS, COLUMNS)]
    return Box(tuple(first for first, _ in spans), tuple(max(last, first + 1) for first, last in spans))


@settings(max_examples=60)
@given(parts(), st.sampled_from([1, 8, 37]), st.sampled_from(["float32", "bfloat16"]))
def test_an_element_does_not_depend_on_the_part(part: Box, rank: int, name: str) -> None:
    random = np.random.default_rng(rank)
    dtype, single = by_name(name), by_name("float32")
    halves: list[Any] = [random.standard_normal(shape).astype(np.float32) for shape in ((ROWS, rank), (rank, COLUMNS))]
    factors = [Factor(single, half.shape, half.shape, ()) for half in halves]
    tiles = (UP_TILE, DOWN_TILE)
    padded = [factor_values(half.view(np.uint32), *one) for half, one in zip(halves, zip(factors, tiles))]
    task = Merge(dtype, factors[0], factors[1], 1 / 3)
    bits = (random.standard_normal((ROWS, COLUMNS)).astype(np.float32).view(np.uint32)).astype(dtype.carrier)
    if name == "bfloat16":
        bits = (random.standard_normal((ROWS, COLUMNS)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    whole = merge(bits, task, Box.whole((ROWS, COLUMNS)), *padded)
    cut = np.ascontiguousarray(bits[part.slices()])
    assert np.array_equal(merge(cut, task, part, *padded), whole[part.slices()])


def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """Weights of 256 MB each (holes of a sparse file) are merged in less memory than one of them takes."""
    dtype, rank, rows, columns = by_name("bfloat16"), 16, 16384, 8192
    specs = []
    for layer in range(2):
        module = f"model.layers.{layer}.feed_forward.w2"
        specs += [
            TensorSpec(f"{module}.weight", dtype, (rows, columns)),
            TensorSpec(f"{module}.mindpet_delta_lora_a", dtype, (rank, columns)),
            TensorSpec(f"{module}.mindpet_delta_lora_b", dtype, (rows, rank)),
        ]
    FileSink(tmp_path, [TargetFile("lora.ckpt", 0, "ckpt", tuple(specs))]).prepare(0)
    script = (
        "import re, sys\n"
        "from mindformers_ckpt.cli.main import cli\n"
        "cli.main(sys.argv[1:], standalone_mode=False)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    options = ["--src_ckpt_path_or_dir", tmp_path / "lora.ckpt", "--dst_ckpt_dir", tmp_path / "out", "--alpha", "32"]
    done = subprocess.run(
        [sys.executable, "-c", script, "merge-lora", *map(str, options), "--quiet"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kilobytes = int(done.stdout)
    assert kilobytes < 150_000
    assert (tmp_path / "out/merged_lora.ckpt").stat().st_size > 5 * 10**8
