"""What is peculiar to a family: where the rows of an indexer go, what of a vision model is left out, and the like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest
from test_round_trips import CASES

from mindformers_ckpt.convert.model import models
from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import CheckpointError, ConfigError

INDEXER = "decoder.layers.1.self_attention.core_attention.indexer."
THEIRS = "model.layers.1.self_attn.indexer."


def converted(folder: Path, tensors: hf.Tensors, config: dict[str, Any], **words: Any) -> dict[str, Any]:
    source = hf.write_folder(folder / "source", tensors, config)
    convert(Request(None, source, **words), folder / "weights.safetensors")
    return hf.read_file(folder / "weights.safetensors")


def test_the_indexer_of_graph_mode_has_rotary_rows_last_and_in_pairs(tmp_path: Path) -> None:
    tensors = hf.deepseek_v32_tensors()
    found = converted(tmp_path, tensors, hf.DEEPSEEK_V32_CONFIG)
    # Of 12 rows of a head the first 4 are rotary, as halves (0 1)(2 3); as pairs they are 0 2 1 3.
    rows = [*range(4, 12), 0, 2, 1, 3]
    for ours, theirs in (
        ("linear_wk.weight", "wk.weight"),
        ("k_norm.gamma", "k_norm.weight"),
        ("k_norm.beta", "k_norm.bias"),
    ):
        assert np.array_equal(found[INDEXER + ours], tensors[THEIRS + theirs][rows])
    heads = tensors[f"{THEIRS}wq_b.weight"].reshape(3, 12, 6)
    assert np.array_equal(found[f"{INDEXER}linear_wq_b.weight"], heads[:, rows].reshape(36, 6))
    assert np.array_equal(found[f"{INDEXER}linear_weights_proj.weight"], tensors[f"{THEIRS}weights_proj.weight"])
    assert "mtp.layers.0.transformer_layer.self_attention.core_attention.indexer.k_norm.beta" in found


def test_the_indexer_of_pynative_mode_is_that_of_hugging_face(tmp_path: Path) -> None:
    tensors = hf.deepseek_v32_tensors()
    found = converted(tmp_path, tensors, hf.DEEPSEEK_V32_CONFIG, pynative=True)
    for ours, theirs in (("linear_wq_b.weight", "wq_b.weight"), ("k_norm.gamma", "k_norm.weight")):
        assert np.array_equal(found[INDEXER + ours], tensors[THEIRS + theirs])
    convert(Request(None, tmp_path / "weights.safetensors", True, hf_config=tmp_path / "source"), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_rotary_rows_of_an_indexer_that_do_not_divide_its_heads_are_an_error(tmp_path: Path) -> None:
    config = {**hf.DEEPSEEK_V32_CONFIG, "index_head_dim": 10}
    source = hf.write_folder(tmp_path / "source", hf.deepseek_v32_tensors(), config)
    with pytest.raises(ConfigError, match="index_head_dim 10 is not divisible by qk_rope_head_dim 4"):
        convert(Request(None, source), tmp_path / "weights.safetensors")


def test_heads_that_do_not_divide_are_told_by_their_keys(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", {}, hf.decoder_config(num_attention_heads=7, num_key_value_heads=2))
    with pytest.raises(
        ConfigError, match=r"config\.json: num_attention_heads 7 is not divisible by num_key_value_heads 2"
    ):
        convert(Request(None, source), tmp_path / "weights.safetensors")


@pytest.mark.parametrize("nested", [False, True])
def test_the_text_of_qwen2_5_vl_is_qwen2(nested: bool, tmp_path: Path) -> None:
    text = hf.random_tensors(hf.llama_shapes(bias=True))
    vision = hf.random_tensors({"visual.blocks.0.attn.qkv.weight": (6, 2), "visual.merger.ln_q.weight": (2,)})
    config = hf.decoder_config(model_type="qwen2_5_vl")
    named = {**text, **vision}
    if nested:
        config = {"model_type": "qwen2_5_vl", "text_config": hf.decoder_config(), "tie_word_embeddings": False}
        places = {"model.": "model.language_model.", "visual.": "model.visual."}
        named = {
            next((new + name[len(old) :] for old, new in places.items() if name.startswith(old)), name): array
            for name, array in named.items()
        }
    source = hf.write_folder(tmp_path / "source", named, config)
    report = convert(Request(None, source), tmp_path / "weights.safetensors")
    assert [warning for warning in report.warnings if "vision part (visual.…)" in warning]
    plain = hf.write_folder(tmp_path / "plain", text, hf.decoder_config(model_type="qwen2"))
    convert(Request(None, plain), tmp_path / "plain.safetensors")
    hf.assert_equal(hf.read_file(tmp_path / "weights.safetensors"), hf.read_file(tmp_path / "plain.safetensors"))
    back = convert(Request(None, tmp_path / "weights.safetensors", True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), text)
    assert [warning for warning in back.warnings if "vision part" in warning]


@pytest.mark.parametrize("case", CASES)
def test_rotary_frequencies_of_old_files_are_left_out(case: str, tmp_path: Path) -> None:
    model, tensors, config = CASES[case]
    prefix = next((prefix for prefix in ("model.", "transformer.") for name in tensors if name.startswith(prefix)), "")
    names = [f"{prefix}{name}" for name in ("rotary_emb", "rotary_pos_emb", "layers.0.self_attn.rotary_emb", "rope")]
    buffers = {f"{name}.inv_freq": hf.random_tensor(name, (4,)) for name in names}
    for folder, more in (("plain", {}), ("more", buffers)):
        source = hf.write_folder(tmp_path / folder, {**tensors, **more}, config)
        convert(Request(model, source), tmp_path / f"{folder}.safetensors")
    assert (tmp_path / "more.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("case", "naming"),
    [(case, naming) for case in CASES for naming in models()[CASES[case][0]].namings if "+" not in naming],
)
def test_names_tell_the_naming_on_the_way_back(case: str, naming: str, tmp_path: Path) -> None:
    model, tensors, config = CASES[case]
    source = hf.write_folder(tmp_path / "source", tensors, config)
    convert(Request(model, source, naming=naming), tmp_path / "weights.ckpt")
    folder = None if config is None else source
    convert(Request(model, tmp_path / "weights.ckpt", True, hf_config=folder), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


def test_the_first_layers_of_a_model(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(layers=4))
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config(num_hidden_layers=4))
    report = convert(Request(None, source, num_layers=2), tmp_path / "weights.ckpt")
    assert [warning for warning in report.warnings if warning.startswith("18 tensors of further layers are left out")]
    few = {name: array for name, array in tensors.items() if "layers.2" not in name and "layers.3" not in name}
    small = hf.write_folder(tmp_path / "small", few, hf.decoder_config())
    convert(Request(None, small), tmp_path / "small.ckpt")
    assert (tmp_path / "weights.ckpt").read_bytes() == (tmp_path / "small.ckpt").read_bytes()
    convert(Request(None, tmp_path / "weights.ckpt", True, hf_config=source, num_layers=2), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), few)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(CheckpointError, match=r"its tensors are of 2 layers, .* says 4; .*or --num_layers 2"):
        convert(Request(None, tmp_path / "weights.ckpt", True, hf_config=source), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"--num_layers 5: .* says 4, and only fewer can be taken"):
        convert(Request(None, source, num_layers=5), tmp_path / "more.ckpt")


@pytest.mark.parametrize("naming", ["legacy", "mcore"])
def test_prediction_layers_keep_their_place_behind_all_layers(naming: str, tmp_path: Path) -> None:
    tensors = hf.deepseek_tensors()
    source = hf.write_folder(tmp_path / "source", tensors, hf.DEEPSEEK_CONFIG)
    first = {name: array for name, array in tensors.items() if "layers.1." not in name}
    for count in (0, 1):
        weights = tmp_path / f"{count}.safetensors"
        words: dict[str, Any] = {"num_layers": 1, "num_nextn_predict_layers": count}
        convert(Request(None, source, naming=naming, **words), weights)
        convert(Request(None, weights, True, hf_config=source, **words), tmp_path / f"back{count}")
        expected = {name.replace("layers.2.", "layers.1."): array for name, array in first.items()}
        if count == 0:
            expected = {name: array for name, array in expected.items() if "layers.1." not in name}
        hf.assert_equal(hf.read_folder(tmp_path / f"back{count}"), expected)
        config = json.loads((tmp_path / f"back{count}" / "config.json").read_text())
        assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (1, count)


@pytest.mark.parametrize("model", [None, "qwen3-next"])
def test_a_model_without_a_network_is_refused_with_the_reason(model: str | None, tmp_path: Path) -> None:
    config = hf.decoder_config(model_type="qwen3_next")
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), config)
    with pytest.raises(ConfigError, match=r"MindFormers has no network of qwen3.next \(up to 2\.1\)"):
        convert(Request(model, source), tmp_path / "weights.ckpt")


@pytest.mark.parametrize(("naming", "suffix"), [("legacy", "ckpt"), ("mcore", "safetensors")])
def test_the_usual_format_of_a_folder(naming: str, suffix: str, tmp_path: Path) -> None:
    """Jobs of networks with mcore names load .safetensors files only."""
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config())
    convert(Request(None, source, naming=naming), tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").glob("ms-model*")} == {f".{suffix}"}
    convert(Request(None, source, naming=naming), tmp_path / "chosen", format="ckpt")
    assert {path.suffix for path in (tmp_path / "chosen").glob("ms-model*")} == {".ckpt"}
