"""Every kind of source: both formats in every mix, indexed folders, several files, replicas without copies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from recorded import Tensor, assert_ranks, assert_same, read_ranks, read_tensors, write_ranks, write_tensors
from safetensors import safe_open
from toy import MODEL, Result, command, dp2mp2, listing, mp2pp2

NAMES = list(MODEL)


@pytest.mark.parametrize("formats", [("ckpt",), ("safetensors",), ("ckpt", "safetensors")], ids="+".join)
def test_sharded_source_of_any_format(toy: Path, formats: tuple[str, ...]) -> None:
    for rank, tensors in dp2mp2().items():
        format = formats[rank % len(formats)]
        write_tensors(toy / f"source/rank_{rank}/model_{rank}.{format}", tensors)
    result = _transform(toy, "source", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2")
    assert result.code == 0, result
    assert_ranks(toy / "out", mp2pp2())
    # The default: safetensors only where all of the source is.
    written = "safetensors" if formats == ("safetensors",) else "ckpt"
    assert (toy / f"out/rank_0/checkpoint_0.{written}").is_file()


def test_written_safetensors_load_with_the_library(toy: Path) -> None:
    assert _transform(toy, "full.safetensors", "--dst-strategy", "dp2mp2").code == 0
    with safe_open(toy / "out/rank_1/checkpoint_1.safetensors", framework="np") as file:
        assert sorted(file.keys()) == sorted(MODEL)
        assert file.metadata() == {"format": "ms"}
        found = file.get_tensor("layers.0.weight")
    np.testing.assert_array_equal(found.view(np.uint32), MODEL["layers.0.weight"].bits[:, 3:])


def test_complete_to_complete_changes_the_format(toy: Path) -> None:
    result = _transform(toy, "full.safetensors", "--format", "ckpt")
    assert result.code == 0, result
    assert "1 file" in result.out
    assert_same(read_tensors(toy / "out/rank_0/checkpoint_0.ckpt"), MODEL)


def test_folder_with_an_index(toy: Path) -> None:
    folder = _write_indexed(toy)
    write_tensors(folder / "adapter.safetensors", {"foreign": MODEL["norm.bias"]})
    result = _transform(toy, "hub", "--dst-strategy", "mp2pp2")
    assert result.code == 0, result
    assert_ranks(toy / "out", mp2pp2())  # without the file that the index does not name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": "model-3.safetensors"}, "files that are not there"),
        ({"norm.bias": "../full.safetensors"}, "files outside of its folder"),
        ({"norm.weight": "model-1.safetensors"}, "norm.weight in model-1.safetensors"),
    ],
)
def test_index_that_is_not_that_of_its_files(toy: Path, change: Mapping[str, str], message: str) -> None:
    _write_indexed(toy, change)
    result = _transform(toy, "hub", "--dst-strategy", "mp2pp2")
    assert result.code == 1
    assert message in result.err


def test_files_without_a_common_name_are_one_checkpoint(toy: Path) -> None:
    write_tensors(toy / "source/a.ckpt", _some(NAMES[:2]))
    write_tensors(toy / "source/b.safetensors", _some(NAMES[2:]))
    result = _transform(toy, "source", "--dst-strategy", "mp2pp2")
    assert result.code == 0, result
    assert "2 files are read as one checkpoint: a.ckpt, b.safetensors" in result.err
    assert_ranks(toy / "out", mp2pp2())


@pytest.mark.parametrize("processes", [1, 2])
def test_files_of_the_same_names_are_checkpoints_of_their_own(toy: Path, processes: int) -> None:
    later = {name: Tensor(dtype, bits + bits.dtype.type(1)) for name, (dtype, bits) in MODEL.items()}
    write_tensors(toy / "source/step_1.ckpt", MODEL)
    write_tensors(toy / "source/step_2.ckpt", later)
    result = _transform(toy, "source", "--dst-strategy", "mp2pp2", "--transform-process-num", str(processes))
    assert result.code == 0, result
    assert sorted(path.name for path in (toy / "out").iterdir()) == ["manifest.json", "step_1", "step_2"]
    assert_ranks(toy / "out/step_1", mp2pp2())
    again = command(
        ["transform", "--src-checkpoint", "out/step_2", "--src-strategy", "mp2pp2", "--dst-checkpoint-dir", "whole"],
        toy,
    )
    assert again.code == 0, again
    assert_same(read_tensors(toy / "whole/rank_0/checkpoint_0.ckpt"), later)


def test_some_ranks_of_several_checkpoints(toy: Path) -> None:
    write_tensors(toy / "source/step_1.ckpt", MODEL)
    write_tensors(toy / "source/step_2.ckpt", MODEL)
    for ranks in ("0-1", "2-3"):
        result = _transform(toy, "source", "--dst-strategy", "mp2pp2", "--ranks", ranks)
        assert result.code == 0, result
    assert_ranks(toy / "out/step_1", mp2pp2())
    assert_ranks(toy / "out/step_2", mp2pp2())
    assert not [path for path in listing(toy) if "staging" in path]


def test_a_folder_that_is_neither(toy: Path) -> None:
    write_tensors(toy / "source/a.ckpt", _some(NAMES[:2]))
    write_tensors(toy / "source/b.ckpt", _some(NAMES[1:3]))
    write_tensors(toy / "source/c.ckpt", _some(NAMES[3:]))
    result = _transform(toy, "source", "--dst-strategy", "mp2pp2")
    assert result.code == 1
    assert "a.ckpt and c.ckpt have none in common" in result.err


def test_two_formats_of_one_name(toy: Path) -> None:
    write_tensors(toy / "source/a.ckpt", MODEL)
    write_tensors(toy / "source/a.safetensors", MODEL)
    result = _transform(toy, "source", "--dst-strategy", "mp2pp2")
    assert result.code == 1
    assert "of the same name" in result.err


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_replicas_that_were_left_out(toy: Path, format: str) -> None:
    """`remove_redundancy`: of every parameter one replica is saved, spread over the ranks that hold it."""
    kept = {
        0: ["embedding.weight", "layers.1.weight"],
        1: ["layers.0.weight", "norm.bias"],
        2: ["layers.0.weight", "global_step"],
        3: ["embedding.weight", "layers.1.weight"],
    }
    ranks = {rank: {name: dp2mp2()[rank][name] for name in names} for rank, names in kept.items()}
    write_ranks(toy / "source", ranks, format)
    result = _transform(toy, "source", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2")
    assert result.code == 0, result
    assert_ranks(toy / "out", mp2pp2())


def test_ranks_whose_folders_are_not_there_are_named(toy: Path) -> None:
    write_ranks(toy / "source", {rank: tensors for rank, tensors in dp2mp2().items() if rank != 3})
    result = _transform(toy, "source", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2")
    assert result.code == 0, result
    assert "ranks 3 of the strategy have no folder; what is needed of theirs is taken from the others" in result.err
    assert_ranks(toy / "out", mp2pp2())


def test_the_last_file_by_name_of_several(toy: Path) -> None:
    """By the guide the last in default sort of the names, although that is an older step here."""
    for rank, tensors in dp2mp2().items():
        write_tensors(toy / f"source/rank_{rank}/llama-9_1.ckpt", tensors)
        write_tensors(toy / f"source/rank_{rank}/llama-10_1.ckpt", {name: tensors[name] for name in ("norm.bias",)})
    result = _transform(toy, "source", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2")
    assert result.code == 0, result
    assert "llama-9_1.ckpt is used, the last by default sort" in result.err
    assert read_ranks(toy / "out").keys() == {0, 1, 2, 3}


def _some(names: list[str]) -> dict[str, Tensor]:
    return {name: MODEL[name] for name in names}


def _write_indexed(toy: Path, change: Mapping[str, str] = {}) -> Path:
    """A folder as Hugging Face libraries write it."""
    folder = toy / "hub"
    write_tensors(folder / "model-1.safetensors", _some(NAMES[:2]))
    write_tensors(folder / "model-2.safetensors", _some(NAMES[2:]))
    places = {name: f"model-{1 if name in NAMES[:2] else 2}.safetensors" for name in NAMES}
    index = {"metadata": {"total_size": 1}, "weight_map": {**places, **change}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _transform(toy: Path, source: str, *options: str) -> Result:
    return command(["transform", "--src-checkpoint", source, "--dst-checkpoint-dir", "out", *options], toy)
