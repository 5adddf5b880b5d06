"""Every layout of every model: to MindSpore and back, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest

from mindformers_ckpt.convert.model import find_model, models
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert

QWEN3_MOE = {
    **hf.llama_shapes(ffn=False),
    **{f"model.layers.{n}.self_attn.{name}_norm.weight": (4,) for n in range(2) for name in "qk"},
    "model.layers.0.mlp.gate_proj.weight": (6, 8),
    "model.layers.0.mlp.up_proj.weight": (6, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 6),
    "model.layers.1.mlp.gate.weight": (11, 8),
    **{f"model.layers.1.mlp.experts.{e}.{name}_proj.weight": (5, 8) for e in range(11) for name in ("gate", "up")},
    **{f"model.layers.1.mlp.experts.{e}.down_proj.weight": (8, 5) for e in range(11)},
}
QWEN2_MOE = {
    **{name: shape for name, shape in QWEN3_MOE.items() if "_norm.weight" not in name},
    **{
        f"model.layers.{n}.self_attn.{name}_proj.bias": (rows,)
        for n in range(2)
        for name, rows in zip("qkv", (16, 8, 8))
    },
    **{f"model.layers.1.mlp.shared_expert.{name}_proj.weight": (7, 8) for name in ("gate", "up")},
    "model.layers.1.mlp.shared_expert.down_proj.weight": (8, 7),
    "model.layers.1.mlp.shared_expert_gate.weight": (1, 8),
}
EXPERTS = {"num_experts": 11, "moe_intermediate_size": 5, "mlp_only_layers": [0]}
GLM_NATIVE = {
    name: shape
    for name, shape in hf.llama_shapes(bias=True).items()
    if "gate_proj" not in name and "up_proj" not in name
} | {
    f"model.layers.{n}.{name}": shape
    for n in range(2)
    for name, shape in {
        "mlp.gate_up_proj.weight": (12, 8),
        "post_self_attn_layernorm.weight": (8,),
        "post_mlp_layernorm.weight": (8,),
    }.items()
}
QWEN2_5_VL = {
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "text_config": {**hf.decoder_config(), "model_type": "qwen2_5_vl_text"},
}
BF16 = ml_dtypes.bfloat16

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("llama", hf.random_tensors(hf.llama_shapes()), hf.decoder_config()),
    "llama tied bf16": (
        "llama",
        hf.random_tensors(hf.llama_shapes(tied=True), BF16),
        hf.decoder_config(tie_word_embeddings=True),
    ),
    "qwen2": ("qwen", hf.random_tensors(hf.llama_shapes(bias=True)), hf.decoder_config(model_type="qwen2")),
    "qwen3_moe": (
        "qwen3_moe",
        hf.random_tensors(QWEN3_MOE, BF16),
        hf.decoder_config(model_type="qwen3_moe", **EXPERTS),
    ),
    "qwen2_moe": (
        "qwen2_moe",
        hf.random_tensors(QWEN2_MOE),
        hf.decoder_config(model_type="qwen2_moe", shared_expert_intermediate_size=7, **EXPERTS),
    ),
    "telechat3": ("telechat3", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(model_type="telechat3")),
    "telechat3_moe": ("telechat3_moe", hf.deepseek_tensors(), {**hf.DEEPSEEK_CONFIG, "model_type": "telechat3_moe"}),
    "mixtral": (
        "mixtral",
        hf.random_tensors(hf.mixtral_shapes(12, layers=2)),
        hf.decoder_config(model_type="mixtral", num_local_experts=12),
    ),
    "deepseek": ("deepseek", hf.deepseek_tensors(dtype=BF16), hf.DEEPSEEK_CONFIG),
    "deepseek without prediction layers": ("deepseek", hf.deepseek_tensors(mtp=False), hf.DEEPSEEK_CONFIG),
    "deepseek_v32": ("deepseek_v32", hf.deepseek_v32_tensors(), hf.DEEPSEEK_V32_CONFIG),
    "glm4_moe": ("glm4_moe", hf.glm_moe_tensors(), hf.GLM_MOE_CONFIG),
    "mistral": ("mistral", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(model_type="mistral")),
    "qwen2_5_vl": ("qwen2_5_vl", hf.random_tensors(hf.llama_shapes(bias=True)), QWEN2_5_VL),
    "glm native": (
        "glm-n",
        hf.random_tensors(GLM_NATIVE),
        hf.decoder_config(model_type="glm4", attention_bias=True),
    ),
    "chatglm": (
        "glm-n",
        hf.random_tensors(hf.chatglm_shapes()),
        hf.CHATGLM_CONFIG,
    ),
    "telechat_7b": ("telechat", hf.random_tensors(hf.telechat_shapes("telechat_7b")), {"n_layer": 2}),
    "telechat_12b": ("telechat", hf.random_tensors(hf.telechat_shapes("telechat_12b")), {"n_layer": 2}),
    "bloom": ("bloom", hf.random_tensors(hf.bloom_shapes()), {"n_layer": 2, "n_head": 2, "hidden_size": 8}),
    "gpt2": ("gpt2", hf.random_tensors(hf.gpt2_shapes()), {"n_layer": 2, "n_embd": 8}),
    "swin": ("swin", hf.microsoft_swin_tensors(), None),
    "swin pre-training": ("swin", hf.microsoft_swin_tensors(pretrained=True), None),
}


def runs() -> list[Any]:
    found = []
    for case, (name, _, _) in CASES.items():
        model = find_model(name)
        assert model is not None
        found += [pytest.param(case, naming, id=f"{case}-{naming}") for naming in model.namings]
    return found


@pytest.mark.parametrize(("case", "naming"), runs())
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_there_and_back(case: str, naming: str, suffix: str, tmp_path: Path) -> None:
    name, tensors, config = CASES[case]
    source = hf.write_folder(tmp_path / "source", tensors, config, shards=3)
    words: dict[str, Any] = {"naming": naming.partition("+")[0], "qkv_concat": "+" in naming or None}
    if "+" in naming and suffix == "ckpt":  # which can record nothing
        words |= {"use_contiguous_weight_layout_attention": False, "use_interleaved_weight_layout_mlp": True}
    weights = tmp_path / f"weights.{suffix}"
    convert(Request(name, source, **words), weights)
    folder = source if config is not None else None
    convert(Request(name, weights, reverse=True, hf_config=folder, **words), tmp_path / "back", shard_bytes=700)
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()


def test_experts_of_qwen2_for_training_with_grouped_multiplication(tmp_path: Path) -> None:
    _, tensors, config = CASES["qwen2_moe"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(None, source, use_gmm_training=True), tmp_path / "weights.ckpt")
    found, ours = hf.read_file(tmp_path / "weights.ckpt"), "model.layers.1.feed_forward.routed_experts."
    for expert in range(11):
        gate, up = (tensors[f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"].T for part in ("gate", "up"))
        assert np.array_equal(found[f"{ours}ffn.w1"][expert], np.concatenate([gate, up], axis=1))
    assert f"{ours}router_dense.weight" in found
    # Names tell it on the way back.
    convert(Request(None, tmp_path / "weights.ckpt", True, hf_config=tmp_path / "source"), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


@pytest.mark.parametrize("use_gmm", [False, True])
def test_experts_of_qwen2(use_gmm: bool, tmp_path: Path) -> None:
    _, tensors, config = CASES["qwen2_moe"]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(None, source, use_gmm=use_gmm), tmp_path / "weights.safetensors")
    found, ours = hf.read_file(tmp_path / "weights.safetensors"), "model.layers.1.feed_forward."
    for ms, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        theirs = np.stack([tensors[f"model.layers.1.mlp.experts.{expert}.{name}.weight"] for expert in range(11)])
        expected = theirs.transpose(0, 2, 1) if use_gmm else theirs
        assert np.array_equal(found[f"{ours}routed_experts.ffn.{ms}.weight"], expected)
        shared = tensors[f"model.layers.1.mlp.shared_expert.{name}.weight"]
        assert np.array_equal(found[f"{ours}shared_experts.{ms}.weight"], shared)
    assert f"{ours}routed_experts.router.dense.weight" in found
    assert f"{ours}shared_experts_gate.weight" in found
    convert(Request(None, tmp_path / "weights.safetensors", True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_every_model_is_here_or_among_the_models_of_transformers() -> None:
    here = {name for name, _, _ in CASES.values()}
    assert set(models()) - here == {"qwen3", "wizardcoder"}


def test_a_folder_of_files_of_bounded_size_is_read_back(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    result = convert(Request("llama", source), tmp_path / "out", shard_bytes=1000, format="safetensors")
    assert result.files > 3
    assert all(path.stat().st_size < 2000 for path in (tmp_path / "out").glob("*.safetensors"))
    convert(Request("llama", tmp_path / "out", reverse=True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_several_processes_write_the_same(tmp_path: Path) -> None:
    from mindformers_ckpt.execution.options import Options

    shapes = {name: tuple(4 * extent for extent in shape) for name, shape in hf.llama_shapes().items()}
    config = hf.decoder_config(hidden_size=32, head_dim=16, intermediate_size=24, vocab_size=48)
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(shapes), config)
    for processes in (1, 2):
        request = Request("llama", source, naming="mcore")
        convert(request, tmp_path / f"{processes}.ckpt", options=Options(processes=processes))
    assert (tmp_path / "1.ckpt").read_bytes() == (tmp_path / "2.ckpt").read_bytes()


def test_large_transposes_are_cut_into_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mindformers_ckpt.engine import tasks

    monkeypatch.setattr(tasks, "TRANSPOSE_BYTES", 96)
    monkeypatch.setattr(tasks, "BLOCK_BYTES", 64)
    tensors = hf.deepseek_tensors()
    source = hf.write_folder(tmp_path / "source", tensors, hf.DEEPSEEK_CONFIG)
    convert(Request("deepseek", source), tmp_path / "weights.ckpt")
    convert(Request("deepseek", tmp_path / "weights.ckpt", reverse=True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_empty_source_values_are_kept(tmp_path: Path) -> None:
    """Not a number and infinity are data too."""
    tensors = hf.random_tensors(hf.llama_shapes())
    tensors["model.norm.weight"] = np.array([np.nan, np.inf, -np.inf, -0.0, 1, 2, 3, 4], np.float32)
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    convert(Request("llama", source, dtype="bf16"), tmp_path / "weights.ckpt")
    norm = hf.read_file(tmp_path / "weights.ckpt")["model.norm_out.weight"].astype(np.float32)
    np.testing.assert_array_equal(norm, tensors["model.norm.weight"])
