"""One cause, one line, one next step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest
from dcp_files import SAMPLES

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import CheckpointError

LLAMA = hf.random_tensors(hf.llama_shapes())
CONFIG = hf.decoder_config()


def refusal(request: Request, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def in_the_middle(name: str, wrapper: str) -> str:
    return name.replace("model.", f"model.{wrapper}", 1)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod."])
def test_a_common_prefix_is_offered_and_stripped(prefix: str, tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", {prefix + name: array for name, array in LLAMA.items()}, CONFIG)
    message = refusal(Request("llama", source), tmp_path)
    assert message.count("\n") == 0
    assert message.endswith(f"give --strip_prefix {prefix}")
    plain = hf.write_folder(tmp_path / "plain", LLAMA, CONFIG)
    convert(Request("llama", source, strip_prefix=prefix), tmp_path / "stripped.ckpt")
    convert(Request("llama", plain), tmp_path / "plain.ckpt")
    assert (tmp_path / "stripped.ckpt").read_bytes() == (tmp_path / "plain.ckpt").read_bytes()


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_a_wrapper_in_the_middle_of_names(wrapper: str, tmp_path: Path) -> None:
    tensors = {in_the_middle(name, wrapper): array for name, array in LLAMA.items()}
    source = hf.write_folder(tmp_path / "source", tensors, CONFIG)
    assert refusal(Request("llama", source), tmp_path).endswith(f"give --strip_prefix {wrapper}")
    assert convert(Request("llama", source, strip_prefix=wrapper), tmp_path / "w.ckpt").tensors == len(LLAMA)


def test_mindspore_names_have_prefixes_too(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG)
    convert(Request("llama", source), tmp_path / "plain.safetensors")
    tensors = {f"network.{name}": array for name, array in hf.read_file(tmp_path / "plain.safetensors").items()}
    hf.write_safetensors(tmp_path / "wrapped.safetensors", tensors)
    request = Request("llama", tmp_path / "wrapped.safetensors", True, hf_config=source)
    assert refusal(request, tmp_path).endswith("give --strip_prefix network.")


def test_a_prefix_that_no_tensor_has(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG)
    assert "no tensor of" in refusal(Request("llama", source, strip_prefix="module."), tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_reversed_on_a_hugging_face_folder(shards: int, tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG, shards=shards)
    message = refusal(Request("llama", source, True), tmp_path)
    assert message.count("\n") == 0
    assert message.endswith("to convert it to MindSpore leave --reversed out")
    bare = hf.write_folder(tmp_path / "bare", LLAMA, None, shards=shards)  # names tell it then
    message = refusal(Request("llama", bare, True, hf_config=source), tmp_path)
    assert message.endswith("holds Hugging Face weights, by the names of its tensors; leave --reversed out")


@pytest.mark.parametrize("naming", ["legacy", "mcore"])
def test_mindspore_weights_without_reversed(naming: str, tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG)
    for name in ("weights.safetensors", "weights.ckpt"):
        convert(Request("llama", source, naming=naming), tmp_path / name)
        message = refusal(Request("llama", tmp_path / name, hf_config=source), tmp_path)
        assert message.count("\n") == 0
        assert "give --reversed" in message


def test_another_model_type_that_does_not_fit(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes(bias=True))
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config(model_type="qwen2"))
    message = refusal(Request("llama", source), tmp_path)
    assert "model_type 'qwen2', --model llama is for llama: leave --model out" in message
    assert message.count("\n") == 3  # a line for each bias, not for each layer


def test_another_model_type_that_fits_is_a_warning(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, hf.decoder_config(model_type="mistral"))
    (line,) = convert(Request("llama", source), tmp_path / "weights.ckpt").warnings
    assert "model_type 'mistral'" in line


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json"], "no weights: were they left out"),
        (["config.json", "model.gguf"], r"GGUF (model.gguf)"),
        (["config.json", "tf_model.h5"], "from_tf=True"),
        (["flax_model.msgpack"], "from_flax=True"),
        (["model.ckpt"], "give --reversed"),
        (["model-00001-of-00002.safetensors.incomplete"], "download it again"),
        ([], "a cloned Hugging Face repository"),
    ],
)
def test_a_folder_without_known_weights(files: list[str], said: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in files:
        (source / name).write_text("{}")
    message = refusal(Request("llama", source), tmp_path)
    assert "holds no .safetensors, .bin, .pth or .pt file" in message
    assert said in message


def test_a_folder_of_checkpoints_names_them(tmp_path: Path) -> None:
    hf.write_folder(tmp_path / "runs/checkpoint-500", LLAMA, CONFIG)
    shutil.copytree(SAMPLES / "fsdp2", tmp_path / "runs/checkpoint-1000")
    (tmp_path / "runs/logs").mkdir()
    message = refusal(Request("llama", tmp_path / "runs"), tmp_path)
    assert message.endswith(f"give {tmp_path / 'runs/checkpoint-1000'} or {tmp_path / 'runs/checkpoint-500'}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("llama", "there is nothing at .*llama .*Did you mean 'llama3'"),
        ("llama3", "holds no config.json; give the folder"),
    ],
)
def test_where_the_config_should_be(given: str, said: str, tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG)
    (tmp_path / "llama3").mkdir()
    assert re.search(said, refusal(Request("llama", source, hf_config=tmp_path / given), tmp_path))


def test_rank_folders_without_reversed(tmp_path: Path) -> None:
    (tmp_path / "source/rank_0").mkdir(parents=True)
    assert "mindformers-ckpt transform" in refusal(Request("llama", tmp_path / "source"), tmp_path)


@pytest.mark.parametrize("words", [{}, {"naming": "mcore"}])
def test_names_tell_the_naming(words: dict[str, Any], tmp_path: Path) -> None:
    """A .ckpt file can record nothing."""
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG)
    convert(Request("llama", source, **words), tmp_path / "weights.ckpt")
    result = convert(Request("llama", tmp_path / "weights.ckpt", True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), LLAMA)
    assert result.naming == words.get("naming", "legacy")
    other = "legacy" if words.get("naming") else "mcore"
    message = refusal(Request("llama", tmp_path / "weights.ckpt", True, naming=other, hf_config=source), tmp_path)
    assert f"not {other}; leave --naming" in message


def test_no_more_than_twenty_lines(tmp_path: Path) -> None:
    tensors = {**LLAMA, **{f"a{number}": np.zeros(1, np.float32) for number in range(100)}}
    source = hf.write_folder(tmp_path / "source", tensors, CONFIG)
    lines = refusal(Request("llama", source), tmp_path).splitlines()
    assert len(lines) == 22
    assert lines[-1].endswith("and 80 more")


@pytest.mark.parametrize("model", ["gpt2", "bloom", "wizardcoder"])
def test_an_output_layer_of_its_own(model: str, tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.bloom_shapes() if model == "bloom" else hf.gpt2_shapes())
    config: dict[str, Any] = {"n_layer": 2, "n_embd": 8, "hidden_size": 8, "n_head": 2, "tie_word_embeddings": False}
    if model == "wizardcoder":
        tensors = {
            name: array.T if "c_fc.weight" in name or "c_attn.weight" in name or "mlp.c_proj.weight" in name else array
            for name, array in tensors.items()
        }
        config["multi_query"] = False
    tensors["lm_head.weight"] = hf.random_tensor("lm_head", (hf.VOCABULARY, hf.HIDDEN))
    source = hf.write_folder(tmp_path / "source", tensors, config)
    result = convert(Request(model, source), tmp_path / "weights.safetensors")
    found = hf.read_file(tmp_path / "weights.safetensors")
    name = "head.head_weight" if model == "wizardcoder" else "head.weight"
    assert found[name].tobytes() == tensors["lm_head.weight"].tobytes()
    # MindFormers' networks of the other two have no place for it.
    assert len(result.warnings) == (0 if model == "wizardcoder" else 1)
    convert(Request(model, tmp_path / "weights.safetensors", True, hf_config=source), tmp_path / "back")
    hf.assert_equal(hf.read_folder(tmp_path / "back"), tensors)


@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe"])
def test_a_model_with_experts_that_config_does_not_count(model: str, tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", LLAMA, CONFIG)
    message = refusal(Request(model, source), tmp_path)
    assert message.startswith(f"config.json says model_type 'llama', --model {model} is for ")
    assert "leave --model out, or choose another" in message


def test_a_misspelt_folder_gets_a_suggestion(tmp_path: Path) -> None:
    hf.write_folder(tmp_path / "Llama-3.1-8B", LLAMA, CONFIG)
    message = refusal(Request("llama", tmp_path / "Llama-3.1-8b"), tmp_path)
    assert message.endswith("Did you mean 'Llama-3.1-8B'?")
