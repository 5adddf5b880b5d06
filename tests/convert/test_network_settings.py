"""The same names with rows in other places: settings of the networks, and what records them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request, with_settings
from mindformers_ckpt.convert.run import convert, plan_ranks
from mindformers_ckpt.errors import CheckpointError, ConfigError
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.model import Strategy

CONTIGUOUS: dict[str, Any] = {"use_contiguous_weight_layout_attention": True}
HALVES: dict[str, Any] = {"use_interleaved_weight_layout_mlp": False}
LLAMA = hf.random_tensors(hf.llama_shapes())
MIXTRAL = hf.random_tensors(hf.mixtral_shapes(12))
MIXTRAL_CONFIG = hf.decoder_config(model_type="mixtral", num_hidden_layers=1, num_local_experts=12)


def plain(tensors: hf.Tensors, *names: str) -> Any:
    return np.concatenate([tensors[f"model.layers.1.{name}"] for name in names])


@pytest.mark.parametrize(
    ("words", "qkv", "gate_up"),
    [
        ({"qkv_concat": True}, "attention.w_qkv", "feed_forward.w_gate_hidden"),
        ({"naming": "mcore"}, "self_attention.linear_qkv", "mlp.linear_fc1"),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_contiguous_rows_and_halves(
    words: dict[str, Any], qkv: str, gate_up: str, biased: bool, tmp_path: Path
) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(bias=biased))
    config = hf.decoder_config(model_type="qwen2" if biased else "llama")
    source = hf.write_folder(tmp_path / "source", tensors, config)
    weights = tmp_path / "weights.safetensors"
    convert(Request(None, source, **words, **CONTIGUOUS, **HALVES), weights)
    found = hf.read_file(weights)
    layer = "decoder.layers.1." if "naming" in words else "model.layers.1."
    for kind in ("weight", "bias") if biased else ("weight",):
        rows = plain(tensors, *(f"self_attn.{name}_proj.{kind}" for name in "qkv"))
        assert found[f"{layer}{qkv}.{kind}"].tobytes() == rows.tobytes()
    rows = plain(tensors, "mlp.gate_proj.weight", "mlp.up_proj.weight")
    assert found[f"{layer}{gate_up}.weight"].tobytes() == rows.tobytes()
    # The file says so itself.
    back = convert(Request(None, weights, True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)
    assert back.naming.endswith("+use_contiguous_weight_layout_attention+no_use_interleaved_weight_layout_mlp")
    with pytest.raises(ConfigError, match="the options say"):
        other: dict[str, Any] = {"use_contiguous_weight_layout_attention": False}
        convert(Request(None, weights, True, hf_config=source, **other), tmp_path / "other")


def test_reversing_asks_where_two_layouts_have_one_name(tmp_path: Path) -> None:
    """A .ckpt file can record nothing; MindFormers 1.3 and 1.4 have the same names."""
    source = hf.write_folder(tmp_path / "source", LLAMA, hf.decoder_config())
    for words in ({**CONTIGUOUS, **HALVES}, {key: not value for key, value in {**CONTIGUOUS, **HALVES}.items()}):
        weights = tmp_path / f"{words['use_contiguous_weight_layout_attention']}.ckpt"
        convert(Request("llama", source, qkv_concat=True, **words), weights)
        wrong: list[dict[str, Any]] = [{}, {"qkv_concat": True}, {"qkv_concat": True, **CONTIGUOUS}]
        for asked in wrong:
            with pytest.raises(ConfigError, match=r"MindFormers 1\.4 and later .* 1\.3 and before"):
                convert(Request("llama", weights, True, hf_config=source, **asked), tmp_path / "asked")
        convert(Request("llama", weights, True, hf_config=source, **words), tmp_path / weights.stem)
        hf.assert_equal(hf.read_folder(tmp_path / weights.stem), LLAMA)


def test_shared_experts_have_halves_too(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.deepseek_tensors(), hf.DEEPSEEK_CONFIG)
    weights = tmp_path / "weights.safetensors"
    convert(Request("deepseek", source, naming="mcore", **HALVES), weights)
    tensors, name = hf.deepseek_tensors(), "mlp.shared_experts"
    rows = plain(tensors, f"{name}.gate_proj.weight", f"{name}.up_proj.weight")
    assert hf.read_file(weights)[f"decoder.layers.1.{name}.linear_fc1.weight"].tobytes() == rows.tobytes()
    convert(Request("deepseek", weights, True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_settings_of_a_yaml_reach_the_model_that_has_them(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, hf.decoder_config())
    settings = {**CONTIGUOUS, **HALVES, "use_gmm": True}
    request = with_settings(Request(None, source, naming="mcore"), settings)
    assert (request.use_contiguous_weight_layout_attention, request.use_interleaved_weight_layout_mlp) == (True, False)
    assert request.use_gmm is None


@pytest.mark.parametrize("naming", ["legacy", "mcore"])
def test_prediction_layers_multiply_in_the_order_of_the_network(naming: str, tmp_path: Path) -> None:
    """Hugging Face: eh_proj · [embedding; hidden state]. The legacy network: dense · [hidden state; embedding]."""
    tensors = hf.deepseek_tensors()
    source = hf.write_folder(tmp_path / "source", tensors, hf.DEEPSEEK_CONFIG)
    convert(Request("deepseek", source, naming=naming), tmp_path / "weights.safetensors")
    found = hf.read_file(tmp_path / "weights.safetensors")
    theirs = tensors["model.layers.2.eh_proj.weight"]
    if naming == "legacy":
        ours = found["model.mtp_hidden_fusers.0.dense.weight"]
        embedding, state = hf.random_tensor("embedding", (8,)), hf.random_tensor("state", (8,))
        expected = theirs @ np.concatenate([embedding, state])
        assert np.allclose(ours @ np.concatenate([state, embedding]), expected, atol=1e-6)
    else:
        assert found["mtp.layers.0.eh_proj.weight"].tobytes() == theirs.tobytes()
    convert(Request("deepseek", tmp_path / "weights.safetensors", True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_mixtral_of_a_training_network_with_use_gmm(suffix: str, tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", MIXTRAL, MIXTRAL_CONFIG)
    weights = tmp_path / f"weights.{suffix}"
    convert(Request("mixtral", source, use_gmm_training=True), weights)
    found = hf.read_file(weights)
    block, ours = "model.layers.0.block_sparse_moe.", "model.layers.0.feed_forward."
    for expert in range(12):
        w1, w2, w3 = (MIXTRAL[f"{block}experts.{expert}.w{number}.weight"] for number in (1, 2, 3))
        assert np.array_equal(found[f"{ours}ffn.w1"][expert], np.concatenate([w1.T, w3.T], axis=1))
        assert np.array_equal(found[f"{ours}ffn.w2"][expert], w2.T)
    assert np.array_equal(found[f"{ours}router_dense.weight"], MIXTRAL[f"{block}gate.weight"])
    # Names tell it on the way back, in a file that can record nothing too.
    result = convert(Request("mixtral", weights, True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), MIXTRAL)
    assert result.naming == "legacy+use_gmm_training"
    with pytest.raises(CheckpointError):
        convert(Request("mixtral", weights, True, hf_config=source, use_gmm_training=False), tmp_path / "no")


@pytest.mark.parametrize("use_gmm", [None, True])
def test_the_strategy_tells_which_mixtral_network_it_is_of(use_gmm: bool | None, tmp_path: Path) -> None:
    """A training yaml says `use_gmm: True`, and so does one for inference."""
    source = hf.write_folder(tmp_path / "source", MIXTRAL, MIXTRAL_CONFIG)
    layer = "model.layers.0.feed_forward."
    request = with_settings(Request(None, source), {"use_gmm": True} if use_gmm else {})
    rows = Layout((2,), ((0,), (), ()))
    training = plan_ranks(request, Strategy(({f"{layer}ffn.w1": rows, f"{layer}ffn.w2": rows},), 2, "a test"))
    shapes = {spec.name: spec.shape for spec in training.targets[0].tensors}
    assert shapes[f"{layer}ffn.w1"] == (6, hf.HIDDEN, 2 * hf.FFN)
    inference = plan_ranks(request, Strategy(({f"{layer}ffn.w1.weight": rows},), 2, "a test"))
    shapes = {spec.name: spec.shape for spec in inference.targets[0].tensors}
    assert shapes[f"{layer}ffn.w1.weight"] == ((6, hf.HIDDEN, hf.FFN) if use_gmm else (6, hf.FFN, hf.HIDDEN))


def test_tensors_without_a_place_in_the_network_are_named(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(bias=True))
    for layer in range(hf.LAYERS):
        inside = f"model.layers.{layer}."
        rows = {
            "self_attn.o_proj": hf.HIDDEN,
            "mlp.gate_proj": hf.FFN,
            "mlp.up_proj": hf.FFN,
            "mlp.down_proj": hf.HIDDEN,
        }
        tensors |= {f"{inside}{name}.bias": np.zeros(extent, np.float32) for name, extent in rows.items()}
    config = hf.decoder_config(attention_bias=True, mlp_bias=True)
    source = hf.write_folder(tmp_path / "llama", tensors, config)
    for naming in ("legacy", "mcore"):
        weights = tmp_path / f"{naming}.ckpt"
        (line,) = convert(Request("llama", source, naming=naming), weights).warnings
        assert "mlp_bias" in line
        written = hf.read_file(weights)
        assert not [name for name in written if name.endswith("bias") and ("feed_forward" in name or "mlp" in name)]
        (line,) = convert(Request("llama", weights, True, hf_config=source), tmp_path / f"{naming} back").warnings
        assert "mlp_bias" in line
        back = {name: array for name, array in tensors.items() if not ("mlp" in name and name.endswith("bias"))}
        hf.assert_equal(hf.read_folder(tmp_path / f"{naming} back"), back)
    for layer in range(hf.LAYERS):
        for name in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = np.zeros(4, np.float32)
    source = hf.write_folder(tmp_path / "qwen3", tensors, {**config, "model_type": "qwen3"})
    (line,) = convert(Request("qwen3", source), tmp_path / "qwen3.ckpt").warnings
    assert "linear_proj.bias" in line
