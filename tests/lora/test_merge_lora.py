"""Merging as users do it: complete and distributed weights, names, formats, strategies, adapters of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lora_model import (
    ADAPTED,
    RANK,
    SCALING,
    SPELLING,
    STEP,
    Model,
    adapters,
    assert_merged,
    base_model,
    layouts,
    lora_model,
    merged_numbers,
    pipeline,
    states,
    write_complete,
    write_distributed,
    write_strategies,
)
from recorded import assert_ranks, assert_same, read_tensors

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.cli.merge_lora import command
from mindformers_ckpt.look.fingerprint import fingerprint
from mindformers_ckpt.strategy.files import MERGED_FILE, read_strategy

SPELLINGS = [
    ("{}.mindpet_delta_lora_a", "{}.mindpet_delta_lora_b"),
    ("{}.mindpet_delta_lora_A", "{}.mindpet_delta_lora_B"),
    ("{}.tk_delta_lora_a", "{}.tk_delta_lora_b"),
    ("{}.lora_a", "{}.lora_b"),
    ("{}.lora_A", "{}.lora_B"),
    ("{}.lora_a.weight", "{}.lora_b.weight"),
    ("{}.lora_A.weight", "{}.lora_B.weight"),
    ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
]


def merge(*arguments: str | Path | float, code: int = 0) -> str:
    """Run the command; what it prints, errors included."""
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def merged_file(folder: Path, *arguments: str | Path | float) -> dict[str, Any]:
    """Merge into a folder of one file, and read that."""
    merge("--dst_ckpt_dir", folder, *arguments)
    (path,) = (folder / "rank_0").iterdir()
    return read_tensors(path)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling[0])
def test_complete_weights(spelling: tuple[str, str], tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", lora_model(spelling))
    found = merged_file(tmp_path / "out", "--src_ckpt_path_or_dir", source, "--lora_scaling", "16/8")
    assert_merged(found, base_model(), merged_numbers(base_model(), adapters()))
    assert found[STEP].bits == 7


def test_the_order_is_that_of_the_original_model(tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", lora_model())
    found = merged_file(tmp_path / "out", "--src_ckpt_path_or_dir", source, "--lora_scaling", SCALING)
    assert list(found) == [*base_model(), STEP]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_factors_of_half_precision(dtype: str, tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.safetensors", lora_model(dtype=dtype))
    found = merged_file(tmp_path / "out", "--src_ckpt_path_or_dir", source, "--lora_scaling", "0.3")
    assert_merged(found, base_model(), merged_numbers(base_model(), adapters(dtype=dtype), 0.3))


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        (("--alpha", 12), 12 / RANK),
        (("--lora_alpha", 12, "--lora_rank", RANK), 12 / RANK),
        (("--alpha", 12, "--use_rslora"), 12 / RANK**0.5),
        (("--lora_scaling", "-0.5"), -0.5),
    ],
)
def test_scalings(options: tuple[Any, ...], scaling: float, tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", lora_model())
    found = merged_file(tmp_path / "out", "--src_ckpt_path_or_dir", source, *options)
    assert_merged(found, base_model(), merged_numbers(base_model(), adapters(), scaling))


def test_names_of_the_result(tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", lora_model())
    merge(
        "--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", tmp_path / "out", "--prefix", "llama_", "--alpha", 16,
        "--save_format", "safetensors",
    )  # fmt: skip
    listed = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*"))
    assert listed == ["manifest.json", "merged_lora.safetensors", "rank_0", "rank_0/llama_0.safetensors"]
    assert (tmp_path / "out/merged_lora.safetensors").samefile(tmp_path / "out/rank_0/llama_0.safetensors")
    merge("--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", tmp_path / "ckpt", "--alpha", 16)
    assert_same(
        read_tensors(tmp_path / "out/merged_lora.safetensors"), read_tensors(tmp_path / "ckpt/merged_lora.ckpt")
    )


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
@pytest.mark.parametrize("stages", [[layouts()], pipeline()], ids=["one stage", "pipeline"])
def test_distributed_is_complete_file_for_file(stages: list[Any], format: str, tmp_path: Path) -> None:
    whole = write_complete(tmp_path / f"lora.{format}", lora_model())
    cut = write_distributed(tmp_path / "model_dir", lora_model(), stages, format)
    strategy = write_strategies(tmp_path / "strategy", stages)
    merge("--src_ckpt_path_or_dir", whole, "--dst_ckpt_dir", tmp_path / "whole", "--lora_scaling", SCALING)
    merge(
        "--src_ckpt_strategy", strategy, "--src_ckpt_path_or_dir", cut, "--dst_ckpt_dir", tmp_path / "joined",
        "--lora_scaling", SCALING,
    )  # fmt: skip
    first, second = (tmp_path / name / f"rank_0/checkpoint_0.{format}" for name in ("whole", "joined"))
    if len(stages) == 1:
        assert first.read_bytes() == second.read_bytes()
    assert_same(read_tensors(first), read_tensors(second))
    assert read_strategy(strategy / MERGED_FILE).stages == tuple(stages)


def test_one_file_of_a_strategy_without_pipeline(tmp_path: Path) -> None:
    cut = write_distributed(tmp_path / "model_dir", lora_model(), [layouts()])
    strategy = write_strategies(tmp_path / "strategy", [layouts()])
    found = merged_file(
        tmp_path / "out", "--src_ckpt_strategy", strategy / "ckpt_strategy_rank_2.ckpt", "--src_ckpt_path_or_dir", cut,
        "--alpha", 16,
    )  # fmt: skip
    assert_merged(found, base_model(), merged_numbers(base_model(), adapters()))
    assert not (strategy / MERGED_FILE).exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_source_has_the_fingerprint_that_it_has_alone(dtype: str, tmp_path: Path) -> None:
    """Weights and factors are counted as they are read: out of ranks, out of one file, with an adapter of its own."""
    model = {**base_model(), **adapters(dtype=dtype)}
    cut = write_distributed(tmp_path / "model_dir", model, pipeline())
    strategy = write_strategies(tmp_path / "source", pipeline())
    whole = write_complete(tmp_path / "whole.ckpt", model)
    base = write_complete(tmp_path / "base.ckpt", base_model())
    factors = write_complete(tmp_path / "adapter.ckpt", adapters(dtype=dtype))
    for number, (source, more) in enumerate(
        (
            (cut, ("--src_ckpt_strategy", strategy, "--dst_strategy", strategy)),
            (whole, ("--transform_process_num", 2)),
            (base, ("--adapter", factors)),
        )
    ):
        out = tmp_path / f"out {number}"
        merge("--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", out, "--alpha", 16, "--fingerprint", *more)
        told = json.loads((out / "manifest.json").read_bytes())["source_fingerprint"]
        known = fingerprint(source, read_strategy(strategy) if source == cut else None)
        assert (told["digest"], told["not_counted"]) == (known.digest, {})
        assert {name: entry["crc64nvme"] for name, entry in told["tensors"].items()} == {
            tensor.name: tensor.hex for tensor in known.tensors
        }


@pytest.mark.parametrize("processes", [1, 2])
def test_cut_for_another_strategy_in_the_same_pass(processes: int, tmp_path: Path) -> None:
    cut = write_distributed(tmp_path / "model_dir", lora_model(), pipeline())
    source = write_strategies(tmp_path / "source", pipeline())
    # The target names LoRA parameters too, as the strategy of a LoRA run does.
    target = write_strategies(tmp_path / "target", [layouts()])
    arguments = ("--src_ckpt_strategy", source, "--src_ckpt_path_or_dir", cut, "--alpha", 16)
    whole = merged_file(tmp_path / "whole", *arguments)
    output = merge(
        *arguments, "--dst_ckpt_dir", tmp_path / "out", "--dst_strategy", target,
        "--transform_process_num", processes, "--fingerprint",
    )  # fmt: skip
    assert "warning" not in output
    assert f"fingerprint {fingerprint(tmp_path / 'whole/merged_lora.ckpt').digest}" in output
    recorded = json.loads((tmp_path / "out/manifest.json").read_bytes())["fingerprints"]["."]
    assert "source_digest" not in recorded  # the weights were computed
    of_source = json.loads((tmp_path / "out/manifest.json").read_bytes())["source_fingerprint"]
    assert of_source["digest"] is None
    known = {tensor.name: tensor.hex for tensor in fingerprint(cut, read_strategy(source)).tensors}
    assert {name: told["crc64nvme"] for name, told in of_source["tensors"].items()}.items() <= known.items()
    assert {*of_source["tensors"], *states(adapters())} == set(known)
    assert of_source["not_counted"] == {"the result does not have it": sorted(states(adapters()))}
    assert "fingerprint of the source not known" in output
    kept = layouts()
    expected: dict[int, Model] = {
        rank: {
            name: tensor.part(kept[name].box(tensor.bits.shape, rank)) if name in kept else tensor
            for name, tensor in whole.items()
        }
        for rank in range(4)
    }
    assert_ranks(tmp_path / "out", expected)
    assert not (tmp_path / "out/merged_lora.ckpt").exists()


def test_an_adapter_of_its_own(tmp_path: Path) -> None:
    base = write_complete(tmp_path / "base.safetensors", base_model())
    factors = adapters()
    adapter = write_complete(tmp_path / "adapter.ckpt", {**factors, **states(factors), STEP: lora_model()[STEP]})
    arguments = ("--src_ckpt_path_or_dir", base, "--adapter", adapter, "--lora_scaling", SCALING)
    output = merge(*arguments, "--dst_ckpt_dir", tmp_path / "out")
    found = read_tensors(tmp_path / "out/rank_0/checkpoint_0.safetensors")
    assert_merged(found, base_model(), merged_numbers(base_model(), factors))
    assert STEP not in found
    assert f"not used: {STEP}" in output.replace("\n", "")


def test_an_adapter_cut_like_the_source(tmp_path: Path) -> None:
    stages = pipeline()
    base = write_distributed(tmp_path / "base", base_model(), stages)
    adapter = write_distributed(tmp_path / "adapter", adapters(), stages)
    strategy = write_strategies(tmp_path / "strategy", stages)
    found = merged_file(
        tmp_path / "out", "--src_ckpt_path_or_dir", base, "--src_ckpt_strategy", strategy, "--adapter", adapter,
        "--alpha", 16,
    )  # fmt: skip
    assert_merged(found, base_model(), merged_numbers(base_model(), adapters()))


def test_the_report_as_json(tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", lora_model())
    arguments = ["--src_ckpt_path_or_dir", str(source), "--dst_ckpt_dir", str(tmp_path / "out"), "--alpha", "16"]
    result = CliRunner().invoke(cli, ["merge-lora", *arguments, "--json", "--quiet"])
    report = json.loads(result.output)
    assert report["files"] == 1
    assert report["bytes_written"] == sum(tensor.bits.nbytes for tensor in base_model().values()) + 4


def test_a_sum_that_does_not_fit_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    model = lora_model()
    name = SPELLING[1].format("model.layers.1.attention.w_qkv")
    model[name] = model[name]._replace(bits=(model[name].bits.view(np.float32) * 1e6).view(np.uint32))
    source = write_complete(tmp_path / "lora.ckpt", model)
    output = merge("--src_ckpt_path_or_dir", source, "--dst_ckpt_dir", tmp_path / "out", "--alpha", 16, code=1)
    assert "does not fit float16" in output
    assert [path.name for path in tmp_path.iterdir()] == ["lora.ckpt"]


def test_every_option_of_the_guide_is_there() -> None:
    names = {option for parameter in command.params for option in parameter.opts}
    guide = {"src_ckpt_strategy", "src_ckpt_path_or_dir", "dst_ckpt_dir", "prefix", "lora_scaling"}
    assert {"--" + name.replace("_", "-") for name in guide} <= names
    assert len(ADAPTED) == 3
