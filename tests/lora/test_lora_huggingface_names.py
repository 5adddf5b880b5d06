"""Adapters with Hugging Face names over MindSpore weights: converting and merging commute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lora_model import numbers
from recorded import Tensor, random_bits, read_tensors, write_tensors

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.formats.dtypes import by_name

HIDDEN, FFN, HEADS, GROUPS, DIM, RANK = 32, 24, 4, 2, 8, 4
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
}
LINEAR = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (GROUPS * DIM, HIDDEN),
    "self_attn.v_proj": (GROUPS * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A Hugging Face folder with random weights."""
    random, folder = np.random.default_rng(5), tmp_path / "base"
    shapes = {"model.embed_tokens.weight": (16, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (16, HIDDEN)}
    for layer in range(2):
        own = {**LINEAR, "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()})
    tensors = {name: random_bits(by_name("float32"), shape, random) for name, shape in shapes.items()}
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_adapter(folder: Path, modules: list[str], **settings: object) -> Path:
    """A PEFT folder with branches of modules in both layers."""
    random, tensors = np.random.default_rng(6), {}
    for layer in range(2):
        for module in modules:
            rows, columns = LINEAR[module]
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = random_bits(by_name("float32"), (RANK, columns), random)
            tensors[f"{name}.lora_B.weight"] = random_bits(by_name("float32"), (rows, RANK), random)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "init_lora_weights": True, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def merge(source: Path, destination: Path, adapter: Path, *arguments: str | Path, code: int = 0) -> str:
    options = ("--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", destination, "--adapter", adapter, *arguments)
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, options)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def merged_then_converted(base: Path, adapter: Path, folder: Path, request: Request) -> dict[str, Tensor]:
    merge(base, folder / "first", adapter)
    (folder / "first/merged_lora.safetensors").rename(folder / "first/model.safetensors")
    convert(request, folder / "expected.ckpt")
    return read_tensors(folder / "expected.ckpt")


@pytest.mark.parametrize("modules", [list(LINEAR), ["self_attn.v_proj", "mlp.up_proj"]], ids=["all", "two"])
@pytest.mark.parametrize("naming", ["legacy", "mcore", "legacy+qkv_concat"])
def test_over_converted_weights(naming: str, modules: list[str], base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", modules)
    words: dict[str, Any] = {"naming": naming.partition("+")[0], "qkv_concat": "+" in naming, "hf_config": base}
    expected = merged_then_converted(base, adapter, tmp_path, Request("llama", tmp_path / "first", **words))
    convert(Request("llama", base, **words), tmp_path / "base.ckpt")
    unchanged = read_tensors(tmp_path / "base.ckpt")
    merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, "--hf_config", base)
    found = read_tensors(tmp_path / "out/merged_lora.ckpt")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert np.allclose(numbers(found[name]), numbers(tensor), rtol=1e-6, atol=1e-6), name
    changed = [name for name, tensor in found.items() if tensor.bits.tobytes() != unchanged[name].bits.tobytes()]
    fused = {"mcore": 4, "legacy": 7, "legacy+qkv_concat": 4}[naming]
    assert len(changed) == 2 * (fused if len(modules) > 2 else 2)


def test_rows_of_other_modules_keep_their_bits(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", ["self_attn.k_proj"])
    convert(Request("llama", base, naming="mcore"), tmp_path / "base.ckpt")
    merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, "--hf_config", base)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    before, after = (read_tensors(tmp_path / path)[name].bits for path in ("base.ckpt", "out/merged_lora.ckpt"))
    equal = (before == after).reshape(GROUPS, HEADS // GROUPS + 2, DIM, HIDDEN)
    assert equal[:, [0, 1, 3]].all()
    assert not equal[:, 2].any()


def test_names_without_a_model(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", ["self_attn.q_proj"])
    convert(Request("llama", base), tmp_path / "base.ckpt")
    output = merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, code=1)
    assert output.count("the weight model.layers.") == 2
    assert "give --model" in output
    merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, "--model", "llama")
    assert "unknown model 'lama'" in merge(tmp_path / "base.ckpt", tmp_path / "x", adapter, "--model", "lama", code=1)


def test_fused_weights_need_the_sizes_of_the_model(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", ["self_attn.q_proj"])
    convert(Request("llama", base, naming="mcore"), tmp_path / "base.ckpt")
    output = merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, "--model", "llama", code=1)
    assert "the size queries is not known; give the folder of the model's config.json (--hf_config)" in output


def test_scalings_that_differ_in_a_fused_weight(base: Path, tmp_path: Path) -> None:
    modules = ["self_attn.q_proj", "self_attn.k_proj"]
    adapter = write_adapter(tmp_path / "adapter", modules, alpha_pattern={"k_proj": 3})
    convert(Request("llama", base, naming="mcore"), tmp_path / "base.ckpt")
    output = merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, "--hf_config", base, code=1)
    assert "the fused decoder.layers.0.self_attention.linear_qkv.weight has another scaling or type" in output
    merge(tmp_path / "base.ckpt", tmp_path / "out", adapter, "--hf_config", base, "--lora_scaling", "1.5")
