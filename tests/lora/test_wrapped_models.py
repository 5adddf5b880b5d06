"""State dicts of models that PEFT still wraps, as FSDP and DeepSpeed runs save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from lora_model import (
    ADAPTED,
    Model,
    adapters,
    assert_merged,
    base_model,
    layouts,
    merged_numbers,
    write_complete,
    write_strategies,
)
from recorded import assert_ranks, read_tensors

from mindformers_ckpt.cli.main import cli

SPELLING = ("{}.lora_A.default.weight", "{}.lora_B.default.weight")
HEAD = "model.layers.1.attention.wo"


def wrapped(prefix: str = "base_model.model.", trained: str = "") -> Model:
    """The model of these tests as PEFT holds it; `trained` is a module of which it has trained a copy."""
    factors = adapters(SPELLING)
    found: dict[str, Any] = {}
    for name, tensor in base_model().items():
        module = name[: -len(".weight")]
        if name in ADAPTED:
            found[f"{prefix}{module}.base_layer.weight"] = tensor
            for form in SPELLING:
                found[prefix + form.format(module)] = factors[form.format(module)]
        elif module == trained:
            found[f"{prefix}{module}.original_module.weight"] = tensor
            found[f"{prefix}{module}.modules_to_save.default.weight"] = base_model(7)[name]
        else:
            found[prefix + name] = tensor
    return found


def merge(folder: Path, model: Model, *arguments: str | Path, code: int = 0) -> str:
    source = write_complete(folder / "wrapped.safetensors", model)
    words = ("--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", folder / "out", "--lora_scaling", "2", *arguments)
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("prefix", ["base_model.model.", "module.base_model.model.", ""])
@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_the_result_has_the_names_of_the_original_model(prefix: str, format: str, tmp_path: Path) -> None:
    merge(tmp_path, wrapped(prefix), "--save_format", format)
    found = read_tensors(tmp_path / f"out/merged_lora.{format}")
    assert set(found) == set(base_model())
    assert_merged(found, base_model(), merged_numbers(base_model(), adapters()))


def test_trained_copies_take_the_place_of_the_originals(tmp_path: Path) -> None:
    output = merge(tmp_path, wrapped(trained=HEAD))
    assert "trained copies (modules_to_save) are taken instead of the originals" in output
    assert f"{HEAD}.original_module.weight" in output
    expected = {**base_model(), f"{HEAD}.weight": base_model(7)[f"{HEAD}.weight"]}
    found = read_tensors(tmp_path / "out/merged_lora.safetensors")
    assert_merged(found, expected, merged_numbers(base_model(), adapters()))


def test_cut_for_a_strategy_by_the_original_names(tmp_path: Path) -> None:
    strategy = write_strategies(tmp_path / "strategy", [layouts()])
    merge(tmp_path, wrapped())
    (tmp_path / "out").rename(tmp_path / "whole")
    merge(tmp_path, wrapped(), "--dst_strategy", strategy / "ckpt_strategy_rank_0.ckpt")
    whole, cuts = read_tensors(tmp_path / "whole/merged_lora.safetensors"), layouts()
    ranks = {
        rank: {name: tensor.part(cuts[name].box(tensor.bits.shape, rank)) for name, tensor in whole.items()}
        for rank in range(4)
    }
    assert_ranks(tmp_path / "out", ranks)


def test_the_manifest_has_both_names(tmp_path: Path) -> None:
    merge(tmp_path, wrapped())
    branches = json.loads((tmp_path / "out/manifest.json").read_text())["lora"]["branches"]
    module = "model.layers.0.attention.wq"
    assert branches[f"base_model.model.{module}"]["weight"] == f"{module}.weight"


@pytest.mark.parametrize(
    ("surplus", "said"),
    [
        ("model.layers.0.attention.wq.weight", "several parameters that are one in the original model"),
        (f"base_model.model.{HEAD}.modules_to_save.second.weight", "several parameters that are one"),
        (
            "base_model.model.model.embedding.token_adapter.trainable_tokens_delta.default",
            "not a LoRA of a linear layer",
        ),
        ("base_model.model.model.layers.0.attention.wq.lora_magnitude_vector.default.weight", "is of DoRA"),
    ],
)
def test_what_cannot_be_told(surplus: str, said: str, tmp_path: Path) -> None:
    model = {**wrapped(trained=HEAD), surplus: base_model()[f"{HEAD}.weight"]}
    output = merge(tmp_path, model, code=1)
    assert said in output
    assert surplus in output
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_as_the_source(tmp_path: Path) -> None:
    assert "give it as --adapter, and the weights they belong to" in merge(tmp_path, adapters(SPELLING), code=1)


def many(count: int = 80) -> Model:
    """The factors of many modules."""
    factor = adapters()["model.layers.0.attention.wq.mindpet_delta_lora_a"]
    other = adapters()["model.layers.0.attention.wq.mindpet_delta_lora_b"]
    return {
        f"base_model.model.model.layers.{number}.self_attn.q_proj.lora_{end}.weight": tensor
        for number in range(count)
        for end, tensor in (("A", factor), ("B", other))
    }


@pytest.mark.parametrize(
    ("arguments", "lines", "next_step"),
    [
        ((), 1, "give --lora_scaling (lora_alpha / lora_rank of the training, like 16/8), or --alpha"),
        (("--alpha", "16"), 23, "give --model"),
    ],
)
def test_one_cause_is_a_short_message(arguments: tuple[str, ...], lines: int, next_step: str, tmp_path: Path) -> None:
    adapter = write_complete(tmp_path / "adapter_model.safetensors", many())
    base = write_complete(tmp_path / "base.ckpt", base_model())
    words = ("--src_ckpt_path_or_dir", base, "--adapter", adapter, "--dst_ckpt_dir", tmp_path / "out", *arguments)
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, words)])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == lines
    assert result.output.count(next_step) == 1
    assert "80 " in result.output


def test_one_cause_of_many_branches_is_one_line(tmp_path: Path) -> None:
    base = {name.replace(".lora_A.", "."): tensor for name, tensor in many().items() if ".lora_A." in name}
    weight = base_model()["model.layers.0.attention.wq.weight"]
    source = {**{name.partition("base_model.model.")[2]: weight for name in base}, **base_model()}
    words = {
        "src_ckpt_path_or_dir": write_complete(tmp_path / "base.ckpt", source),
        "adapter": write_complete(tmp_path / "adapter_model.safetensors", many()),
        "dst_ckpt_dir": tmp_path / "out",
    }
    arguments = [f"--{name}={value}" for name, value in words.items()]
    result = CliRunner().invoke(cli, ["merge-lora", *arguments, "--alpha=16", "--rank=16"])
    assert result.exit_code == 1
    headline, line = result.output.splitlines()
    assert "80 of 80 LoRA branches cannot be merged" in headline
    assert "it is of rank 8, not 16 (options); if it was padded, give --lora_scaling: " in line
    assert line.count(".lora_") == 20
    assert line.endswith("and 70 more")
