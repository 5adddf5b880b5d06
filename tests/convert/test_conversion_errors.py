"""What cannot be converted is said in full, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface as hf
import numpy as np
import pytest

from mindformers_ckpt.convert.request import Request
from mindformers_ckpt.convert.run import convert
from mindformers_ckpt.errors import CheckpointError, ConfigError, FormatError, PlanError, PublishError
from mindformers_ckpt.execution.options import Options
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy
from mindformers_ckpt.strategy.model import Strategy


def llama(tmp_path: Path, **changes: Any) -> Path:
    return hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(**changes))


def refusal(tmp_path: Path, source: Path, error: type[CheckpointError] = PlanError, **words: Any) -> str:
    with pytest.raises(error) as caught:
        convert(Request(words.pop("model", "llama"), source, **words), tmp_path / "out" / "weights.ckpt")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_all_unknown_and_missing_names_at_once(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        tensors[f"{name}s"] = tensors.pop(name)
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    message = refusal(tmp_path, source)
    assert "missing: model.norm.weight\n" in message
    assert "missing: model.layers.1.mlp.up_proj.weight\n" in message
    assert "unknown: model.norm.weights float32[8]" in message
    assert "unknown: model.layers.1.mlp.up_proj.weights" in message


@pytest.mark.parametrize("name", ["x.model.norm.weight", "model.norm.weight.x", "model.layers.01.mlp.up_proj.weight"])
def test_names_are_anchored(name: str, tmp_path: Path) -> None:
    tensors = {**hf.random_tensors(hf.llama_shapes()), name: np.zeros(8, np.float32)}
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    assert f"unknown: {name}" in refusal(tmp_path, source)


def test_layers_beyond_config_are_not_dropped(tmp_path: Path) -> None:
    message = refusal(tmp_path, llama(tmp_path, num_hidden_layers=1))
    assert "its tensors are of 2 layers" in message
    assert "config.json says 1" in message
    assert "\n" not in message


def test_sizes_must_go_with_config(tmp_path: Path) -> None:
    message = refusal(tmp_path, llama(tmp_path, head_dim=3), naming="mcore")
    assert "q_proj.weight[16, 8]: a dimension of 16 does not go with group 2 · part 2 · dim 3" in message
    assert "(and 1 more of this form)" in message


def test_options_that_contradict_config_are_all_named(tmp_path: Path) -> None:
    message = refusal(tmp_path, llama(tmp_path), ConfigError, n_head=32, layers=12)
    assert "--n_head 32" in message
    assert "num_attention_heads 4" in message
    assert "--layers 12" in message


def test_options_that_agree_are_fine(tmp_path: Path) -> None:
    convert(Request("llama", llama(tmp_path), n_head=4, hidden_size=8, layers=2), tmp_path / "weights.ckpt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model": "llamma"}, "Known are bloom"),
        ({"telechat_type": "telechat_7b"}, "not an option of the model llama"),
        ({"use_gmm": False}, "--use_gmm is not an option of the model llama"),
        ({"model": "mixtral", "naming": "mcore"}, "mixtral has no mcore names; it has legacy"),
        ({"model": None, "hf_config": None}, "model_type 'vicuna'"),
    ],
)
def test_words_that_mean_nothing(words: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = llama(tmp_path, model_type="vicuna")
    assert said in refusal(tmp_path, source, ConfigError, **words)


def test_files_of_an_index_must_be_there(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(), shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(tmp_path, source)
    (source / "model.safetensors.index.json").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(tmp_path, source)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    source = llama(tmp_path)
    (source / "model.safetensors").rename(source / "part.safetensors")  # model.safetensors would go before the index
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    assert "outside of its folder" in refusal(tmp_path, source)


def test_damaged_files_are_all_named(tmp_path: Path) -> None:
    source = hf.write_folder(tmp_path / "source", hf.random_tensors(hf.llama_shapes()), hf.decoder_config(), shards=3)
    for number in (1, 3):
        path = source / f"model-0000{number}-of-00003.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    message = refusal(tmp_path, source, FormatError)
    assert "model-00001" in message
    assert "model-00003" in message


def test_missing_factor_of_an_fp8_tensor(tmp_path: Path) -> None:
    import ml_dtypes

    tensors = hf.random_tensors(hf.llama_shapes())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    assert f"missing: {name}_scale_inv" in refusal(tmp_path, source)


def test_parts_of_different_types_need_a_choice(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    assert "--dtype" in refusal(tmp_path, source, naming="mcore")
    convert(Request("llama", source, naming="mcore", dtype="bf16"), tmp_path / "weights.ckpt")


def test_numbers_that_do_not_fit_are_no_infinities(tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.llama_shapes())
    tensors["model.norm.weight"][3] = 1e5
    source = hf.write_folder(tmp_path / "source", tensors, hf.decoder_config())
    with pytest.raises(CheckpointError, match="100000 does not fit float16"):
        convert(Request("llama", source, dtype="fp16"), tmp_path / "out" / "weights.ckpt")
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".lock"] == []


def test_tied_tensors_must_be_equal(tmp_path: Path) -> None:
    message = refusal(tmp_path, llama(tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight is not equal to model.embed_tokens.weight" in message


def test_rank_folders_must_be_merged_first(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"model/rank_{rank}").mkdir(parents=True)
        (tmp_path / f"model/rank_{rank}/a.ckpt").write_bytes(b"")
    message = refusal(tmp_path, tmp_path / "model", reverse=True)
    assert "mindformers-ckpt transform" in message


def test_output_names_and_formats(tmp_path: Path) -> None:
    source = llama(tmp_path)
    request = Request("llama", source)
    with pytest.raises(ConfigError, match="contradicts the name"):
        convert(request, tmp_path / "weights.ckpt", format="safetensors")
    convert(request, tmp_path / "weights.ckpt")
    before = (tmp_path / "weights.ckpt").stat()
    with pytest.raises(PublishError, match="--overwrite"):
        convert(request, tmp_path / "weights.ckpt")
    assert (tmp_path / "weights.ckpt").stat() == before
    convert(request, tmp_path / "weights.ckpt", options=Options(overwrite=True))
    back = Request("llama", tmp_path / "weights.ckpt", reverse=True)
    with pytest.raises(ConfigError, match="the result is a folder"):
        convert(back, tmp_path / "back.safetensors")
    with pytest.raises(PlanError, match="holds the source file"):
        convert(request, source, options=Options(overwrite=True))


def test_the_source_is_not_replaced_by_its_result(tmp_path: Path) -> None:
    source = llama(tmp_path)
    with pytest.raises(PlanError, match="holds the source file"):
        convert(Request("llama", source), source / "model.safetensors", options=Options(overwrite=True))


def test_a_model_that_nothing_tells_is_asked_for(tmp_path: Path) -> None:
    """Backwards, to other names, and of a distributed checkpoint: where no config.json is beside the weights."""
    convert(Request("llama", llama(tmp_path)), tmp_path / "llama.ckpt")
    for words in ({"reverse": True}, {"to_naming": "mcore"}):
        message = refusal(tmp_path, tmp_path / "llama.ckpt", ConfigError, model=None, **words)
        assert message.startswith("there is no config.json that says which model this is; give its folder (--hf-config")


def test_weights_and_strategies_of_mindspore_are_told_from_models(tmp_path: Path) -> None:
    strategy = tmp_path / "strategy" / "ckpt_strategy_rank_0.ckpt"
    write_strategy({"model.norm_out.weight": Layout((1,), ((),))}, strategy)
    convert(Request("llama", llama(tmp_path)), tmp_path / "saved", format="checkpoint2")
    assert "is a strategy file; give the weights" in refusal(tmp_path, strategy, ConfigError)
    assert "what is there are strategy files; give the folder of the" in refusal(tmp_path, strategy.parent)
    assert "is a checkpoint 2.0 of MindFormers: give --reversed" in refusal(tmp_path, tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("decoder.final_layernorm.weight", "the strategy has mcore names, the result would have legacy names: give"),
        ("blocks.0.weight", "is it the strategy of a job with this model?"),
    ],
)
def test_a_strategy_of_other_names(name: str, advice: str, tmp_path: Path) -> None:
    target = Strategy.of_stages(({name: Layout((1,), ((),))},), "mine")
    with pytest.raises(PlanError) as caught:
        convert(Request("llama", llama(tmp_path)), tmp_path / "out", target=target)
    first, *others = str(caught.value).splitlines()
    assert f"lacks parameters that the target strategy (mine) has; {advice}" in first
    assert others == [f"  - {name}"]
