"""What the path of an adapter is: the file that is read, or an error that names what could be meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from lora_model import adapters, assert_merged, base_model, layouts, merged_numbers, write_complete, write_distributed

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.sources.adapter import find_adapter

SETTINGS, SAFE, OLD = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def folder_of(folder: Path, *names: str) -> Path:
    """A folder with files of these names, whose contents nobody reads."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"contents")
    return folder


@pytest.mark.parametrize(
    ("names", "given", "read", "settings"),
    [
        ([SETTINGS, SAFE], "", SAFE, True),
        ([SETTINGS, OLD], "", OLD, True),
        ([SETTINGS, SAFE], SETTINGS, SAFE, True),
        ([SETTINGS, OLD], OLD, OLD, True),
        ([SETTINGS, SAFE, OLD], OLD, OLD, True),  # a file that is named is that file
        ([SAFE], "", SAFE, False),
        (["one.ckpt"], "", "one.ckpt", False),
        (["one.ckpt", SETTINGS], "", "one.ckpt", True),
        (["one.ckpt", SAFE, SETTINGS], "one.ckpt", "one.ckpt", True),
        ([SETTINGS, SAFE, "README.md", "tokenizer.json", "._" + OLD, "optimizer.pt"], "", SAFE, True),
    ],
)
def test_the_file_that_is_read(names: list[str], given: str, read: str, settings: bool, tmp_path: Path) -> None:
    folder_of(tmp_path, *names)
    found = find_adapter(tmp_path / given)
    assert found.files.by_rank == {0: (tmp_path / read,)}
    assert found.settings == (tmp_path / SETTINGS if settings else None)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("names", "left"),
    [
        ([SAFE, OLD], OLD),
        ([SAFE, "model.safetensors"], "model.safetensors"),
        ([OLD, "model.safetensors", "x.safetensors"], "model.safetensors, x.safetensors"),
    ],
)
def test_what_peft_leaves_aside_is_said(names: list[str], left: str, tmp_path: Path) -> None:
    found = find_adapter(folder_of(tmp_path, SETTINGS, *names))
    assert found.files.by_rank == {0: (tmp_path / names[0],)}
    assert found.notes == (f"{tmp_path}: {names[0]} is read, as PEFT does it, and not {left}",)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([SAFE, "adapter.ckpt"], f"({SAFE}) and a MindSpore checkpoint (adapter.ckpt)"),
        ([OLD, "rank_0/a.ckpt", "rank_1/a.ckpt"], f"({OLD}) and a MindSpore checkpoint (rank_0, rank_1)"),
        (["rank_0/a.ckpt", "whole.ckpt"], "rank folders (rank_0) and checkpoint files (whole.ckpt)"),
        ([SETTINGS], "holds no adapter"),
        ([f"checkpoint-10/{SAFE}", f"checkpoint-20/{OLD}", "other/x"], "in its folders checkpoint-10, checkpoint-20"),
        (["README.md"], f"neither {SAFE} nor {OLD}, nor rank_<n> folders, nor a .ckpt or .safetensors file"),
        (["adapter_model.safetensors.index.json", "adapter_model-00001-of-00002.safetensors"], "in several files"),
    ],
)
def test_what_could_be_meant_is_named(names: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as failure:
        find_adapter(folder_of(tmp_path, *names))
    assert said in str(failure.value)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no adapter at"):
        find_adapter(tmp_path / "adapter")


def test_several_checkpoints(tmp_path: Path) -> None:
    for name in ("one.ckpt", "two.ckpt"):
        write_complete(tmp_path / "adapter" / name, adapters())
    with pytest.raises(PlanError, match=r"several checkpoints \(one\.ckpt, two\.ckpt\)"):
        find_adapter(tmp_path / "adapter")


def test_rank_folders(tmp_path: Path) -> None:
    folder = write_distributed(tmp_path / "adapter", adapters(), [layouts("lora")])
    assert sorted(find_adapter(folder).files.by_rank) == [0, 1, 2, 3]


def merge(*arguments: str | Path) -> str:
    result = CliRunner().invoke(cli, ["merge-lora", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def peft_folder(folder: Path, **settings: object) -> Path:
    write_complete(folder / SAFE, adapters(("{}.lora_A.weight", "{}.lora_B.weight")))
    (folder / SETTINGS).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **settings}))
    return folder


