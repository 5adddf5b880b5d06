"""`mindformers-ckpt diff`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from recorded import Tensor, write_tensors
from toy import MODEL, command, invoke


def test_the_same_and_not_the_same(toy: Path) -> None:
    same = invoke(["diff", "full.safetensors", "sharded", "--strategy-b", "dp2mp2"], toy)
    assert same.code == 0, same
    assert same.out == "5 tensors are equal bit for bit, 0 differ; 0 only in A, 0 only in B\n"
    dtype, bits = MODEL["layers.0.weight"]
    numbers = bits.view(np.float32).copy()
    numbers[3, 2] = 8.0
    other = {name: tensor for name, tensor in MODEL.items() if name != "norm.bias"}
    other["layers.0.weight"] = Tensor(dtype, numbers.view(np.uint32))
    write_tensors(toy / "other.ckpt", other)
    words = ["diff", "full.ckpt", "other.ckpt"]
    found = invoke(words, toy)
    assert found.code == 1, found
    only, changed, end = found.out.splitlines()
    assert only == "only in A: norm.bias"
    assert changed.startswith("layers.0.weight: float32[8, 6]; 1 of 48 elements differ, by at most ")
    assert "at [3, 2] (A " in changed
    assert ", B 8)" in changed
    assert end == "3 tensors are equal bit for bit, 1 differ; 1 only in A, 0 only in B"
    report = json.loads(invoke([*words, "--json"], toy).out)
    assert (report["ok"], report["only_in_a"], report["equal"]) == (False, ["norm.bias"], 3)
    (tensor,) = report["tensors"]
    assert tensor["where"] == [3, 2]
    assert tensor["values"] == [float(bits.view(np.float32)[3, 2]), 8.0]
    silent = command([*words, "--quiet"], toy)
    assert (silent.code, silent.out, silent.err) == (1, "", "")
