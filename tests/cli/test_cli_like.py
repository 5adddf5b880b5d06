"""Options that say what is believed of a source: --like (its shapes) and --contents (its values)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import Tensor, read_ranks, write_tensors
from toy import DP2MP2, MODEL, Result, command, listing

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy


def _transform(toy: Path, *options: str | Path) -> Result:
    return command(["transform", "--src-checkpoint", "sharded", "--dst-checkpoint-dir", "out", *options], toy)


def _mix_up(toy: Path) -> None:
    """A strategy in which rows and columns of the layers are mixed up: every size still divides."""
    mesh = {"dp": 2, "mp": 2}
    layouts = {**DP2MP2, **{f"layers.{n}.weight": Layout.on(mesh, "mp", None) for n in (0, 1)}}
    write_strategy(layouts, toy / "mixed_up/ckpt_strategy_rank_0.ckpt")


@pytest.mark.parametrize("reference", ["full.ckpt", "full.safetensors", "whole", "job/checkpoint"])
@pytest.mark.parametrize("name", ["transform", "plan"])
def test_dimensions_that_are_mixed_up(toy: Path, reference: str, name: str) -> None:
    """Nothing in the files tells, the shapes of the same model from another place do."""
    _mix_up(toy)
    (toy / "whole").mkdir()
    (toy / "whole/model.ckpt").write_bytes((toy / "full.ckpt").read_bytes())
    (toy / "job").mkdir()
    (toy / "job/checkpoint").symlink_to("../sharded")
    (toy / "job/strategy").symlink_to("../dp2mp2")
    asked = [name, "--src-checkpoint", "sharded", "--dst-checkpoint-dir", "out", "--like", reference]
    before = listing(toy)
    wrong = command([*asked, "--src-strategy", "mixed_up"], toy)
    assert wrong.code == 1, wrong
    assert "has other shapes than" in wrong.err
    for layer in (0, 1):
        assert f"layers.{layer}.weight: [16, 3] here, [8, 6] there" in wrong.err
    assert listing(toy) == before
    right = command([*asked, "--src-strategy", "dp2mp2"], toy)
    assert (right.code, right.err) == (0, ""), right


def test_rows_and_columns_exchanged(toy: Path) -> None:
    turned = {name: Tensor(dtype, np.ascontiguousarray(bits.T)) for name, (dtype, bits) in MODEL.items()}
    write_tensors(toy / "turned.ckpt", turned)
    result = _transform(toy, "--src-strategy", "dp2mp2", "--like", "turned.ckpt")
    assert result.code == 1, result
    lines = [
        line
        for line in result.err.splitlines()
        if line.endswith("[8, 6] here, [6, 8] there (rows and columns exchanged)")
    ]
    assert len(lines) == 3


def test_what_is_not_compared_is_said(toy: Path) -> None:
    known = {name: tensor for name, tensor in MODEL.items() if name != "norm.bias"}
    write_tensors(toy / "other.ckpt", {**known, "head.weight": MODEL["norm.bias"]})
    result = _transform(toy, "--src-strategy", "dp2mp2", "--like", "other.ckpt")
    assert result.code == 0, result
    assert "does not tell the shapes of norm.bias; they are not compared" in result.err
    assert "only " in result.err and "other.ckpt has head.weight" in result.err


def test_states_have_the_shapes_of_their_weights(toy: Path) -> None:
    dtype = by_name("float32")
    write_tensors(toy / "trained.ckpt", {**MODEL, "adam_m.norm.bias": Tensor(dtype, np.zeros(7, np.uint32))})
    asked = ["plan", "--src-checkpoint", "trained.ckpt", "--like", "full.ckpt"]
    result = command(asked, toy)
    assert result.code == 1, result
    assert "adam_m.norm.bias: [7] here, [6] there" in result.err


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", "there is no checkpoint at"),
        ("sharded", "neither it nor the folder around it has a folder `strategy` for that many"),
        ("two", "holds several checkpoints (0.ckpt, 1.ckpt); give the file that is meant"),
        ("alien.ckpt", "have no tensor in common: the one holds embedding.weight, …, the other x, …"),
        ("alien.json", "holds no config.json"),
        ("unknown/config.json", "model_type 'unheard_of'; known are"),
    ],
)
def test_a_reference_that_is_none(toy: Path, reference: str, message: str) -> None:
    write_tensors(toy / "alien.ckpt", {"x": MODEL["norm.bias"]})
    for number in range(2):
        write_tensors(toy / f"two/{number}.ckpt", MODEL)
    (toy / "alien.json").write_text("{}")
    (toy / "unknown").mkdir()
    (toy / "unknown/config.json").write_text('{"model_type": "unheard_of"}')
    before = listing(toy)
    result = _transform(toy, "--src-strategy", "dp2mp2", "--like", reference)
    assert result.code == 1, result
    assert message in result.err
    assert listing(toy) == before


LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def _fused_llama(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    random = np.random.default_rng(0)
    tensors = {
        f"decoder.layers.{n}.{name}": Tensor(by_name("float32"), random.integers(0, 1 << 30, shape, np.uint32))
        for n in range(2)
        for name, shape in shapes.items()
    }
    write_tensors(folder / "llama.ckpt", tensors)


@pytest.mark.parametrize("reference", ["hf", "hf/config.json"])
def test_a_config_of_hugging_face(tmp_path: Path, reference: str) -> None:
    """Its shapes are those of MindSpore's tensors: here query, key and value, gate and up in one each."""
    right: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.weight": (32, 16),
        "mlp.linear_fc1.weight": (48, 16),
    }
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(LLAMA))
    asked = ["plan", "--src-checkpoint", "llama.ckpt", "--like", reference, "--json"]
    _fused_llama(tmp_path, right)
    result = command(asked, tmp_path)
    assert result.code == 0, result
    said: dict[str, Any] = json.loads(result.out)
    assert any("only " in line and "has " in line for line in said["warnings"])
    _fused_llama(tmp_path, {**right, "self_attention.linear_qkv.weight": (16, 32)})
    result = command(asked, tmp_path)
    assert result.code == 1, result
    for n in range(2):
        wrong = rf"layers\.{n}\.self_attention\.linear_qkv\.weight: \[16, 32\] here, \[32, (16|\?)\] there"
        assert re.search(wrong + r" \(rows and columns exchanged\)", result.err), result
    assert "linear_fc1" not in result.err


def test_contents_decides_about_contradictions(toy: Path) -> None:
    """A matrix that is cut, although the strategy does not name it."""
    write_strategy(
        {name: DP2MP2[name] for name in DP2MP2 if name != "layers.0.weight"}, toy / "less/ckpt_strategy_rank_0.ckpt"
    )
    refused = _transform(toy, "--src-strategy", "less")
    assert refused.code == 1, refused
    assert "layers.0.weight: ranks 0 and 3 should hold the same values" in refused.err
    warned = _transform(toy, "--src-strategy", "less", "--contents", "warn")
    assert warned.code == 0, warned
    assert "those of the first rank are taken for all: layers.0.weight (ranks 0 and 3" in warned.err
    first = read_ranks(toy / "sharded")[0]["layers.0.weight"]
    assert read_ranks(toy / "out")[0]["layers.0.weight"].bits.tobytes() == first.bits.tobytes()
    off = _transform(toy, "--src-strategy", "less", "--contents", "off", "--overwrite")
    assert (off.code, off.err) == (0, ""), off
    assert _transform(toy, "--src-strategy", "less", "--contents", "ask").code == 2