def test_the_manifest_says_what_was_merged(tmp_path: Path) -> None:
    from recorded import read_tensors

    wq = "model.layers.0.attention.wq"
    adapter = peft_folder(tmp_path / "adapter", alpha_pattern={f"^{wq}": 4})
    base = write_complete(tmp_path / "base.ckpt", base_model())
    merge("--src_ckpt_path_or_dir", base, "--adapter", adapter, "--dst_ckpt_dir", tmp_path / "out")
    record = json.loads((tmp_path / "out/manifest.json").read_text())["lora"]
    assert record["adapter"] == str(adapter / SAFE)
    assert record["scaling_from"] == str(adapter / SETTINGS)
    assert record["branches"] == {
        wq: {"weight": f"{wq}.weight", "rank": 8, "scaling": 0.5},
        "model.layers.0.feed_forward.w2": {"weight": "model.layers.0.feed_forward.w2.weight", "rank": 8, "scaling": 2},
        "model.layers.1.attention.w_qkv": {"weight": "model.layers.1.attention.w_qkv.weight", "rank": 8, "scaling": 2},
    }
    expected = merged_numbers(base_model(), adapters(), 2)
    expected[f"{wq}.weight"] = merged_numbers(base_model(), adapters(), 0.5)[f"{wq}.weight"]
    assert_merged(read_tensors(tmp_path / "out/merged_lora.ckpt"), base_model(), expected)


def test_the_manifest_of_a_merge_by_options(tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", {**base_model(), **adapters()})
    merge("--src_ckpt_path_or_dir", source, "--lora_scaling", "16/8", "--dst_ckpt_dir", tmp_path / "out")
    record = json.loads((tmp_path / "out/manifest.json").read_text())["lora"]
    assert (record["adapter"], record["scaling_from"]) == (None, "options")
    assert [branch["scaling"] for branch in record["branches"].values()] == [2, 2, 2]


def test_options_over_settings_are_said(tmp_path: Path) -> None:
    adapter = peft_folder(tmp_path / "adapter")
    base = write_complete(tmp_path / "base.ckpt", base_model())
    words = ("--src_ckpt_path_or_dir", base, "--adapter", adapter)
    output = merge(*words, "--dst_ckpt_dir", tmp_path / "one", "--alpha", "8")
    assert f"the scaling of {adapter / SETTINGS} is not used, but that of the options" in output
    output = merge(*words, "--dst_ckpt_dir", tmp_path / "two", "--use_rslora")
    assert f"--use-rslora is taken, although {adapter / SETTINGS} does not say use_rslora" in output
    assert "warning" not in merge(*words, "--dst_ckpt_dir", tmp_path / "three")


@pytest.mark.parametrize(
    "option",
    ["src_ckpt_path_or_dir", "dst_ckpt_dir", "src_ckpt_strategy", "dst_strategy", "adapter", "hf_config", "model",
     "merged_strategy"],
)  # fmt: skip
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_option(option: str, text: str, tmp_path: Path) -> None:
    source = write_complete(tmp_path / "lora.ckpt", {**base_model(), **adapters()})
    words = {"src_ckpt_path_or_dir": str(source), "dst_ckpt_dir": str(tmp_path / "out"), "alpha": "16", option: text}
    result = CliRunner().invoke(cli, ["merge-lora", *(f"--{name}={value}" for name, value in words.items())])
    assert result.exit_code == 2
    assert "is a variable not set?" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
