"""Converters of users: written as the guide's Llama example, found by name, called in both styles."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.convert import plugins

# The guide's example with its heavy libraries replaced: the same functions, parameters and results.
FORWARD = '''
import json, os
from names import name_replace

def convert_pt_to_ms(input_path, output_path, dtype=None, **kwargs):
    """convert hf weight to ms."""
    print(f"Trying to convert huggingface checkpoint in '{input_path}'.", flush=True)
    try:
        with open(os.path.join(os.path.dirname(input_path), "weights.json")) as file:
            model_hf = json.load(file)
    except Exception as e:
        print(f"Do not find huggingface checkpoint in '{os.path.dirname(input_path)}', Error {e}.", flush=True)
        return False
    ckpt_list = []
    for name, value in model_hf.items():
        name = name_replace(name)
        if name == 'norm.weight':
            name = 'norm_out.weight'
        print(f'\\rprocessing parameter: {name} ', end='', flush=True)
        ckpt_list.append({'name': name, 'data': value})
    with open(output_path, "w") as file:
        json.dump({"weights": ckpt_list, "dtype": dtype, "kwargs": kwargs}, file)
    return True
'''
REVERSED = """
import json

def convert_ms_to_pt(input_path, output_path, dtype=None, **kwargs):
    with open(output_path, "w") as file:
        json.dump([input_path, dtype, kwargs], file)
"""
NAMES = "def name_replace(name):\n    return name.replace('embed_tokens', 'tok_embeddings')\n"


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / "convert_weight.py").write_text(FORWARD)
    (folder / "convert_reversed.py").write_text(REVERSED)
    (folder / "names.py").write_text(NAMES)
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_the_guides_example_works_as_it_stands(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_text('{"embed_tokens.weight": 1, "norm.weight": 2}')
    out = tmp_path / "out.json"
    result = run(
        "--model", "mine", "--plugin", plugin, "--input_path", tmp_path / "any.bin", "--output_path", out,
        "--dtype", "bf16", "--layers", "3", "--config_path", "a.yaml", "--depth=7",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_bytes()) == {
        "weights": [{"name": "tok_embeddings.weight", "data": 1}, {"name": "norm_out.weight", "data": 2}],
        "dtype": "bf16",
        "kwargs": {"layers": "3", "config_path": "a.yaml", "depth": "7"},
    }


def test_reversed_calls_the_other_file(plugin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run("--model", "mine", "--plugin", plugin, "--reversed", "--input_path", "a", "--output_path", out)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_bytes()) == ["a", None, {}]


def test_a_failure_is_a_failure(plugin: Path, tmp_path: Path) -> None:
    result = run("--model", "mine", "--plugin", plugin, "--input_path", tmp_path / "x", "--output_path", tmp_path / "o")
    assert result.exit_code == 1
    assert "returned False" in result.output


def test_a_folder_without_the_file(tmp_path: Path) -> None:
    result = run("--model", "mine", "--plugin", tmp_path, "--input_path", "x", "--output_path", "o")
    assert result.exit_code == 1
    assert "holds no convert_weight.py" in result.output


def takes_a_namespace(para: Any) -> bool:
    calls.append(vars(para))
    return True


def takes_keywords(input_path: str, output_path: str, dtype: str | None = None, **kwargs: str) -> None:
    calls.append({"input_path": input_path, "output_path": output_path, "dtype": dtype, **kwargs})


calls: list[dict[str, Any]] = []


@pytest.mark.parametrize("function", ["takes_a_namespace", "takes_keywords"])
def test_the_maps_are_open_and_both_styles_are_called(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins.convert_map, "mine", f"{__name__}.{function}")
    calls.clear()
    result = run("--model", "mine", "--input_path", "a", "--output_path", "b", "--rank", "4")
    assert result.exit_code == 0, result.output
    assert calls == [{"input_path": "a", "output_path": "b", "dtype": None, "rank": "4"}]


def test_entry_points_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="mine", value=f"{__name__}:takes_keywords")
    monkeypatch.setattr(plugins, "_entry_points", lambda group: [point] if group.endswith("reversed") else [])
    assert plugins.find_plugin("mine", True) is not None
    assert plugins.find_plugin("mine", False) is None


def test_an_entry_point_does_not_take_the_name_of_a_model_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="llama", value=f"{__name__}:takes_keywords")
    monkeypatch.setattr(plugins, "_entry_points", lambda group: [point])
    assert plugins.find_plugin("llama", False) is None


def test_a_plugin_gets_what_was_given_and_nothing_else(plugin: Path, tmp_path: Path) -> None:
    words = ["--qkv_concat", "False", "--is_pretrain", "false"]
    out = tmp_path / "out.json"
    result = run("--model", "x", "--plugin", plugin, "--reversed", "--input_path", "a", "--output_path", out, *words)
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_bytes())[2] == {"qkv_concat": "False", "is_pretrain": "False"}


def test_a_converter_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins.convert_map, "mine", "no_such_package.convert.convert_pt_to_ms")
    result = run("--model", "mine", "--input_path", "a", "--output_path", "b")
    assert result.exit_code == 1
    assert "cannot be imported" in result.output


def test_options_nobody_knows_are_a_usage_error() -> None:
    result = run("--model", "llama", "--input_path", "a", "--output_path", "b", "--rank", "4")
    assert result.exit_code == 2
    assert "--rank" in result.output


@pytest.mark.parametrize("words", [["word"], ["--rank"], ["--", "x"], ["-r", "4"]])
def test_options_of_a_plugin_are_names_with_values(words: list[str], plugin: Path) -> None:
    with pytest.raises(ValueError, match="option"):
        plugins.parse_extra(words)
