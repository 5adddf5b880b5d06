"""The Python API: what is public, what it returns, that it needs no MindSpore, and that the page says what it is."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import api_page
import ml_dtypes
import numpy as np
import pytest
from generated_pages import stale
from recorded import assert_same, read_ranks, read_tensors, write_ranks
from toy import DP2MP2, MODEL, MP2PP2, dp2mp2, environment, mp2pp2, write_toy

import mindformers_ckpt as mc
from mindformers_ckpt.geometry.box import Box


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy(folder)
    write_ranks(folder / "pipeline", mp2pp2())
    return folder


def numbers(name: str) -> np.ndarray[Any, Any]:
    """A tensor of the toy as numpy has it."""
    dtype, bits = MODEL[name]
    kind: Any = ml_dtypes.bfloat16 if dtype.name == "bfloat16" else dtype.name
    return np.asarray(bits.view(kind))


def same(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()


# ------------------------------------------------------------------------------------------- names


def test_the_page_is_what_the_docstrings_say() -> None:
    assert not stale(api_page.pages()), "run: python tools/api_page.py"


def test_every_public_name_has_a_section_of_the_page() -> None:
    placed = {name for _, names in api_page._SECTIONS for name in names}
    assert set(mc.__all__) - {"__version__"} <= placed
    assert dir(mc) == sorted(mc.__all__)


def test_the_import_is_light_and_needs_no_mindspore() -> None:
    code = (
        "import sys, mindformers_ckpt as mc\n"
        "heavy = {'numpy', 'click', 'google.protobuf', 'mindspore', 'yaml', 'ml_dtypes', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "[getattr(mc, name) for name in mc.__all__]\n"
        "assert 'mindspore' not in sys.modules and 'click' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["mc.transform, mc.convert", "0"])
def test_a_function_stays_one_when_the_room_of_its_name_is_imported(order: str) -> None:
    """`convert` is a room and a function, `transform` a module and a function; old imports go on."""
    code = (
        f"import mindformers_ckpt as mc\n{order}\n"
        "from mindformers_ckpt.convert.run import Request\n"
        "from mindformers_ckpt.transform import transform as run_plan\n"
        "import mindformers_ckpt.convert.model\n"
        "assert callable(mc.transform) and callable(mc.convert), (mc.transform, mc.convert)\n"
        "assert mc.transform is not run_plan\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- a checkpoint


@pytest.mark.parametrize(
    ("path", "strategy"),
    [
        ("full.ckpt", None),
        ("full.safetensors", None),
        ("sharded", "dp2mp2"),
        ("pipeline", "mp2pp2"),
    ],
)
def test_tensors_are_whole_however_they_are_cut(toy: Path, path: str, strategy: str | None) -> None:
    with mc.open_checkpoint(toy / path, toy / strategy if strategy else None) as checkpoint:
        assert set(checkpoint) == set(MODEL)
        assert len(checkpoint) == len(MODEL)
        for name in MODEL:
            whole, tensor = numbers(name), checkpoint[name]
            assert (tensor.shape, tensor.dtype, tensor.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
            assert same(np.asarray(tensor), whole)
            assert same(tensor[...], whole)
        weight, whole = checkpoint["layers.0.weight"], numbers("layers.0.weight")
        for index in (
            *(0, -1, slice(2, 5), slice(None, None, 3), slice(6, 1, -2), slice(9, 20)),
            *((slice(3, 7), 4), (..., slice(1, 3)), (2, ...), (slice(None), slice(None, None, -1)), (-3, -2)),
        ):
            assert same(weight[index], np.asarray(whole[index])), index
        assert len(weight) == 8


def test_what_is_not_an_index_is_told(toy: Path) -> None:
    tensor = mc.open_checkpoint(toy / "full.ckpt")["layers.0.weight"]
    outside: tuple[Any, ...] = (8, -9, (0, 6), (0, 0, 0), (..., ...))
    for index in outside:
        with pytest.raises(IndexError):
            tensor[index]
    others: tuple[Any, ...] = ([1, 2], True, None, "a", 1.0)
    for index in others:
        with pytest.raises(TypeError, match="an index is an integer, a slice or"):
            tensor[index]
    with pytest.raises(TypeError, match="scalar"):
        len(mc.open_checkpoint(toy / "full.ckpt")["global_step"])


def test_layouts_shards_and_what_a_rank_holds(toy: Path) -> None:
    checkpoint = mc.open_checkpoint(str(toy / "sharded"), mc.read_strategy(toy / "dp2mp2"))
    weight = checkpoint["layers.0.weight"]
    assert weight.layout == DP2MP2["layers.0.weight"]
    assert [(shard.box, shard.ranks) for shard in weight.shards] == [
        (Box((0, 0), (8, 3)), (0, 2)),
        (Box((0, 3), (8, 6)), (1, 3)),
    ]
    assert weight.shards[1].path.parent == toy / "sharded" / "rank_1"
    assert checkpoint["global_step"].layout is None
    for rank, tensors in dp2mp2().items():
        for name, tensor in tensors.items():
            assert checkpoint.shard(rank, name).tobytes() == tensor.bits.tobytes()
    assert (checkpoint.kind, checkpoint.ranks, checkpoint.warnings) == ("rank folders", (0, 1, 2, 3), ())
    with pytest.raises(KeyError, match="not in the files of rank 0"):
        checkpoint.shard(0, "nothing")
    pipeline = mc.open_checkpoint(toy / "pipeline", toy / "mp2pp2")
    assert pipeline["layers.1.weight"].stages == (1,)
    assert set(pipeline.boxes("layers.1.weight")) == {2, 3}
    assert MP2PP2[1]["norm.bias"] == pipeline["norm.bias"].layout


def test_just_the_bytes_of_a_part_are_read(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader: Any = importlib.import_module("mindformers_ckpt.engine.fetcher")
    read: list[tuple[str, int]] = []

    def fill(descriptor: int, path: Path, offset: int, view: memoryview) -> None:
        read.append((path.parent.name, len(view)))
        real(descriptor, path, offset, view)

    real = reader.fill
    monkeypatch.setattr(reader, "fill", fill)
    checkpoint = mc.open_checkpoint(toy / "sharded", toy / "dp2mp2")
    assert read == []
    checkpoint["embedding.weight"][5:7]  # bfloat16 [8, 6], rows 4 to 8 on ranks 1 and 3
    assert read == [("rank_1", 2 * 6 * 2)]


def test_files_are_closed_with_the_checkpoint_or_when_nobody_has_it(toy: Path) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    with mc.open_checkpoint(toy / "sharded", toy / "dp2mp2") as checkpoint:
        np.asarray(checkpoint["embedding.weight"])
        assert open_files() > before
    assert open_files() == before
    checkpoint = mc.open_checkpoint(toy / "sharded", toy / "dp2mp2")
    np.asarray(checkpoint["embedding.weight"])
    assert open_files() > before
    del checkpoint
    assert open_files() == before


def test_shards_that_no_file_holds(toy: Path, tmp_path: Path) -> None:
    write_ranks(tmp_path, {rank: tensors for rank, tensors in dp2mp2().items() if rank in (0, 2)})
    checkpoint = mc.open_checkpoint(tmp_path, toy / "dp2mp2")
    assert same(checkpoint["embedding.weight"][:4], numbers("embedding.weight")[:4])
    with pytest.raises(mc.PlanError, match=r"\[4:8, 0:6\] is held by ranks \[1, 3\], none of whose files is there"):
        checkpoint["embedding.weight"][:5]


def test_several_checkpoints_are_not_one(toy: Path) -> None:
    with pytest.raises(mc.PlanError, match=r"several checkpoints|same name"):
        mc.open_checkpoint(toy)
    with pytest.raises(mc.PlanError, match="no source strategy is given"):
        mc.open_checkpoint(toy / "sharded")


# ------------------------------------------------------------------------------------------- plan and transform


def test_transform_is_the_command(toy: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = mc.transform(
        toy / "sharded",
        tmp_path / "result",
        src_strategy=toy / "dp2mp2",
        dst_strategy=mc.read_strategy(toy / "mp2pp2"),
        progress=lambda done, total: told.append((done, total)),
    )
    assert (report.destination, report.files, report.warnings) == (tmp_path / "result", 4, ())
    assert told[-1] == (report.bytes_written, report.bytes_written)
    found = read_ranks(tmp_path / "result")
    for rank, tensors in mp2pp2().items():
        assert_same(found[rank], tensors)


def test_a_plan_is_made_first_and_run_later(toy: Path, tmp_path: Path) -> None:
    job = mc.plan(toy / "sharded", tmp_path / "whole", src_strategy=toy / "dp2mp2", format="safetensors")
    assert not (tmp_path / "whole").exists()
    assert job.plan.bytes_written == sum(numbers(name).nbytes for name in MODEL)
    with pytest.raises(mc.ConfigError, match="the plan decides"):
        mc.transform(job, format="ckpt")
    mc.transform(job)
    assert_same(read_tensors(tmp_path / "whole/rank_0/checkpoint_0.safetensors"), MODEL)
    job = mc.plan(toy / "full.ckpt")
    with pytest.raises(mc.ConfigError, match="no folder is given"):
        mc.transform(job)


def test_a_part_of_the_ranks_is_put_beside_the_others(toy: Path, tmp_path: Path) -> None:
    for ranks in ((0, 1), (2, 3)):
        mc.transform(toy / "full.ckpt", tmp_path / "result", dst_strategy=toy / "dp2mp2", ranks=ranks, crc=True)
    assert read_ranks(tmp_path / "result").keys() == {0, 1, 2, 3}
    with pytest.raises(mc.PublishError, match="already holds"):
        mc.transform(toy / "full.ckpt", tmp_path / "result", dst_strategy=toy / "dp2mp2", ranks=[0])


def test_all_that_is_wrong_is_a_checkpoint_error(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(mc.StrategyError):
        mc.transform(toy / "full.ckpt", tmp_path / "x", dst_strategy=toy / "nowhere")
    with pytest.raises(mc.PlanError):
        mc.plan(toy / "nothing.ckpt")
    with pytest.raises(mc.CheckpointError):
        mc.convert(toy / "nothing", tmp_path / "x")
    with pytest.raises(mc.ConfigError, match="scaling is the whole factor"):
        mc.merge_lora(toy / "full.ckpt", tmp_path / "x", scaling=2.0, alpha=16.0)
    assert not (tmp_path / "x").exists()


def test_arguments_are_checked_as_options_are(toy: Path, tmp_path: Path) -> None:
    """All at once; a value that means nothing is not taken for another one."""
    source, out = toy / "full.ckpt", tmp_path / "out"
    with pytest.raises(mc.ConfigError) as caught:
        mc.plan(source, "", prefix="a/b", contents="maybe", format="pt", step=3)  # type: ignore[arg-type]
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()[1:]] == [
        f"  - {name}" for name in ("dst", "step", "prefix", "format", "contents")
    ]
    wrong: list[tuple[Any, str]] = [
        (lambda: mc.transform(source, out, processes=0), "processes: a whole number of at least 1"),
        (lambda: mc.convert(source, out, dtype="int8"), "dtype: one of fp32, bf16, fp16"),
        (lambda: mc.convert(source, out, num_layers=0), "num_layers: a whole number of at least 1"),
        (lambda: mc.convert(source, out, hf_config=" "), "hf_config: the path is empty"),
        (lambda: mc.merge_lora("", out, format="safetensor"), "src: the path is empty"),
    ]
    for call, said in wrong:
        with pytest.raises(mc.ConfigError, match=said):
            call()
    with pytest.raises(
        TypeError, match=r"convert\(\) got an unexpected keyword argument 'modle'\. Did you mean 'model'"
    ):
        mc.convert(source, out, modle="llama")
    assert not out.exists()
