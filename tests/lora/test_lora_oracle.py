"""Merged weights against MindSpore: the formula of MindFormers' script on the same files."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from lora_model import SCALING, STEP, Model, adapters, base_model, lora_model, numbers, states, write_complete
from recorded import read_tensors

from mindformers_ckpt.cli.main import cli

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mindspore = pytest.importorskip("mindspore", reason="MindSpore is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")


def merged_by_mindspore(source: Path, target: Path) -> None:
    """What the script does, with its names, operators and element types."""
    from mindspore import Parameter, Tensor, ops

    loaded = mindspore.load_checkpoint(str(source))
    merged = {name: value for name, value in loaded.items() if "lora_" not in name}
    for down in (name for name in loaded if "lora_a" in name and not name.startswith("adam_")):
        weight = down.replace("_lora_a", "").replace("mindpet_delta", "weight")
        product = ops.mm(loaded[down.replace("lora_a", "lora_b")], loaded[down])
        total = ops.add(merged[weight], product * SCALING)
        merged[weight] = Parameter(Tensor(total, merged[weight].dtype), name=weight)
    mindspore.save_checkpoint([{"name": name, "data": value} for name, value in merged.items()], str(target))


def test_equal_to_the_script_within_one_rounding(tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", lora_model())
    merged_by_mindspore(source, tmp_path / "theirs.ckpt")
    options = ["--src_ckpt_path_or_dir", str(source), "--dst_ckpt_dir", str(tmp_path / "out"), "--lora_scaling", "2"]
    assert CliRunner().invoke(cli, ["merge-lora", *options]).exit_code == 0
    ours, theirs = read_tensors(tmp_path / "out/merged_lora.ckpt"), read_tensors(tmp_path / "theirs.ckpt")
    assert list(ours) == list(theirs) == [*base_model(), STEP]
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.bits.shape) == (theirs[name].dtype, theirs[name].bits.shape), name
        if name not in base_model() or "layers" not in name:
            assert tensor.bits.tobytes() == theirs[name].bits.tobytes(), name
            continue
        digits = {"bfloat16": 7, "float16": 10, "float32": 23}[tensor.dtype.name]
        first, second = numbers(tensor), numbers(theirs[name])
        # One unit in the last place, or what the sum of eight products loses in single precision.
        allowed = np.maximum(np.abs(second) * 2.0**-digits, np.abs(second).max() * 2.0**-22)
        assert (np.abs(first - second) <= allowed).all(), name
        assert (tensor.bits == theirs[name].bits).mean() > (0.5 if tensor.dtype.name == "float32" else 0.999), name


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_mindspore_loads_the_result(format: str, tmp_path: Path) -> None:
    model: Model = {**base_model(), **adapters(), **states(adapters())}
    source = write_complete(tmp_path / f"lora.{format}", model)
    options = ["--src_ckpt_path_or_dir", str(source), "--dst_ckpt_dir", str(tmp_path / "out"), "--alpha", "16"]
    assert CliRunner().invoke(cli, ["merge-lora", *options]).exit_code == 0
    path = tmp_path / f"out/merged_lora.{format}"
    loaded = mindspore.load_checkpoint(str(path), format=format)
    assert set(loaded) == set(base_model())
    for name, tensor in read_tensors(path).items():
        assert np.array_equal(loaded[name].asnumpy().astype(np.float64), numbers(tensor)), name
