"""Every tensor must have the shape that config.json says and numbers that the model can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import CheckpointError, ConfigError, PlanError

# model -> tensors, config.json, and by how much each of its keys may be wrong
SOURCES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama": (
        "llama",
        hf.random_tensors(hf.llama_shapes()),
        hf.decoder_config(),
        "hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size",
    ),
    "mixtral": (
        "mixtral",
        hf.random_tensors(hf.mixtral_shapes(4)),
        hf.decoder_config(model_type="mixtral", num_hidden_layers=1, num_local_experts=4),
        "hidden_size head_dim intermediate_size vocab_size",
    ),
    "deepseek": (
        "deepseek",
        hf.deepseek_tensors(),
        hf.DEEPSEEK_CONFIG,
        (
            "hidden_size num_attention_heads intermediate_size moe_intermediate_size q_lora_rank kv_lora_rank "
            "qk_nope_head_dim qk_rope_head_dim v_head_dim vocab_size"
        ),
    ),
    "chatglm": (
        "glm-n",
        hf.random_tensors(hf.chatglm_shapes()),
        {**hf.CHATGLM_CONFIG, "hidden_size": 8, "padded_vocab_size": 12},
        "hidden_size num_attention_heads kv_channels multi_query_group_num ffn_hidden_size padded_vocab_size",
    ),
    "telechat": (
        "telechat",
        hf.random_tensors(hf.telechat_shapes("telechat_7b")),
        {"model_type": "telechat", "n_layer": 2, "hidden_size": 8, "n_head": 2, "ffn_hidden_size": 6, "vocab_size": 12},
        "hidden_size ffn_hidden_size vocab_size",
    ),
    "bloom": (
        "bloom",
        hf.random_tensors(hf.bloom_shapes()),
        {"model_type": "bloom", "n_layer": 2, "n_head": 2, "hidden_size": 8, "vocab_size": 12},
        "hidden_size vocab_size",
    ),
    "gpt2": (
        "gpt2",
        hf.random_tensors(hf.gpt2_shapes()),
        {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 12},
        "n_embd n_positions vocab_size",
    ),
    "swin": (
        "swin",
        hf.microsoft_swin_tensors(),
        {"depths": [2, 2], "embed_dim": 4, "num_heads": [2, 2], "mlp_ratio": 2.0, "num_channels": 3},
        "embed_dim num_channels",
    ),
}


def wrong_sizes() -> list[Any]:
    return [pytest.param(name, key, id=f"{name}-{key}") for name, (*_, keys) in SOURCES.items() for key in keys.split()]


@pytest.mark.parametrize("case", sorted(SOURCES))
def test_the_right_config_fits(case: str, tmp_path: Path) -> None:
    model, tensors, config, _ = SOURCES[case]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(model, source), tmp_path / "weights.ckpt")


@pytest.mark.parametrize(("case", "key"), wrong_sizes())
@pytest.mark.parametrize("reverse", [False, True])
def test_a_config_of_another_size_is_found(case: str, key: str, reverse: bool, tmp_path: Path) -> None:
    model, tensors, config, _ = SOURCES[case]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    if reverse:
        convert(Request(model, source), tmp_path / "weights.safetensors")
        source = tmp_path / "weights.safetensors"
    other = hf.write_folder(tmp_path / "other", {}, {**config, key: 2 * config[key]})
    request = Request(model, source, reverse, hf_config=other)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        convert(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_that_no_config_tells_are_the_same_everywhere(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.gpt2_shapes())
    tensors["transformer.h.1.ln_2.weight"] = np.zeros(9, np.float32)
    source = hf.write_folder(tmp_path / "source", tensors, None)
    with pytest.raises(PlanError, match=r"hidden is 9 here, but 8 in transformer\.wte\.weight"):
        convert(Request("gpt2", source), tmp_path / "weights.ckpt")


@pytest.mark.parametrize("naming", ["legacy", "mcore"])
@pytest.mark.parametrize("method", ["bitsandbytes", None])
def test_whole_numbers_are_no_weights(naming: str, method: str | None, tmp_path: Path) -> None:
    tensors = {
        name: np.ones(value.shape, np.int8) if "_proj" in name else value
        for name, value in hf.random_tensors(hf.llama_shapes()).items()
    }
    config = hf.decoder_config(**({"quantization_config": {"quant_method": method}} if method else {}))
    source = hf.write_folder(tmp_path / "source", tensors, config)
    with pytest.raises(PlanError) as caught:
        convert(Request("llama", source, naming=naming, dtype="bf16"), tmp_path / "weights.ckpt")
    message = str(caught.value)
    assert message.count("\n") == 0
    assert "14 tensors, such as model.layers.0." in message
    assert "int8[" in message
    assert ("quant_method 'bitsandbytes' of config.json" if method else "names no quant_method") in message


@pytest.mark.parametrize(
    ("method", "endings"),
    [
        ("gptq", ("qweight", "qzeros", "scales", "g_idx")),
        ("awq", ("qweight", "qzeros", "scales")),
        ("bitsandbytes", ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")),
        ("bitsandbytes", ("weight", "SCB", "weight_format")),
        ("compressed-tensors", ("weight_packed", "weight_scale", "weight_shape")),
    ],
)
@pytest.mark.parametrize("naming", ["legacy", "mcore"])
def test_folders_of_other_quantisations_get_one_line(
    method: str, endings: tuple[str, ...], naming: str, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = {}
    for name, value in hf.random_tensors(hf.llama_shapes()).items():
        if "_proj.weight" not in name:
            tensors[name] = value
            continue
        for ending in endings:
            tensors[f"{name.removesuffix('weight')}{ending}"] = np.ones((4, 1), np.uint8)
    config = hf.decoder_config(quantization_config={"quant_method": method})
    source = hf.write_folder(tmp_path / "source", tensors, config)
    with pytest.raises(PlanError) as caught:
        convert(Request("llama", source, naming=naming), tmp_path / "weights.ckpt")
    message = str(caught.value)
    assert message.count("\n") == 0
    assert f"quant_method {method!r}" in message
    assert "dequantize()" in message


def test_numbers_of_positions_are_whole(tmp_path: Path) -> None:
    tensors = hf.microsoft_swin_tensors()
    name = "layers.0.blocks.0.attn.relative_position_index"
    tensors[name] = tensors[name].astype(np.float32)
    source = hf.write_folder(tmp_path / "source", tensors, None)
    with pytest.raises(PlanError, match="whole numbers are expected"):
        convert(Request("swin", source), tmp_path / "weights.ckpt")


def test_dtype_says_what_it_could_not_change(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "swin", hf.microsoft_swin_tensors(), None)
    result = convert(Request("swin", source, dtype="bf16"), tmp_path / "swin.ckpt")
    assert any("4 tensors stay int64" in line and "relative_position_index" in line for line in result.warnings)
    source = hf.write_folder(tmp_path / "deepseek", hf.deepseek_tensors(), hf.DEEPSEEK_CONFIG)
    result = convert(Request("deepseek", source, naming="mcore", dtype="bf16"), tmp_path / "deepseek.ckpt")
    assert [line for line in result.warnings if "2 tensors stay float32" in line and "e_score_correction_bias" in line]
    assert convert(Request("deepseek", source), tmp_path / "as-it-is.ckpt").warnings == ()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_fp8_with_factors_of_every_type(kind: str, dtype: str | None, tmp_path: Path) -> None:
    scale_type = np.dtype(getattr(ml_dtypes, kind, kind))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = hf.random_tensors(hf.llama_shapes())
    codes = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    scale = np.random.default_rng(0).uniform(0.5, 2, (3, 2)).astype(scale_type)
    tensors = {**tensors, name: codes, f"{name}_scale_inv": scale}
    config = hf.decoder_config(
        torch_dtype="torch.bfloat16", quantization_config={"quant_method": "fp8", "weight_block_size": [2, 4]}
    )
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request("llama", source, dtype=dtype), tmp_path / "weights.ckpt")
    found = hf.read_file(tmp_path / "weights.ckpt")["model.layers.1.feed_forward.w3.weight"]
    factors = np.repeat(np.repeat(scale.astype(np.float32), 2, 0), 4, 1)
    expected = (codes.astype(np.float32) * factors).astype(np.float32 if dtype else ml_dtypes.bfloat16)
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def test_a_dtype_of_config_that_does_not_exist(tmp_path: Path) -> None:
    name = "model.norm.weight"
    tensors = hf.random_tensors(hf.llama_shapes())
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config(torch_dtype="bf8"))
    with pytest.raises(ConfigError, match=r"'bf8'.*choose one with --dtype"):
        convert(Request("llama", source), tmp_path / "weights.ckpt")
