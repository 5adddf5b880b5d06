"""What cannot be merged: refused before anything is written, with all names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from lora_model import (
    Model,
    adapters,
    base_model,
    layouts,
    lora_model,
    write_complete,
    write_distributed,
    write_strategies,
)
from recorded import Tensor

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.strategy.files import MERGED_FILE, read_strategy

WQ = "model.layers.0.attention.wq"
W2 = "model.layers.0.feed_forward.w2"
QKV = "model.layers.1.attention.w_qkv"
A, B = "mindpet_delta_lora_a", "mindpet_delta_lora_b"


def zeros(*shape: int, dtype: str = "float32") -> Tensor:
    return Tensor(by_name(dtype), np.zeros(shape, by_name(dtype).carrier))


def refused(folder: Path, *arguments: str | Path, code: int = 1) -> str:
    """Run the command, which must refuse and write nothing; its error on one line."""
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(cli, ["merge-lora", "--dst_ckpt_dir", str(folder / "out"), *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before
    return " ".join(result.output.split())


def refused_model(folder: Path, model: Model, *arguments: str | Path) -> str:
    source = write_complete(folder / "lora.ckpt", model)
    return refused(folder, "--src_ckpt_path_or_dir", source, *(arguments or ("--alpha", "16")))


def without(*names: str) -> Model:
    return {name: tensor for name, tensor in lora_model().items() if name not in names}


def test_all_halves_without_a_partner(tmp_path: Path) -> None:
    output = refused_model(tmp_path, without(f"{WQ}.{A}", f"adam_m.{WQ}.{A}", f"{QKV}.{B}"))
    assert f"{WQ}.{B}: its partner, the factor A, is not there" in output
    assert f"{QKV}.{A}: its partner, the factor B, is not there" in output
    assert W2 not in output


def test_all_pairs_without_a_weight(tmp_path: Path) -> None:
    output = refused_model(tmp_path, without(f"{WQ}.weight", f"{W2}.weight"))
    for module in (WQ, W2):
        assert f"{module}.{B}, {module}.{A}: the weight {module}.weight is not there" in output
    assert QKV not in output


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{WQ}.{A}", (8, 319)),
        (f"{WQ}.{A}", (7, 320)),
        (f"{WQ}.{B}", (191, 8)),
        (f"{WQ}.{B}", (8, 192)),
        (f"{WQ}.{B}", (192, 8, 1)),
        (f"{WQ}.{B}", (192,)),
        (f"{WQ}.weight", (320, 192)),
        (f"{WQ}.weight", (192,)),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    output = refused_model(tmp_path, {**lora_model(), name: zeros(*shape), f"{W2}.{A}": zeros(8, 1)})
    assert f"{WQ}.{B}, {WQ}.{A}: B · A is" in output
    assert f"{W2}.{B}, {W2}.{A}: B · A is [192, 8] · [8, 1], which does not fit {W2}.weight [192, 320]" in output
    assert QKV not in output


@pytest.mark.parametrize("arguments", [("--alpha", "16"), ("--lora_scaling", "2")])
def test_factors_of_rank_zero(arguments: tuple[str, ...], tmp_path: Path) -> None:
    model = {**lora_model(), f"{WQ}.{A}": zeros(0, 320), f"{WQ}.{B}": zeros(192, 0)}
    source = write_complete(tmp_path / "lora.safetensors", model)
    output = refused(tmp_path, "--src_ckpt_path_or_dir", source, *arguments)
    assert f"{WQ}.{B}, {WQ}.{A}: B · A is [192, 0] · [0, 320], which does not fit" in output


def test_modules_that_no_pattern_gives_an_alpha(tmp_path: Path) -> None:
    adapter = peft_config(tmp_path / "adapter", lora_alpha=None, alpha_pattern={"wq": 16})
    output = refused_model(tmp_path, base_model(), "--adapter", adapter)
    assert "2 of 3 LoRA branches cannot be merged" in output
    assert "its scaling is not known; give --lora_scaling, or --alpha: " in output
    assert WQ not in output


def test_element_types_that_are_no_weights(tmp_path: Path) -> None:
    strange = {f"{WQ}.weight": zeros(192, 320, dtype="int8"), f"{W2}.{A}": zeros(8, 320, dtype="int32")}
    output = refused_model(tmp_path, {**lora_model(), **strange})
    assert f"{WQ}.weight is int8" in output
    assert f"{W2}.{A} is int32" in output


def test_a_scaling_that_is_not_given(tmp_path: Path) -> None:
    for arguments in ((), ("--rank", "8"), ("--use_rslora",)):
        output = refused_model(tmp_path, lora_model(), "--quiet", *arguments)
        assert "the scaling of its 3 LoRA branches is not known; give --lora_scaling (lora_alpha / lora_rank" in output
        assert WQ not in output  # one cause, one line


def test_a_rank_that_is_not_that_of_the_factors(tmp_path: Path) -> None:
    model = {**lora_model(), f"{W2}.{A}": zeros(16, 320), f"{W2}.{B}": zeros(192, 16)}
    output = refused_model(tmp_path, model, "--alpha", "16", "--rank", "8")
    assert f"{W2}.{A}: it is of rank 16, not 8" in output
    assert WQ not in output


def test_a_scaling_in_words(tmp_path: Path) -> None:
    for text in ("lora_alpha/lora_rank", "1/0", "nan", ""):
        output = refused(tmp_path, "--src_ckpt_path_or_dir", "x", "--lora_scaling", text, code=2)
        assert "write it like 2 or 16/8" in output


def test_two_scalings(tmp_path: Path) -> None:
    output = refused(tmp_path, "--src_ckpt_path_or_dir", "x", "--lora_scaling", "2", "--alpha", "16", code=2)
    assert "--lora-scaling is the whole factor" in output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"{WQ}.lora_magnitude_vector", "is of DoRA"),
        (f"{WQ}.lora_magnitude_vector.default.weight", "is of DoRA"),
        (f"{WQ}.lora_B.bias", "not a LoRA of a linear layer"),
        ("model.embedding.lora_embedding_A", "not a LoRA of a linear layer"),
        ("model.layers.0.mindpet_delta_adapter_tk_delta_adapter_block.weight", "not a LoRA of a linear layer"),
    ],
)
def test_other_adapters(name: str, said: str, tmp_path: Path) -> None:
    output = refused_model(tmp_path, {**lora_model(), name: zeros(192)})
    assert f"{name}: " in output
    assert said in output


@pytest.mark.parametrize(
    "pair", [("lora_A.second.weight", "lora_B.second.weight"), ("lora_a", "lora_b")], ids=["names", "spellings"]
)
def test_several_adapters_of_one_module(pair: tuple[str, str], tmp_path: Path) -> None:
    more = {f"{W2}.{pair[0]}": zeros(8, 320), f"{W2}.{pair[1]}": zeros(192, 8)}
    output = refused_model(tmp_path, {**lora_model(), **more})
    assert f"{W2}: several adapters of one module cannot be merged" in output
    assert f"{W2}.{pair[0]}" in output


def test_weights_without_lora(tmp_path: Path) -> None:
    assert "holds no LoRA parameters" in refused_model(tmp_path, base_model())


def test_an_adapter_without_lora(tmp_path: Path) -> None:
    adapter = write_complete(tmp_path / "adapter.ckpt", base_model())
    output = refused_model(tmp_path, base_model(), "--alpha", "16", "--adapter", adapter)
    assert "adapter.ckpt holds no LoRA parameters" in output


def test_an_adapter_over_weights_that_have_their_own(tmp_path: Path) -> None:
    adapter = write_complete(tmp_path / "adapter.ckpt", adapters())
    output = refused_model(tmp_path, lora_model(), "--alpha", "16", "--adapter", adapter)
    assert "has LoRA parameters of its own" in output


def test_an_adapter_with_trained_weights(tmp_path: Path) -> None:
    model = {**adapters(), "model.norm.weight": zeros(320), "base_model.model.head.bias": zeros(3)}
    adapter = write_complete(tmp_path / "adapter.ckpt", model)
    output = refused_model(tmp_path, base_model(), "--alpha", "16", "--adapter", adapter)
    assert "trained parameters besides LoRA branches" in output
    assert "model.norm.weight" in output
    assert "head.bias" in output


def test_a_target_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert "out is not empty" in refused_model(tmp_path, lora_model())


def test_an_empty_target_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = write_complete(tmp_path / "lora.ckpt", lora_model())
    arguments = ["--src_ckpt_path_or_dir", str(source), "--dst_ckpt_dir", str(tmp_path / "out"), "--alpha", "16"]
    assert CliRunner().invoke(cli, ["merge-lora", *arguments]).exit_code == 0


def test_a_target_in_the_source(tmp_path: Path) -> None:
    cut = write_distributed(tmp_path, lora_model(), [layouts()])
    strategy = write_strategies(tmp_path / "strategy", [layouts()]) / "ckpt_strategy_rank_0.ckpt"
    output = refused(tmp_path, "--src_ckpt_path_or_dir", cut, "--src_ckpt_strategy", strategy, "--alpha", "16")
    assert "is in the source folder" in output


def test_several_checkpoints(tmp_path: Path) -> None:
    for name in ("one.ckpt", "two.ckpt"):
        write_complete(tmp_path / "files" / name, lora_model())
    output = refused(tmp_path, "--src_ckpt_path_or_dir", tmp_path / "files", "--alpha", "16")
    assert "holds several checkpoints (one.ckpt, two.ckpt)" in output


def test_factors_of_a_rank_that_is_missing(tmp_path: Path) -> None:
    cut = write_distributed(tmp_path / "cut", lora_model(), [layouts()])
    strategy = write_strategies(tmp_path / "strategy", [layouts()]) / "ckpt_strategy_rank_0.ckpt"
    for rank in (1, 3):
        (cut / f"rank_{rank}/checkpoint_{rank}.ckpt").unlink()
        (cut / f"rank_{rank}").rmdir()
    output = refused(tmp_path, "--src_ckpt_path_or_dir", cut, "--src_ckpt_strategy", strategy, "--alpha", "16")
    assert f"the box [96:192, 0:8] of {WQ}.{B} is in none of the files of ranks [1, 3]" in output


class TestStrategyFolder:
    """The folder of strategy files, which gets a merged file."""

    @pytest.fixture
    def job(self, tmp_path: Path) -> list[str]:
        write_distributed(tmp_path / "cut", lora_model(), [layouts()])
        write_strategies(tmp_path / "strategy", [layouts()])
        names = {"src_ckpt_strategy": "strategy", "src_ckpt_path_or_dir": "cut", "dst_ckpt_dir": "out"}
        return ["merge-lora", "--alpha=16", *(f"--{name}={tmp_path}/{at}" for name, at in names.items())]

    @pytest.fixture
    def read_only(self, job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The folder without the permission to write: root has it whatever the mode says."""
        folder, access = tmp_path / "strategy", os.access
        folder.chmod(0o555)

        def answer(path: Any, mode: int) -> bool:
            return access(path, mode) and not (Path(path) == folder and mode & os.W_OK)

        monkeypatch.setattr(os, "access", answer)
        return folder

    def test_an_old_merged_file_is_replaced(self, job: list[str], tmp_path: Path) -> None:
        merged = tmp_path / "strategy" / MERGED_FILE
        merged.write_bytes((tmp_path / "strategy/ckpt_strategy_rank_0.ckpt").read_bytes())
        result = CliRunner().invoke(cli, job)
        assert result.exit_code == 0, result.output
        assert read_strategy(merged).stages == (layouts(),)

    def test_an_old_merged_file_stays_when_the_new_one_fails(self, job: list[str], tmp_path: Path) -> None:
        merged = tmp_path / "strategy" / MERGED_FILE
        old = (tmp_path / "strategy/ckpt_strategy_rank_0.ckpt").read_bytes()
        merged.write_bytes(old)
        (tmp_path / "strategy/ckpt_strategy_rank_3.ckpt").write_bytes(b"")
        result = CliRunner().invoke(cli, job)
        assert result.exit_code == 1
        assert "is empty; a strategy file was expected" in result.output
        assert merged.read_bytes() == old
        assert not (tmp_path / "out").exists()

    def test_another_file_of_that_name_is_not_replaced(self, job: list[str], tmp_path: Path) -> None:
        merged = tmp_path / "strategy" / MERGED_FILE
        merged.write_bytes(b"notes")
        result = CliRunner().invoke(cli, job)
        assert result.exit_code == 1
        assert "is not a strategy file and is not replaced" in result.output
        assert merged.read_bytes() == b"notes"

    def test_a_folder_of_a_merged_file_alone(self, job: list[str], tmp_path: Path) -> None:
        assert CliRunner().invoke(cli, job).exit_code == 0
        (tmp_path / "out").rename(tmp_path / "first")
        for path in (tmp_path / "strategy").glob("ckpt_strategy_rank_*"):
            path.unlink()
        assert CliRunner().invoke(cli, job).exit_code == 0
        assert (tmp_path / "out/merged_lora.ckpt").read_bytes() == (tmp_path / "first/merged_lora.ckpt").read_bytes()

    def test_a_folder_that_cannot_be_written(self, job: list[str], read_only: Path, tmp_path: Path) -> None:
        (tmp_path / "cut/rank_0/checkpoint_0.ckpt").write_bytes(b"damaged")  # nobody has looked at it yet
        result = CliRunner().invoke(cli, job)
        assert result.exit_code == 1
        assert "strategy cannot be written" in result.output
        assert "--merged-strategy FILE" in result.output.replace("\n", " ")
        assert not (read_only / MERGED_FILE).exists()
        assert not (tmp_path / "out").exists()

    @pytest.mark.usefixtures("read_only")
    def test_another_place_for_the_merged_file(self, job: list[str], tmp_path: Path) -> None:
        elsewhere = tmp_path / "new/merged.ckpt"
        result = CliRunner().invoke(cli, [*job, "--merged_strategy", str(elsewhere)])
        assert result.exit_code == 0, result.output
        assert read_strategy(elsewhere).stages == (layouts(),)
        assert not (tmp_path / "strategy" / MERGED_FILE).exists()

    def test_a_place_for_what_is_not_merged(self, tmp_path: Path) -> None:
        output = refused(tmp_path, "--src_ckpt_path_or_dir", "x", "--merged_strategy", "y", code=2)
        assert "--merged-strategy is for a folder" in output


def test_the_source_without_its_strategy(tmp_path: Path) -> None:
    cut = write_distributed(tmp_path / "cut", lora_model(), [layouts()])
    output = refused(tmp_path, "--src_ckpt_path_or_dir", cut, "--alpha", "16")
    assert "no source strategy is given" in output


def peft_config(folder: Path, **values: object) -> Path:
    write_complete(folder / "adapter_model.safetensors", adapters(("{}.lora_A.weight", "{}.lora_B.weight")))
    content = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, **values}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"lora_alpha": None}, "the scaling of its 3 LoRA branches is not known"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ],
)
def test_settings_of_an_adapter_that_cannot_be_merged(values: dict[str, object], said: str, tmp_path: Path) -> None:
    adapter = peft_config(tmp_path / "adapter", **values)
    assert said in refused_model(tmp_path, base_model(), "--adapter", adapter)
