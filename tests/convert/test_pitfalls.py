"""The defects of existing converters (numbers as in the collection of pitfalls), each done right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface as hf
import ml_dtypes
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import CheckpointError, PlanError
from mindformers_ckpt.formats import read_header


def weights(tmp_path: Path, model: str, tensors: Any, config: Any, suffix: str = "ckpt", **words: Any) -> Path:
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(model, source, **words), tmp_path / f"weights.{suffix}")
    return tmp_path / f"weights.{suffix}"


def back(tmp_path: Path, model: str, path: Path, **words: Any) -> dict[str, Any]:
    convert(Request(model, path, reverse=True, **words), tmp_path / "back")
    return hf.read_folder(tmp_path / "back")


# 1, 3: every model takes the same call in both directions. That is tests/convert/test_round_trips.py.


def test_3_the_cause_is_told_and_the_exit_code_is_not_0(tmp_path: Path) -> None:
    tool = Path(__file__).parents[2] / "tools" / "convert_weight.py"
    command = [sys.executable, str(tool), "--model", "llama", "--input_path", str(tmp_path / "nothing")]
    result = subprocess.run([*command, "--output_path", str(tmp_path / "o.ckpt")], capture_output=True, text=True)
    assert result.returncode == 1
    assert "there is nothing at" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("experts", [3, 8, 12, 101])
def test_4_any_number_of_experts_in_the_order_of_their_numbers(experts: int, tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.mixtral_shapes(experts))
    config = hf.decoder_config(num_hidden_layers=1, num_local_experts=experts)
    path = weights(tmp_path, "mixtral", tensors, config)
    found = hf.read_file(path)["model.layers.0.feed_forward.ffn.w2.weight"]
    assert (found[experts - 1] == tensors[f"model.layers.0.block_sparse_moe.experts.{experts - 1}.w2.weight"]).all()
    hf.assert_equal(back(tmp_path, "mixtral", path, hf_config=tmp_path / "source"), tensors)


def test_5_glm_is_not_permuted_on_the_way_back(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.chatglm_shapes())
    config = {"model_type": "chatglm", "num_layers": 2}
    path = weights(tmp_path, "glm-n", tensors, config)
    hf.assert_equal(back(tmp_path, "glm-n", path), tensors)


def test_6_qkv_concat_with_a_head_dim_of_its_own_and_the_layout_on_record(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    config = hf.decoder_config()
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]
    path = weights(tmp_path, "llama", tensors, config, "safetensors", qkv_concat=True)
    assert read_header(path).metadata["naming"] == "legacy+qkv_concat"
    hf.assert_equal(back(tmp_path, "llama", path, qkv_concat=True, hf_config=tmp_path / "source"), tensors)


def test_7_the_bias_of_qkv_has_the_order_of_its_weight(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(bias=True))
    for name in [name for name in tensors if name.endswith("_proj.bias")]:
        tensors[name] = tensors[f"{name[: -len('bias')]}weight"][:, 0].copy()
    found = hf.read_file(weights(tmp_path, "qwen", tensors, hf.decoder_config(), qkv_concat=True))
    for n in range(2):
        name = f"model.layers.{n}.attention.w_qkv."
        assert (found[f"{name}weight"][:, 0] == found[f"{name}bias"]).all()


def test_8_bf16_stays_what_it_is_and_the_source_is_not_touched(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(bias=True), ml_dtypes.bfloat16)
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config(model_type="qwen2"))
    (source / "adapter_config.json").write_text('{"target_modules": ["q_proj"]}')
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    convert(Request("qwen", source), tmp_path / "weights.ckpt")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    found = hf.read_file(tmp_path / "weights.ckpt")
    assert {array.dtype for array in found.values()} == {np.dtype(ml_dtypes.bfloat16)}
    q = tensors["model.layers.1.self_attn.q_proj.weight"]
    assert found["model.layers.1.attention.wq.weight"].tobytes() == q.tobytes()


def test_9_files_without_an_index_are_all_read(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.deepseek_tensors(), hf.DEEPSEEK_CONFIG, shards=4)
    (source / "model.safetensors.index.json").unlink()
    convert(Request("deepseek", source), tmp_path / "weights.ckpt")
    convert(Request("deepseek", tmp_path / "weights.ckpt", reverse=True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), hf.deepseek_tensors())


def test_9_prediction_layers_do_not_overwrite_the_embedding(tmp_path: Path) -> None:
    """A repeated tensor that differs from the main one is an error, and no `mtp.output_layer` is made up."""
    tensors = hf.deepseek_tensors()
    path = weights(tmp_path, "deepseek", tensors, hf.DEEPSEEK_CONFIG, naming="mcore")
    names = set(read_header(path).tensors)
    assert not any("output_layer" in name or "embed" in name for name in names if name.startswith("mtp"))
    tensors["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] + 1
    source = hf.write_folder(tmp_path / "other", tensors, hf.DEEPSEEK_CONFIG)
    with pytest.raises(PlanError, match=r"layers\.2\.embed_tokens\.weight is not equal to model"):
        convert(Request("deepseek", source), tmp_path / "other.ckpt")


def test_9_nothing_of_one_conversion_is_left_for_the_next(tmp_path: Path) -> None:
    path = weights(tmp_path, "deepseek", hf.deepseek_tensors(), hf.DEEPSEEK_CONFIG)
    first = path.read_bytes()
    smaller = {**hf.DEEPSEEK_CONFIG, "num_hidden_layers": 1, "num_nextn_predict_layers": 0}
    tensors = {name: array for name, array in hf.deepseek_tensors().items() if ".1." not in name and ".2." not in name}
    tensors = {name: array for name, array in tensors.items() if "layers.1" not in name and "layers.2" not in name}
    convert(Request("deepseek", hf.write_folder(tmp_path / "s", tensors, smaller)), tmp_path / "smaller.ckpt")
    convert(Request("deepseek", tmp_path / "source"), tmp_path / "again.ckpt")
    assert (tmp_path / "again.ckpt").read_bytes() == first


@pytest.mark.parametrize("naming", ["legacy", "mcore"])
def test_9_router_bias_and_norms_are_not_narrowed(naming: str, tmp_path: Path) -> None:
    path = weights(tmp_path, "deepseek", hf.deepseek_tensors(), hf.DEEPSEEK_CONFIG, naming=naming, dtype="bf16")
    specs = {name: record.spec.dtype.name for name, record in read_header(path).tensors.items()}
    wide = {name for name, dtype in specs.items() if dtype == "float32"}
    assert {name for name in specs if name.endswith(("topk_bias", "expert_bias"))} <= wide
    if naming == "legacy":
        assert "model.layers.1.feed_forward.routed_experts.router_dense.weight" in wide
        assert {name for name in specs if "layers" in name and name.endswith("norm.weight")} <= wide
    else:
        assert len(wide) == 2


def test_10_the_router_has_its_hugging_face_name(tmp_path: Path) -> None:
    import test_round_trips

    name, tensors, config = test_round_trips.CASES["qwen3_moe"]
    path = weights(tmp_path, name, tensors, config)
    assert "decoder.layers.1.mlp.router.weight" in read_header(path).tensors
    found = back(tmp_path, name, path, hf_config=tmp_path / "source")
    assert "model.layers.1.mlp.gate.weight" in found
    assert not any("router" in name for name in found)


@pytest.mark.parametrize("word", ["False", "false", "0", "no"])
def test_11_is_pretrain_false_is_false(word: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from mindformers_ckpt.cli.main import cli

    source = hf.write_folder(tmp_path / "source", hf.microsoft_swin_tensors(), None)
    arguments = ["convert", "--model", "swin", "--input_path", str(source), "--is_pretrain", word]
    result = CliRunner().invoke(cli, [*arguments, "--output_path", str(tmp_path / "weights.ckpt")])
    assert result.exit_code == 0, result.output
    assert "head.weight" in read_header(tmp_path / "weights.ckpt").tensors


def test_11_no_layer_of_gpt2_is_lost(tmp_path: Path) -> None:
    """Without config.json layers are counted; a number that is too small is an error."""
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.gpt2_shapes(layers=14)), None)
    with pytest.raises(PlanError, match="14 layers, --layers says 12"):
        convert(Request("gpt2", source, layers=12), tmp_path / "weights.ckpt")
    result = convert(Request("gpt2", source), tmp_path / "weights.ckpt")
    assert "backbone.blocks.13.layernorm1.gamma" in read_header(tmp_path / "weights.ckpt").tensors
    assert "num_hidden_layers 14" in result.warnings[0]


@pytest.mark.parametrize("spelling", ["tk_delta_lora", "mindpet_delta_lora"])
def test_12_lora_names_have_their_dot(spelling: str, tmp_path: Path) -> None:
    path = weights(tmp_path, "llama", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(), "safetensors")
    tensors = hf.read_file(path)
    for end, shape in (("a", (2, 8)), ("b", (16, 2))):
        name = f"model.layers.1.attention.wq.{spelling}_{end}"
        tensors[name] = hf.random_tensor(end, shape)
    hf.write_safetensors(path, tensors)
    found = back(tmp_path, "llama", path, hf_config=tmp_path / "source")
    for end in "AB":
        name = f"model.layers.1.self_attn.q_proj.lora_{end}.weight"
        assert (found[name] == tensors[f"model.layers.1.attention.wq.{spelling}_{end.lower()}"]).all()


def test_12_half_an_adapter_is_missing_its_other_half(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = hf.random_tensor("a", (2, 8))
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    with pytest.raises(PlanError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.lora_B\.weight"):
        convert(Request("llama", source), tmp_path / "weights.ckpt")


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_12_bloom_has_no_prefix_in_mindspore_and_has_it_in_hugging_face(prefix: str, tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.bloom_shapes(prefix))
    path = weights(tmp_path, "bloom", tensors, None, n_head=2, hidden_size=8)
    assert "blocks.1.layernorm1.gamma" in read_header(path).tensors
    named = {f"transformer.{name.removeprefix('transformer.')}": array for name, array in tensors.items()}
    hf.assert_equal(back(tmp_path, "bloom", path, n_head=2, hidden_size=8), named)


def test_12_bloom_with_the_prefix_of_other_converters(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.bloom_shapes())
    path = weights(tmp_path, "bloom", tensors, None, n_head=2, hidden_size=8)
    theirs = {f"transformer.{name}": array for name, array in hf.read_file(path).items()}
    hf.write_safetensors(tmp_path / "theirs.safetensors", theirs)
    found = back(tmp_path, "bloom", tmp_path / "theirs.safetensors", n_head=2, hidden_size=8)
    hf.assert_equal(found, tensors)


@pytest.mark.parametrize("kind", ["telechat_7b", "telechat_12b"])
def test_12_telechat_keeps_its_prefix_on_layers(kind: str, tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.telechat_shapes(kind))
    path = weights(tmp_path, "telechat", tensors, None, telechat_type=kind)
    hf.assert_equal(back(tmp_path, "telechat", path, telechat_type=kind), tensors)


def test_12_the_wrong_kind_of_telechat_is_noticed(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.telechat_shapes("telechat_12b")), None)
    with pytest.raises(PlanError, match=r"missing: word_embeddings\.weight"):
        convert(Request("telechat", source, telechat_type="telechat_7b"), tmp_path / "weights.ckpt")
    with pytest.raises(CheckpointError, match="known are telechat_7b, telechat_12b"):
        convert(Request("telechat", source, telechat_type="telechat_115b"), tmp_path / "weights.ckpt")


def test_13_grouped_queries_with_biases(tmp_path: Path) -> None:
    """8 queries, 2 keys: the bias of a query tensor is four times that of a key."""
    tensors = hf.random_tensors(hf.llama_shapes(bias=True))
    path = weights(tmp_path, "qwen", tensors, hf.decoder_config(), naming="mcore")
    assert hf.read_file(path)["decoder.layers.0.self_attention.linear_qkv.bias"].shape == (32,)
    hf.assert_equal(back(tmp_path, "qwen", path, naming="mcore", hf_config=tmp_path / "source"), tensors)


def test_13_fp32_is_cast_when_bf16_is_asked_for(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    found = hf.read_file(weights(tmp_path, "llama", tensors, hf.decoder_config(), naming="mcore", dtype="bf16"))
    gate = tensors["model.layers.0.mlp.gate_proj.weight"].astype(ml_dtypes.bfloat16)
    assert {array.dtype for array in found.values()} == {gate.dtype}
    assert (found["decoder.layers.0.mlp.linear_fc1.weight"][::2] == gate).all()


def test_14_the_way_back_makes_a_repository(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(), shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"):
        (source / name).write_text(name)
    convert(Request("llama", source), tmp_path / "weights.ckpt")
    request = Request("llama", tmp_path / "weights.ckpt", reverse=True, hf_config=source)
    convert(request, tmp_path / "back", shard_bytes=2000)
    names = {path.name for path in (tmp_path / "back").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt"} <= names
    assert "chat_template.jinja" in names
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_bytes())
    places = {name: path.name for path in (tmp_path / "back").glob("*.safetensors") for name in hf.read_file(path)}
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in hf.read_folder(tmp_path / "back").values())
    assert {read_header(path).metadata["format"] for path in (tmp_path / "back").glob("*.safetensors")} == {"pt"}


def test_14_dequantised_weights_are_not_called_quantised(tmp_path: Path) -> None:
    config = {**hf.DEEPSEEK_CONFIG, "quantization_config": {"weight_block_size": [128, 128]}, "torch_dtype": "float16"}
    path = weights(tmp_path, "deepseek", hf.deepseek_tensors(), config)
    back(tmp_path, "deepseek", path, hf_config=tmp_path / "source", dtype="bf16")
    written = json.loads((tmp_path / "back" / "config.json").read_bytes())
    assert written == {**hf.DEEPSEEK_CONFIG, "torch_dtype": "bfloat16"}


def test_tied_output_layers_are_written_when_asked_for(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(tied=True))
    config = hf.decoder_config(tie_word_embeddings=True)
    plain = weights(tmp_path / "plain", "llama", tensors, config)
    asked = weights(tmp_path / "asked", "llama", tensors, config, write_tied=True)
    assert "lm_head.weight" not in read_header(plain).tensors
    assert (hf.read_file(asked)["lm_head.weight"] == tensors["model.embed_tokens.weight"]).all()
    hf.assert_equal(back(tmp_path, "llama", asked, hf_config=tmp_path / "asked" / "source"), tensors)


def test_neither_torch_nor_transformers_nor_mindspore_is_imported(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config())
    code = (
        "import sys; from pathlib import Path; from mindformers_ckpt.convert.run import Request, convert;"
        f"convert(Request('llama', Path({str(source)!r}), dtype='bf16'), Path({str(tmp_path / 'w.ckpt')!r}));"
        "print([name for name in ('torch', 'transformers', 'mindspore', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
