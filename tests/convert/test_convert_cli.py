"""The command line: the guide's commands as they stand, and what the report says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface as hf
import pytest
from click.testing import CliRunner, Result

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = hf.random_tensors(hf.llama_shapes())
    return hf.write_folder(tmp_path / "torch_weights", tensors, hf.decoder_config(), shards=2)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_the_guides_command(source: Path, tmp_path: Path) -> None:
    tool = str(Path(__file__).parents[2] / "tools" / "convert_weight.py")
    output = tmp_path / "ms_weights" / "llama.ckpt"
    words = ["--model", "llama", "--input_path", str(source), "--output_path", str(output)]
    result = subprocess.run([sys.executable, tool, *words], capture_output=True, text=True, check=True)
    assert "21 tensors" in result.stdout
    assert len(hf.read_file(output)) == 21
    back = [*words[:2], "--reversed", "--input_path", str(output), "--output_path", str(tmp_path / "back")]
    subprocess.run([sys.executable, tool, *back], capture_output=True, text=True, check=True)
    hf.assert_equal(hf.read_folder(tmp_path / "back"), hf.read_folder(source))


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json"])
def test_the_input_may_be_a_file_of_the_folder(file: str, source: Path, tmp_path: Path) -> None:
    result = run("--model", "llama", "--input_path", source / file, "--output_path", tmp_path / "a.ckpt")
    assert result.exit_code == 0, result.output
    assert len(hf.read_file(tmp_path / "a.ckpt")) == 21


def test_the_model_is_told_by_config(source: Path, tmp_path: Path) -> None:
    result = run("--input-path", source, "--output-path", tmp_path / "out", "--format", "safetensors", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["model"] == "llama"
    assert report["naming"] == "legacy"
    assert report["tensors"] == 21
    assert report["destination"] == str(tmp_path / "out")
    names = json.loads((tmp_path / "out" / "param_name_map.json").read_bytes())
    assert names["model.norm_out.weight"] == "ms-model.safetensors"


@pytest.mark.parametrize(
    ("words", "naming"),
    [
        (["--qkv_concat"], "legacy+qkv_concat"),
        (["--qkv_concat", "True"], "legacy+qkv_concat"),
        (["--qkv-concat=false"], "legacy"),
        ([], "legacy"),
    ],
)
def test_qkv_concat_stands_alone_or_with_a_value(words: list[str], naming: str, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "weights.safetensors"
    result = run(*words, "--model", "llama", "--input_path", source, "--output_path", output, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["naming"] == naming
    assert ("model.layers.0.attention.w_qkv.weight" in hf.read_file(output)) is ("+" in naming)


@pytest.mark.parametrize("output", ["weights.safetensors", "folder"])
def test_the_settings_of_a_layout_are_recorded_and_known_on_the_way_back(output: str, tmp_path: Path) -> None:
    tensors = hf.random_tensors(hf.mixtral_shapes(3))
    config = hf.decoder_config(num_hidden_layers=1, num_local_experts=3, model_type="mixtral")
    source = hf.write_folder(tmp_path / "source", tensors, config)
    made, back = tmp_path / output, tmp_path / "back"
    result = run("--use_gmm", "true", "--input_path", source, "--output_path", made)
    assert result.exit_code == 0, result.output
    assert "legacy+use_gmm names" in result.output
    if made.is_file():
        assert read_header(made).metadata["naming"] == "legacy+use_gmm"
    reversed_ = ("--reversed", "--input_path", made, "--output_path", back, "--hf_config", source)
    result = run(*reversed_, "--use_gmm", "false")
    assert result.exit_code == 1
    assert f"{made} says that its names and layout are legacy+use_gmm, the options say legacy\n" in result.output
    result = run(*reversed_)
    assert result.exit_code == 0, result.output
    hf.assert_equal(hf.read_folder(back), tensors)


def test_one_pass_for_a_strategy(source: Path, tmp_path: Path) -> None:
    layouts = {"model.layers.0.attention.wq.weight": Layout.on({"mp": 2}, "mp", None)}
    write_strategy(layouts, tmp_path / "strategy.ckpt")
    result = run(
        "--input_path", source, "--output_path", tmp_path / "out", "--dst_strategy", tmp_path / "strategy.ckpt"
    )
    assert result.exit_code == 0, result.output
    for rank in (0, 1):
        found = hf.read_file(tmp_path / "out" / f"rank_{rank}" / f"checkpoint_{rank}.ckpt")
        assert found["model.layers.0.attention.wq.weight"].shape == (8, 8)
        assert found["model.layers.0.attention.wk.weight"].shape == (8, 8)


@pytest.mark.parametrize(
    "words", [["--dtype", "fp8"], ["--naming", "megatron"], ["--layers", "many"], ["--is_pretrain", "x"]]
)
def test_words_that_mean_nothing_are_usage_errors(words: list[str], source: Path, tmp_path: Path) -> None:
    result = run("--input_path", source, "--output_path", tmp_path / "a.ckpt", *words)
    assert result.exit_code == 2
    assert not (tmp_path / "a.ckpt").exists()


def test_errors_have_exit_code_1(source: Path, tmp_path: Path) -> None:
    result = run("--model", "qwen", "--input_path", source, "--output_path", tmp_path / "a.ckpt")
    assert result.exit_code == 1
    assert "missing: model.layers.0.self_attn.q_proj.bias" in result.output
    assert not (tmp_path / "a.ckpt").exists()


def test_a_model_that_goes_there_and_back_is_the_same_by_diff_and_fingerprint(source: Path, tmp_path: Path) -> None:
    """The files are cut in another way; as whole tensors both are one."""
    assert run("--input-path", source, "--output-path", tmp_path / "llama.ckpt").exit_code == 0
    back = ("--reversed", "--model", "llama", "--input-path", tmp_path / "llama.ckpt", "--hf-config", source)
    made = run(*back, "--output-path", tmp_path / "back", "--fingerprint", "--json")
    found = CliRunner().invoke(cli, ["diff", str(source), str(tmp_path / "back")])
    assert found.exit_code == 0, found.output
    assert "21 tensors are equal bit for bit, 0 differ; 0 only in A, 0 only in B" in found.output
    printed = CliRunner().invoke(cli, ["fingerprint", str(source), "--quiet"]).output
    assert json.loads(made.stdout)["fingerprints"] == {".": printed.split()[0]}
    checked = CliRunner().invoke(cli, ["verify", str(tmp_path / "back")])
    assert "21 of 21 tensors: fingerprint" in checked.output
    assert checked.exit_code == 0
    other = CliRunner().invoke(cli, ["verify", str(tmp_path / "llama.ckpt"), "--against", str(source)])
    assert other.exit_code == 1
    assert "convert the source once more" in other.output
