"""Every kind of bad input gives one clear error and exit code 1, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from recorded import Tensor, write_tensors
from toy import DP2MP2, MODEL, Result, command, dp2mp2, environment, listing

from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import write_strategy

RANK_2 = "sharded/rank_2/checkpoint_2.ckpt"
RANK_3 = "sharded/rank_3/checkpoint_3.ckpt"


def _truncate(toy: Path) -> None:
    """Cut in the middle of a tensor."""
    os.truncate(toy / RANK_2, (toy / RANK_2).stat().st_size - 50)


def _truncate_at_a_record(toy: Path) -> None:
    """Cut exactly between two tensors, on both ranks that hold the half."""
    for rank in (1, 3):
        tensors = dp2mp2()[rank]
        write_tensors(toy / f"sharded/rank_{rank}/checkpoint_{rank}.ckpt", dict(list(tensors.items())[:1]))


def _lose_ranks(toy: Path) -> None:
    shutil.rmtree(toy / "sharded/rank_1")
    shutil.rmtree(toy / "sharded/rank_3")


def _lose_files(toy: Path) -> None:
    """Of both ranks that hold the second half; a lost file of one of them is not an error."""
    (toy / RANK_3).unlink()
    (toy / "sharded/rank_1/checkpoint_1.ckpt").unlink()


def _strategy_of_another_model(toy: Path) -> None:
    shutil.rmtree(toy / "dp2mp2")
    write_strategy({"blocks.0.kernel": Layout.on({"mp": 4}, "mp", None)}, toy / "dp2mp2/ckpt_strategy_rank_0.ckpt")


def _target_strategy_of_another_model(toy: Path) -> None:
    shutil.rmtree(toy / "mp2pp2")
    write_strategy({"blocks.0.kernel": Layout.on({"mp": 4}, "mp", None)}, toy / "mp2pp2/ckpt_strategy_rank_0.ckpt")


def _strategy_of_fewer_ranks(toy: Path) -> None:
    shutil.rmtree(toy / "dp2mp2")
    mesh = {"dp": 1, "mp": 2}
    layouts = {name: Layout(tuple(mesh.values()), layout.tensor_map) for name, layout in DP2MP2.items()}
    write_strategy(layouts, toy / "dp2mp2/ckpt_strategy_rank_0.ckpt")


def _strategy_of_more_ranks(toy: Path) -> None:
    shutil.rmtree(toy / "dp2mp2")
    layouts = {name: Layout((1, 8), layout.tensor_map) for name, layout in DP2MP2.items()}
    write_strategy(layouts, toy / "dp2mp2/ckpt_strategy_rank_0.ckpt")


def _strategy_of_different_matrices(toy: Path) -> None:
    shutil.rmtree(toy / "dp2mp2")
    layouts = {**DP2MP2, "norm.bias": Layout((2, 3), ((),))}
    write_strategy(layouts, toy / "dp2mp2/ckpt_strategy_rank_0.ckpt")


def _shape_against_layout(toy: Path) -> None:
    shutil.rmtree(toy / "dp2mp2")
    layouts = {**DP2MP2, "norm.bias": Layout.on({"dp": 2, "mp": 2}, None, "mp")}
    write_strategy(layouts, toy / "dp2mp2/ckpt_strategy_rank_0.ckpt")


def _shapes_that_differ(toy: Path) -> None:
    dtype, bits = MODEL["norm.bias"]
    write_tensors(toy / RANK_3, {**dp2mp2()[3], "norm.bias": Tensor(dtype, bits[:3])})


def _uneven_cut(toy: Path) -> None:
    shutil.rmtree(toy / "mp2pp2")
    layouts = {name: Layout.on({"mp": 4}, *["mp", None][: len(layout.tensor_map)]) for name, layout in DP2MP2.items()}
    write_strategy(layouts, toy / "mp2pp2/ckpt_strategy_rank_0.ckpt")


def _duplicate_names(toy: Path) -> None:
    with open(toy / RANK_2, "ab") as file:
        file.write((toy / RANK_3).read_bytes())


def _no_checkpoint(toy: Path) -> None:
    (toy / RANK_2).write_bytes(b"PK\x03\x04" + bytes(100))


def _empty_file(toy: Path) -> None:
    (toy / RANK_2).write_bytes(b"")


def _encrypted(toy: Path) -> None:
    (toy / RANK_2).write_bytes(b"\xd8\x5e\x3a\x7f" + bytes(100))


def _several_damaged(toy: Path) -> None:
    _no_checkpoint(toy)
    _truncate(toy)
    (toy / RANK_3).write_bytes(b"<html>")


def _no_source_strategy_folder(toy: Path) -> None:
    shutil.rmtree(toy / "dp2mp2")


def _stage_missing(toy: Path) -> None:
    (toy / "mp2pp2/ckpt_strategy_rank_0.ckpt").unlink()
    (toy / "mp2pp2/ckpt_strategy_rank_1.ckpt").unlink()


def _mixed_strategies(toy: Path) -> None:
    layouts = {**DP2MP2, "norm.bias": Layout.on({"dp": 2, "mp": 2}, "mp")}
    write_strategy(layouts, toy / "dp2mp2/ckpt_strategy_rank_3.ckpt")


def _damaged_strategy(toy: Path) -> None:
    (toy / "dp2mp2/ckpt_strategy_rank_0.ckpt").write_bytes(b"\x00\xff" * 20)


def _mixed_steps(toy: Path) -> None:
    (toy / RANK_2).rename(toy / "sharded/rank_2/checkpoint-3_150.ckpt")
    (toy / RANK_3).rename(toy / "sharded/rank_3/checkpoint-3_100.ckpt")


def _target_is_a_file(toy: Path) -> None:
    (toy / "out").write_text("a file")


def _target_is_full(toy: Path) -> None:
    (toy / "out").mkdir()
    (toy / "out/notes.txt").write_text("mine")


def _target_is_a_link(toy: Path) -> None:
    (toy / "elsewhere").mkdir()
    (toy / "out").symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (_truncate, [RANK_2, "truncated"]),
        (_truncate_at_a_record, ["layers.0.weight", "held by ranks [1, 3], none of whose files is there"]),
        (_lose_ranks, ["held by ranks [1, 3], none of whose files is there"]),
        (_lose_files, ["files of some ranks are missing", "rank_3: no checkpoint file"]),
        (_strategy_of_another_model, ["no parameter in common", "strategy of another model"]),
        (_target_strategy_of_another_model, ["lacks parameters that the target strategy", "blocks.0.kernel"]),
        (_strategy_of_fewer_ranks, ["holds files of ranks [2, 3]", "for 2 ranks"]),
        (_strategy_of_more_ranks, ["contradict its strategy", "ranks 0 and 2 hold the same values"]),
        (_strategy_of_different_matrices, ["different numbers of ranks", "norm.bias on 6 ranks"]),
        (_shape_against_layout, ["does not fit the strategy", "norm.bias", "tensor of 2 dimensions"]),
        (_shapes_that_differ, ["norm.bias", "rank 3 differs"]),
        (_uneven_cut, ["norm.bias", "a dimension of 6 is to be cut into 4 pieces"]),
        (_duplicate_names, [RANK_2, "appears a second time"]),
        (_no_checkpoint, [RANK_2, "no MindSpore checkpoint", "zip archive"]),
        (_empty_file, [RANK_2, "the file is empty"]),
        (_encrypted, [RANK_2, "the file is encrypted", "dec_key"]),
        (_several_damaged, [RANK_2, RANK_3]),
        (_no_source_strategy_folder, ["no strategy file or folder at"]),
        (_stage_missing, ["pipeline stages [0] are missing"]),
        (_mixed_strategies, ["ckpt_strategy_rank_0.ckpt and ckpt_strategy_rank_3.ckpt", "keep those of one run only"]),
        (_damaged_strategy, ["ckpt_strategy_rank_0.ckpt is not a strategy file"]),
        (_mixed_steps, ["different epochs and steps", "3_150: ranks [2]", "3_100: ranks [3]"]),
        (_target_is_a_file, ["out is a file; a folder for the results was expected"]),
        (_target_is_full, ["out is not empty"]),
        (_target_is_a_link, ["out is a symbolic link"]),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_bad_input(toy: Path, spoil: Callable[[Path], None], messages: list[str]) -> None:
    spoil(toy)
    before = listing(toy)
    result = _transform(toy, "out")
    _assert_one_error(result, messages)
    assert listing(toy) == before


def test_one_rank_folder_without_strategy(toy: Path) -> None:
    result = command(["transform", "--src-checkpoint", "sharded", "--dst-checkpoint-dir", "out"], toy)
    _assert_one_error(result, ["the shards of 4 ranks, but no source strategy is given"])


def test_complete_file_with_a_strategy(toy: Path) -> None:
    result = command(["transform", "--src-checkpoint", "full.ckpt", "--src-strategy", "dp2mp2",
                      "--dst-checkpoint-dir", "out"], toy)  # fmt: skip
    _assert_one_error(result, ["full.ckpt is complete weights, but its strategy", "for 4 ranks"])


@pytest.mark.parametrize("target", ["sharded", "sharded/out", "sharded/rank_0/out", "."])
def test_target_and_source_inside_each_other(toy: Path, target: str) -> None:
    before = listing(toy)
    result = _transform(toy, target, "--overwrite")
    _assert_one_error(result, ["the target folder", "choose another folder"])
    assert listing(toy) == before


def test_target_beside_a_source_file_is_no_conflict(toy: Path) -> None:
    """The folder of a complete file may hold the result; the file is not touched."""
    result = command(["transform", "--src-checkpoint", "full.ckpt", "--dst-strategy", "dp2mp2",
                      "--dst-checkpoint-dir", "out"], toy)  # fmt: skip
    assert result.code == 0, result
    replaced = command(["transform", "--src-checkpoint", "full.ckpt", "--dst-checkpoint-dir", ".", "--overwrite"], toy)
    _assert_one_error(replaced, ["holds the source file"])
    assert (toy / "full.ckpt").is_file()


def test_a_safetensors_file_that_is_cut_off(toy: Path) -> None:
    os.truncate(toy / "full.safetensors", 500)
    result = command(["transform", "--src-checkpoint", "full.safetensors", "--dst-checkpoint-dir", "out"], toy)
    _assert_one_error(result, ["full.safetensors", "restore the file from a good copy"])


def test_a_type_that_the_format_cannot_hold(toy: Path) -> None:
    write_tensors(toy / "odd.ckpt", {"w": Tensor(by_name("complex128"), np.zeros((4, 4), "V16"))})
    before = listing(toy)
    result = command(["transform", "--src-checkpoint", "odd.ckpt", "--format", "safetensors",
                      "--dst-checkpoint-dir", "out"], toy)  # fmt: skip
    _assert_one_error(result, ["'w'", "complex128", "write a .ckpt instead"])
    assert listing(toy) == before


_needs_mounts = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0,
    reason="makes small and read-only disks in a mount namespace of its own, which only root may",
)
_DISK_IS_FULL_LATE = "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, 1 << 60); "
_NO_ROOM_RESERVED = "import os; from mindformers_ckpt.engine import sinks; sinks._reserve = os.ftruncate; "


@_needs_mounts
@pytest.mark.parametrize("processes", [1, 2])
def test_a_read_only_disk(toy: Path, processes: int) -> None:
    result = _on_a_disk(toy, "ro", f"out/here --transform-process-num {processes}")
    _assert_one_error(result, ["out cannot be written (Read-only file system)", "folder around it must be writable"])


@_needs_mounts
def test_a_disk_that_is_too_small(toy: Path) -> None:
    _write_large(toy)
    result = _on_a_disk(toy, "size=4m", "out/here", source="large.ckpt")
    _assert_one_error(result, ["the result needs 0.04 GB", "has 0.00 GB free"])


@_needs_mounts
@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_gets_full_meanwhile(toy: Path, processes: int) -> None:
    _write_large(toy)
    destination = f"out/here --transform-process-num {processes}"
    before = _DISK_IS_FULL_LATE + _NO_ROOM_RESERVED
    result = _on_a_disk(toy, "size=4m", destination, source="large.ckpt", before=before)
    _assert_one_error(result, ["writing failed: No space left on device"])


@_needs_mounts
def test_a_disk_that_another_program_fills_before_room_is_reserved(toy: Path) -> None:
    _write_large(toy)
    result = _on_a_disk(toy, "size=4m", "out/here", source="large.ckpt", before=_DISK_IS_FULL_LATE)
    _assert_one_error(result, ["cannot be written: No space left on device"])


@_needs_mounts
def test_a_disk_without_room_for_the_first_file(toy: Path) -> None:
    result = _on_a_disk(toy, "size=4k,nr_inodes=6", "out/here", before=_DISK_IS_FULL_LATE)
    _assert_one_error(result, ["No space left on device"])


@_needs_mounts
def test_a_target_that_is_a_mount_point(toy: Path) -> None:
    result = _on_a_disk(toy, "size=4m", "out --overwrite")
    _assert_one_error(result, ["is a mount point and cannot be replaced"])


def _write_large(toy: Path) -> None:
    bits = np.zeros((10, 1 << 20), np.uint32)
    write_tensors(toy / "large.ckpt", {f"w{number}": Tensor(by_name("float32"), bits[:1]) for number in range(10)})


def _on_a_disk(toy: Path, options: str, destination: str, source: str = "full.ckpt", before: str = "") -> Result:
    """Transform onto a disk of its own that vanishes with the process; stdout ends with what is left on it."""
    (toy / "out").mkdir()
    program = f"{before}from mindformers_ckpt.cli.main import main; main()"
    script = f"""
        mount -t tmpfs -o {options} tmpfs out
        {sys.executable} -c '{program}' transform --src-checkpoint {source} --dst-checkpoint-dir {destination}
        code=$?
        test -z "$(find out -mindepth 1)" || {{ find out -mindepth 1; exit 99; }}
        exit $code
    """
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script],
        cwd=toy,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def _transform(toy: Path, destination: str, *options: str) -> Result:
    return command(
        ["transform", "--src-checkpoint", "sharded", "--src-strategy", "dp2mp2", "--dst-strategy", "mp2pp2",
         "--dst-checkpoint-dir", destination, *options],
        toy,
    )  # fmt: skip


def _assert_one_error(result: Result, messages: list[str]) -> None:
    assert result.code == 1, result
    assert result.out == "", result
    assert result.err.count("error: ") == 1, result
    assert "Traceback" not in result.err, result
    for message in messages:
        assert message in result.err, result


def test_what_is_not_a_folder_of_strategies_is_not_merged(toy: Path) -> None:
    misspelt = command(["merge-strategy", "dp2mp", "merged.ckpt"], toy)
    assert (misspelt.code, misspelt.out) == (1, "")
    assert "dp2mp is not there; give the folder with the strategy files of all ranks. Did you mean 'dp2mp2'" in (
        misspelt.err
    )
    file = command(["merge-strategy", "dp2mp2/ckpt_strategy_rank_0.ckpt", "merged.ckpt"], toy)
    assert file.code == 1
    assert "ckpt_strategy_rank_0.ckpt is a file; give the folder with the strategy files" in file.err


def test_a_safetensors_file_is_not_taken_for_a_damaged_strategy(toy: Path) -> None:
    asked = ["--src-checkpoint", "full.ckpt", "--dst-checkpoint-dir", "out", "--dst-strategy", "full.safetensors"]
    refused = command(["transform", *asked], toy)
    assert refused.code == 1
    assert "full.safetensors is not a strategy file: it looks like a checkpoint" in refused.err


def test_boxes_of_a_rank_under_no_strategy_are_said_to_be_those_of_the_shard(toy: Path) -> None:
    (toy / "dp2mp2").rename(toy / "elsewhere")
    (toy / "mp2pp2").rename(toy / "elsewhere2")
    done = command(["inspect", "sharded", "--rank", "1"], toy)
    assert done.code == 0
    assert "boxes are those within the shards; give --strategy" in done.err
    assert "give --strategy" not in command(["inspect", "sharded", "--rank", "1", "--strategy", "elsewhere"], toy).err
