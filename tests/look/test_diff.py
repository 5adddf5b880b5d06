"""`diff` against differences that numpy computes of the whole tensors, under strategies, formats and types."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from damage_results import MODEL, make, strategy_of
from recorded import Tensor, random_bits, write_tensors

from mindformers_ckpt.errors import ConfigError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.look.diff import Diff, diff
from mindformers_ckpt.look.whole import checkpoint_at
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform


def of(values: Any, name: str) -> Tensor:
    """Numbers as a tensor of a type."""
    dtype = by_name(name)
    numbers = np.asarray(values).astype(getattr(ml_dtypes, name, name))
    return Tensor(dtype, numbers.view(dtype.carrier).reshape(numbers.shape))


def compare(folder: Path, left: dict[str, Tensor], right: dict[str, Tensor], **options: Any) -> Diff:
    write_tensors(folder / "left.ckpt", left)
    write_tensors(folder / "right.safetensors", right)
    return diff(folder / "left.ckpt", folder / "right.safetensors", **options)


def test_the_same_tensors_under_other_strategies_are_equal(tmp_path: Path) -> None:
    result, strategy = make(tmp_path), strategy_of(tmp_path)
    found = diff(tmp_path / "source.ckpt", result, None, strategy)
    assert (found.ok, found.equal, found.tensors) == (True, len(MODEL), ())
    plan = build_plan(checkpoint_at(result, strategy), Strategy.complete(), format="safetensors")
    transform(plan, tmp_path / "back")
    assert diff(result, tmp_path / "back", strategy).ok


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_largest_difference_where_and_norms(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mindformers_ckpt.look.diff.BLOCK_BYTES", block)
    monkeypatch.setattr("mindformers_ckpt.look.diff._STRIP", 7)
    chance = np.random.default_rng(3)
    left, right = chance.standard_normal((6, 5, 4)), chance.standard_normal((6, 5, 4))
    right[:, 1:] = left[:, 1:]
    ours, theirs = of(left, name), of(right, name)
    kind = getattr(ml_dtypes, name, name)
    a, b = (tensor.bits.view(kind).astype(float) for tensor in (ours, theirs))
    delta = np.abs(a - b)
    (found,) = compare(tmp_path, {"w": ours}, {"w": theirs}).tensors
    where = np.unravel_index(np.argmax(delta), delta.shape)
    assert found.where == tuple(map(int, where))
    assert (found.differing, found.largest) == (np.count_nonzero(delta), delta.max())
    assert found.values == (a[where], b[where])
    assert found.relative == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(a))


def test_what_is_there_once_and_other_forms(tmp_path: Path) -> None:
    w = of([[1.0, 2.0], [3.0, 4.0]], "float32")
    found = compare(
        tmp_path,
        {"a": w, "both": w, "form": w, "type": w, "lost type": w},
        {"b": w, "both": w, "form": of([1.0, 2.0, 3.0], "float32"), "type": of([[1, 2], [3, 4]], "bfloat16"),
         "lost type": of([[1, 2], [3, 5]], "float16")},
    )  # fmt: skip
    assert (found.only_left, found.only_right, found.equal) == (("a",), ("b",), 1)
    assert [(tensor.name, tensor.differing, tensor.largest) for tensor in found.tensors] == [
        ("form", None, None),
        ("lost type", 1, 1.0),
        ("type", 0, 0.0),
    ]
    assert not found.ok
    assert len(found.beyond) == 3


@pytest.mark.parametrize(
    ("left", "right", "largest", "differing"),
    [
        ([1.0, math.nan], [1.0, math.nan], 0, 0),
        ([1.0, math.nan], [1.5, math.nan], 0.5, 1),
        ([1.0, math.nan], [1.0, 2.0], math.inf, 1),
        ([1.0, math.inf], [1.5, math.inf], 0.5, 1),
        ([1.0, math.inf], [1.0, -math.inf], math.inf, 1),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0),
    ],
)
def test_numbers_that_are_none(
    left: list[float], right: list[float], largest: float, differing: int, tmp_path: Path
) -> None:
    found = compare(tmp_path, {"w": of(left, "float32")}, {"w": of(right, "float32")}, tolerance=0.1)
    if not found.tensors:
        assert (largest, differing, found.equal) == (0, 0, 1)
        return
    (tensor,) = found.tensors
    assert (tensor.largest, tensor.differing) == (largest, differing)
    assert found.ok == (largest <= 0.1)


def test_integers_are_compared_exactly(tmp_path: Path) -> None:
    left, right = of([2**62, -5], "int64"), of([2**62 + 1, -5], "int64")
    (found,) = compare(tmp_path, {"n": left}, {"n": right}).tensors
    assert (found.largest, found.differing, found.where) == (1.0, 1, (0,))


@pytest.mark.parametrize("name", ["complex64", "bool", "int8", "uint64"])
def test_every_kind_of_numbers(name: str, tmp_path: Path) -> None:
    left = random_bits(by_name(name), (9,), np.random.default_rng(1))
    bits = left.bits.copy()
    bits.view("u1")[4 * left.dtype.itemsize] ^= 1
    (found,) = compare(tmp_path, {"w": left}, {"w": Tensor(left.dtype, bits)}).tensors
    assert (found.differing, found.where) == (1, (4,))


def test_the_tolerance(tmp_path: Path) -> None:
    left, right = {"w": of([1.0, 2.0], "float32")}, {"w": of([1.0, 2.25], "float32")}
    assert compare(tmp_path, left, right, tolerance=0.25).ok
    assert not compare(tmp_path, left, right, tolerance=0.2).ok
    assert not compare(tmp_path, left, right).ok
    # Nothing but equal bits is equal without a tolerance.
    assert not compare(tmp_path, {"w": of([0.0], "float32")}, {"w": of([-0.0], "float32")}).ok
    with pytest.raises(ConfigError, match="tolerance"):
        compare(tmp_path, left, right, tolerance=math.nan)
