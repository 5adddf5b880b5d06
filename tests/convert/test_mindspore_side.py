"""What stands in MindSpore's tensors, computed by hand (numpy), not by the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import PlanError


def converted(
    tmp_path: Path, model: str, tensors: Mapping[str, Any], config: Mapping[str, Any] | None, **words: Any
) -> dict[str, Any]:
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(model, source, **words), tmp_path / "weights.ckpt")
    return hf.read_file(tmp_path / "weights.ckpt")


def numbered(shape: tuple[int, ...], first: int) -> Any:
    return (np.arange(np.prod(shape)) + first).reshape(shape).astype(np.float32)


def test_query_key_value_stand_group_by_group(tmp_path: Path) -> None:
    """2 groups of 2 heads of 4: rows q0 q1 k0 v0, then q2 q3 k1 v1; the bias in the same order."""
    tensors = hf.random_tensors(hf.llama_shapes(bias=True))
    layer = "model.layers.1.self_attn."
    for name, count, first in (("q", 16, 0), ("k", 8, 100), ("v", 8, 200)):
        tensors[f"{layer}{name}_proj.weight"] = numbered((count,), first)[:, None] + np.zeros((1, 8), np.float32)
        tensors[f"{layer}{name}_proj.bias"] = numbered((count,), first)
    rows = [*range(8), 100, 101, 102, 103, 200, 201, 202, 203]
    rows += [*range(8, 16), 104, 105, 106, 107, 204, 205, 206, 207]
    for words, name in (
        ({"naming": "mcore"}, "decoder.layers.1.self_attention.linear_qkv"),
        ({"qkv_concat": True}, "model.layers.1.attention.w_qkv"),
    ):
        folder = tmp_path / name
        found = converted(folder, "qwen", tensors, hf.decoder_config(), **words)
        assert found[f"{name}.weight"].shape == (32, 8)
        assert found[f"{name}.weight"][:, 3].tolist() == rows
        assert found[f"{name}.bias"].tolist() == rows


def test_gate_and_up_take_turns(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    found = converted(tmp_path, "llama", tensors, hf.decoder_config(), naming="mcore")
    fused = found["decoder.layers.0.mlp.linear_fc1.weight"]
    assert fused.shape == (12, 8)
    for row in range(6):
        assert (fused[2 * row] == gate[row]).all()
        assert (fused[2 * row + 1] == up[row]).all()


def test_experts_are_stacked_by_number_not_by_text(tmp_path: Path) -> None:
    """12 experts: as text 10 and 11 come before 2."""
    tensors = hf.random_tensors(hf.mixtral_shapes(12))
    config = hf.decoder_config(num_hidden_layers=1, num_local_experts=12)
    found = converted(tmp_path, "mixtral", tensors, config)
    for name in ("w1", "w2", "w3"):
        stacked = found[f"model.layers.0.feed_forward.ffn.{name}.weight"]
        assert len(stacked) == 12
        for expert in range(12):
            assert (stacked[expert] == tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]).all()


def test_mcore_experts_are_two_matrices(tmp_path: Path) -> None:
    """weight1 [E·h, 2f]: of every expert gate and up, turned, side by side. weight2 [E·f, h]: down, turned."""
    tensors = hf.deepseek_tensors()
    found = converted(tmp_path, "deepseek", tensors, hf.DEEPSEEK_CONFIG, naming="mcore")
    experts = "model.layers.1.mlp.experts."
    first = [
        np.hstack([tensors[f"{experts}{e}.gate_proj.weight"].T, tensors[f"{experts}{e}.up_proj.weight"].T])
        for e in range(11)
    ]
    second = [tensors[f"{experts}{e}.down_proj.weight"].T for e in range(11)]
    np.testing.assert_array_equal(found["decoder.layers.1.mlp.experts.weight1"], np.vstack(first))
    np.testing.assert_array_equal(found["decoder.layers.1.mlp.experts.weight2"], np.vstack(second))


def test_legacy_deepseek_splits_latent_attention_and_turns_rotary_pairs(tmp_path: Path) -> None:
    tensors = hf.deepseek_tensors()
    found = converted(tmp_path, "deepseek", tensors, hf.DEEPSEEK_CONFIG)
    hf_layer, layer = "model.layers.1.self_attn.", "model.layers.1.attention."
    query = tensors[f"{hf_layer}q_b_proj.weight"]
    # Of each of the 2 heads 4 rows without position, then 4 with: pairs (0 1) (2 3) become halves (0 2) (1 3).
    assert (found[f"{layer}l2q_nope_proj.weight"] == query[[0, 1, 2, 3, 8, 9, 10, 11]]).all()
    assert (found[f"{layer}l2q_pe_proj.weight"] == query[[4, 6, 5, 7, 12, 14, 13, 15]]).all()
    latent = tensors[f"{hf_layer}kv_a_proj_with_mqa.weight"]
    assert (found[f"{layer}kv2l_latent_kv.weight"] == latent[:4]).all()
    assert (found[f"{layer}kv2l_k_pe.weight"] == latent[[4, 6, 5, 7]]).all()
    up = tensors[f"{hf_layer}kv_b_proj.weight"]
    assert (found[f"{layer}lkv2kv_k_nope.weight"] == up[[0, 1, 2, 3, 7, 8, 9, 10]]).all()
    assert (found[f"{layer}lkv2kv_v.weight"] == up[[4, 5, 6, 11, 12, 13]]).all()
    experts = found["model.layers.1.feed_forward.routed_experts.ffn.w1"]
    assert experts.shape == (11, 8, 10)
    assert (experts[10, :, 5:] == tensors["model.layers.1.mlp.experts.10.up_proj.weight"].T).all()


def test_prediction_layers_have_their_own_names(tmp_path: Path) -> None:
    tensors = hf.deepseek_tensors()
    mcore = converted(tmp_path / "mcore", "deepseek", tensors, hf.DEEPSEEK_CONFIG, naming="mcore")
    legacy = converted(tmp_path / "legacy", "deepseek", tensors, hf.DEEPSEEK_CONFIG)
    for hf_name, name, old in (
        ("enorm", "mtp.layers.0.enorm", "model.mtp_hidden_fusers.0.norm_emb"),
        ("hnorm", "mtp.layers.0.hnorm", "model.mtp_hidden_fusers.0.norm"),
        ("shared_head.norm", "mtp.layers.0.final_layernorm", "model.mtp_norms.0"),
        (
            "self_attn.o_proj",
            "mtp.layers.0.transformer_layer.self_attention.linear_proj",
            "model.layers.2.attention.wo",
        ),
    ):
        assert (mcore[f"{name}.weight"] == tensors[f"model.layers.2.{hf_name}.weight"]).all()
        assert (legacy[f"{old}.weight"] == tensors[f"model.layers.2.{hf_name}.weight"]).all()


def test_glm_query_key_value_stand_one_after_the_other(tmp_path: Path) -> None:
    shapes = hf.llama_shapes(bias=True)
    shapes = {name: shape for name, shape in shapes.items() if "gate_proj" not in name and "up_proj" not in name}
    shapes.update({f"model.layers.{n}.mlp.gate_up_proj.weight": (12, 8) for n in range(2)})
    tensors = hf.random_tensors(shapes)
    config = hf.decoder_config(model_type="glm", attention_bias=True)
    found = converted(tmp_path, "glm4", tensors, config)
    for kind in ("weight", "bias"):
        parts = [tensors[f"model.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv"]
        fused = found[f"transformer.encoder.layers.1.self_attention.query_key_value.{kind}"]
        np.testing.assert_array_equal(fused, np.concatenate(parts))


def glm_tensors(layout: str) -> dict[str, Any]:
    """4 heads of 4 in 2 groups; rows of query in layer 1 are 0, 1 …, of key 100, 101 …, of value 200, 201 …"""
    rows = {name: numbered((count,), first) for name, count, first in (("q", 16, 0), ("k", 8, 100), ("v", 8, 200))}
    across = np.zeros((1, 8), np.float32)
    if layout == "chatglm":
        tensors = hf.random_tensors(hf.chatglm_shapes())
        fused = np.concatenate(list(rows.values()))
        name = "transformer.encoder.layers.1.self_attention.query_key_value."
        tensors.update({f"{name}weight": fused[:, None] + across, f"{name}bias": fused})
        return tensors
    shapes = hf.llama_shapes(bias=True)
    shapes = {name: shape for name, shape in shapes.items() if "gate_proj" not in name and "up_proj" not in name}
    shapes.update({f"model.layers.{n}.mlp.gate_up_proj.weight": (12, 8) for n in range(2)})
    tensors = hf.random_tensors(shapes)
    for name, values in rows.items():
        tensors[f"model.layers.1.self_attn.{name}_proj.weight"] = values[:, None] + across
        tensors[f"model.layers.1.self_attn.{name}_proj.bias"] = values
    return tensors


@pytest.mark.parametrize("layout", ["chatglm", "native"])
@pytest.mark.parametrize("rearranged", [False, True], ids=["plain", "rearranged"])
@pytest.mark.parametrize("concat", [False, True], ids=["apart", "concat"])
def test_glm_settings_of_query_key_value(layout: str, concat: bool, rearranged: bool, tmp_path: Path) -> None:
    tensors = glm_tensors(layout)
    config = hf.CHATGLM_CONFIG if layout == "chatglm" else hf.decoder_config(model_type="glm", attention_bias=True)
    words: dict[str, Any] = {"qkv_concat": concat, "use_rearrange_rope": rearranged}
    found = converted(tmp_path, "glm-n", tensors, config, **words)
    query: list[int] = list(range(16))
    key, value = list(range(100, 108)), list(range(200, 208))
    if rearranged:
        query = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15]
        key = [100, 102, 101, 103, 104, 106, 105, 107]
    attention = "transformer.encoder.layers.1.self_attention."
    parts = {"query_key_value": query + key + value} if concat else {"wq": query, "wk": key, "wv": value}
    for name, rows in parts.items():
        assert found[f"{attention}{name}.weight"][:, 5].tolist() == rows
        assert found[f"{attention}{name}.bias"].tolist() == rows
    assert (f"{attention}query_key_value.weight" in found) is concat
    back = Request("glm-n", tmp_path / "weights.ckpt", reverse=True, hf_config=tmp_path / "source", **words)
    convert(back, tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


@pytest.mark.parametrize("layout", ["chatglm", "native"])
def test_glm_gate_and_up_apart(layout: str, tmp_path: Path) -> None:
    tensors = glm_tensors(layout)
    config = hf.CHATGLM_CONFIG if layout == "chatglm" else hf.decoder_config(model_type="glm", attention_bias=True)
    found = converted(tmp_path, "glm-n", tensors, config, mlp_concat=False)
    chatglm = "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"
    fused = tensors[chatglm if layout == "chatglm" else "model.layers.1.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(found["transformer.encoder.layers.1.mlp.dense_left.weight"], fused[:6])
    np.testing.assert_array_equal(found["transformer.encoder.layers.1.mlp.dense_right.weight"], fused[6:])
    assert chatglm not in found
    back = Request("glm-n", tmp_path / "weights.ckpt", reverse=True, hf_config=tmp_path / "source", mlp_concat=False)
    convert(back, tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_mixtral_experts_are_turned_for_grouped_multiplication(tmp_path: Path) -> None:
    """w1 and w3 [expert, hidden, ffn], w2 [expert, ffn, hidden]."""
    tensors = hf.random_tensors(hf.mixtral_shapes(11))
    config = hf.decoder_config(num_hidden_layers=1, num_local_experts=11)
    found = converted(tmp_path, "mixtral", tensors, config, use_gmm=True)
    for name, shape in (("w1", (11, 8, 6)), ("w2", (11, 6, 8)), ("w3", (11, 8, 6))):
        stacked = found[f"model.layers.0.feed_forward.ffn.{name}.weight"]
        assert stacked.shape == shape
        for expert in range(11):
            own = tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight"]
            np.testing.assert_array_equal(stacked[expert], own.T)
    back = Request("mixtral", tmp_path / "weights.ckpt", reverse=True, hf_config=tmp_path / "source")
    with pytest.raises(PlanError, match=r"w1\.weight.* does not go with"):
        convert(back, tmp_path / "back")
    convert(replace(back, use_gmm=True), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_bloom_takes_query_key_value_of_every_head_apart(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.bloom_shapes())
    found = converted(tmp_path, "bloom", tensors, {"n_layer": 2, "n_head": 2, "hidden_size": 8})
    fused = tensors["transformer.h.1.self_attention.query_key_value.weight"]
    layer = "blocks.1."
    # Heads of 4: rows q0 k0 v0 q1 k1 v1.
    for number, first in ((1, 0), (2, 4), (3, 8)):
        rows = [*range(first, first + 4), *range(first + 12, first + 16)]
        assert (found[f"{layer}attention.dense{number}.weight"] == fused[rows]).all()
    up = tensors["transformer.h.1.mlp.dense_h_to_4h.weight"]
    assert (found[f"{layer}output.mapping.weight"] == up.T).all()
    assert (found[f"{layer}layernorm2.beta"] == tensors["transformer.h.1.post_attention_layernorm.bias"]).all()


def test_gpt2_turns_query_key_value_only(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.gpt2_shapes(prefix=""))
    found = converted(tmp_path, "gpt2", tensors, {"n_layer": 2})
    fused = tensors["h.1.attn.c_attn.weight"]
    assert fused.shape == (8, 24)
    for number in range(3):
        expected = fused[:, 8 * number : 8 * number + 8].T
        assert (found[f"backbone.blocks.1.attention.dense{number + 1}.weight"] == expected).all()
    assert (found["backbone.blocks.1.output.mapping.weight"] == tensors["h.1.mlp.c_fc.weight"]).all()


def test_wizardcoder_has_one_key_and_one_value(tmp_path: Path) -> None:
    shapes = hf.gpt2_shapes()
    for n in range(2):
        layer = f"transformer.h.{n}."
        shapes[f"{layer}attn.c_attn.weight"], shapes[f"{layer}attn.c_attn.bias"] = (16, 8), (16,)
        shapes[f"{layer}mlp.c_fc.weight"], shapes[f"{layer}mlp.c_proj.weight"] = (32, 8), (8, 32)
    tensors = hf.random_tensors(shapes)
    found = converted(tmp_path, "wizardcoder", tensors, {"n_layer": 2, "n_head": 2, "n_embd": 8, "multi_query": True})
    fused = tensors["transformer.h.0.attn.c_attn.weight"]
    layer = "backbone.blocks.0."
    for number, rows in ((1, slice(0, 8)), (2, slice(8, 12)), (3, slice(12, 16))):
        assert (found[f"{layer}attention.dense{number}.weight"] == fused[rows]).all()
    assert (found[f"{layer}output.mapping.weight"] == tensors["transformer.h.0.mlp.c_fc.weight"].T).all()


@pytest.mark.parametrize("pretrained", [False, True])
def test_swin_names_and_thirds(pretrained: bool, tmp_path: Path) -> None:
    tensors = hf.microsoft_swin_tensors(pretrained=pretrained)
    found = converted(tmp_path, "swin", tensors, None, is_pretrain=pretrained)
    prefix = "encoder." if pretrained else ""
    fused = tensors[f"{prefix}layers.1.blocks.0.attn.qkv.weight"]
    block = "encoder.layers.1.blocks.0."
    for number, name in enumerate("qkv"):
        assert (found[f"{block}attn.{name}.weight"] == fused[8 * number : 8 * number + 8]).all()
    assert (found[f"{block}mlp.mapping.weight"] == tensors[f"{prefix}layers.1.blocks.0.mlp.fc1.weight"].T).all()
    assert found[f"{block}attn.relative_position_bias.relative_position_index"].dtype == np.int64
    assert "encoder.patch_embed.norm.gamma" in found
    assert ("decoder.weight" in found, "head.weight" in found) == (pretrained, not pretrained)


def test_legacy_llama_names_are_those_of_the_guide(tmp_path: Path) -> None:
    found = converted(
        tmp_path, "llama", hf.random_tensors(hf.llama_shapes(layers=1)), hf.decoder_config(num_hidden_layers=1)
    )
    assert sorted(found) == sorted(
        [
            "model.tok_embeddings.embedding_weight",
            *(f"model.layers.0.attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")),
            *(f"model.layers.0.feed_forward.{name}.weight" for name in ("w1", "w2", "w3")),
            "model.layers.0.attention_norm.weight",
            "model.layers.0.ffn_norm.weight",
            "model.norm_out.weight",
            "lm_head.weight",
        ]
    )


def test_fp8_is_dequantised_block_by_block_and_rounded_once(tmp_path: Path) -> None:
    """The parts of a quantised matrix that go to different tensors keep their own blocks' factors."""
    import ml_dtypes

    tensors = hf.deepseek_tensors(dtype=ml_dtypes.bfloat16)
    config = {**hf.DEEPSEEK_CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [3, 5]}}
    exact: dict[str, Any] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight") or "with_mqa" in name]:
        if "layers.2.eh_proj" in name:
            continue
        rows, columns = tensors[name].shape
        codes = (np.asarray(tensors[name], np.float32) * 64).astype(ml_dtypes.float8_e4m3fn)
        scale = np.abs(hf.random_tensor(name + "s", (-(-rows // 3), -(-columns // 5)))) / 100
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        factors = np.repeat(np.repeat(scale, 3, 0), 5, 1)[:rows, :columns]
        exact[name] = codes.astype(np.float32) * factors
    full = converted(tmp_path / "fp32", "deepseek", tensors, config, dtype="fp32")
    half = converted(tmp_path / "kept", "deepseek", tensors, config)
    assert half["model.layers.0.attention.wo.weight"].dtype == ml_dtypes.bfloat16
    output = exact["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(full["model.layers.0.attention.wo.weight"], output)
    np.testing.assert_array_equal(half["model.layers.0.attention.wo.weight"], output.astype(ml_dtypes.bfloat16))
    query = exact["model.layers.1.self_attn.q_b_proj.weight"]
    np.testing.assert_array_equal(
        full["model.layers.1.attention.l2q_pe_proj.weight"], query[[4, 6, 5, 7, 12, 14, 13, 15]]
    )
    experts = full["model.layers.1.feed_forward.routed_experts.ffn.w2"]
    np.testing.assert_array_equal(experts[7], exact["model.layers.1.mlp.experts.7.down_proj.weight"].T)
