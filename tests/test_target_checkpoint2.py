"""Checkpoint 2.0 as a result: what is written is read back whole, and says what MindFormers' own files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import COMMON, SAMPLES
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from recorded import (
    STRATEGIES,
    Tensor,
    assert_same,
    random_model,
    read_ranks,
    read_tensors,
    recorded,
    slices_of,
    write_ranks,
    write_tensors,
)
from small_llama import hugging_face_weights, weights, write_config, write_pytorch, write_two_ranks_strategy

from mindformers_ckpt.cli.main import cli
from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.formats import read_header
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout, without_optimizer_shards
from mindformers_ckpt.strategy.files import read_strategy

FLOAT32, INT32 = by_name("float32"), by_name("int32")


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def transform(source: Path, out: Path, *options: object, code: int = 0) -> str:
    return run("transform", "--src-checkpoint", source, "--dst-checkpoint-dir", out, *options, code=code)


def metadata_of(saved: Path) -> Any:
    (file,) = saved.glob("iteration_*/metadata.json")
    return json.loads(file.read_text())


def without_names(metadata: Any) -> Any:
    """What is compared with MindFormers' own: all but the names of axes, and which ranks share a slice."""
    for entry in metadata["state_dict_metadata"].values():
        entry["layout"]["alias_name"] = len(entry["layout"]["alias_name"])
        entry["chunk"].sort(key=str)
    for places in metadata["storage_data"].values():
        for place in places:
            del place["rank_group"]
    return metadata


CASES = ("mf1.9.0/dp2tp2", "mf2.1.0/dp2tp2", "mf2.1.0/pp2dp2tp2", "mf2.1.0/dp2tp2_weights_bf16")
RECORDED = ("dp2mp2pp2_tied", "dp4mp2_opt", "dp4mp2_opt_size2", "dp4mp2_layout_mpdp_opt", "dp4mp2_ep4_moe")


@pytest.mark.parametrize("case", CASES)
def test_what_mindformers_wrote_is_written_again(case: str, tmp_path: Path) -> None:
    """Through complete weights and back: the same tensors in the same files, the same metadata and counters."""
    saved = SAMPLES / case
    transform(saved, tmp_path / "whole", "--format", "safetensors")
    file = tmp_path / "whole/rank_0/checkpoint_0.safetensors"
    transform(file, tmp_path / "saved", "--format", "checkpoint2", "--dst-strategy", saved, "--prefix", "tiny")
    made = tmp_path / "saved"
    number = 7 if (made / "iteration_00000007").exists() else 0
    assert (made / "latest_checkpointed_iteration.txt").read_text() == str(number)
    assert without_names(metadata_of(made)) == without_names(metadata_of(saved))
    originals = sorted(saved.glob("iteration_*/*.safetensors"))
    assert [path.name for path in sorted(made.glob("iteration_*/*.safetensors"))] == [path.name for path in originals]
    for original in originals:
        copy = made / f"iteration_{number:08d}" / original.name
        assert_same(read_tensors(copy), read_tensors(original))
        assert read_header(copy).metadata == {"format": "ms"}
    if "bf16" in case:
        assert not (made / "iteration_00000000/common.json").exists()
    else:
        common = json.loads((saved / "iteration_00000007/common.json").read_text())
        assert json.loads((made / "iteration_00000007/common.json").read_text()) == {
            key: value for key, value in common.items() if key in COMMON
        }


def test_the_layout_of_metadata_is_in_the_order_that_mindformers_unpacks(tmp_path: Path) -> None:
    saved = SAMPLES / "mf2.1.0/dp2tp2"
    transform(saved, tmp_path / "out", "--format", "checkpoint2", "--dst-strategy", saved)
    keys = ["device_matrix", "tensor_map", "interleaved_parallel", "alias_name", "rank_list"]
    assert all(list(entry["layout"]) == keys for entry in metadata_of(tmp_path / "out")["state_dict_metadata"].values())


@pytest.mark.parametrize("name", RECORDED)
def test_rank_files_of_any_strategy_become_a_checkpoint_2_and_come_back(name: str, tmp_path: Path) -> None:
    """Optimizer shards and tied embeddings, too: every rank has in the end what it had, and the counters."""
    config = recorded(name)
    shapes = {key: item.full_shape for key, item in config.parameters.items() if not key.startswith("accu_grads")}
    counters = {"global_step": (1,), "epoch_num": (), "step_num": ()}
    tensors = {
        **random_model(shapes),
        **{key: Tensor(INT32, np.full(shape, 5, np.uint32)) for key, shape in counters.items()},
    }
    parts = slices_of(config, tensors, replicated=tuple(counters))
    write_ranks(tmp_path / "ranks", parts)
    as_new = ("--format", "checkpoint2", "--dst-strategy", config.folder)
    said = transform(tmp_path / "ranks", tmp_path / "saved", "--src-strategy", config.folder, *as_new)
    assert "the source tells no global_batch_size" in said
    common = json.loads((tmp_path / "saved/iteration_00000005/common.json").read_text())
    assert common == {"epoch_num": 5, "step_num": 5, "global_step": 5, "loss_scale": None, "global_batch_size": None}
    transform(tmp_path / "saved", tmp_path / "back", "--format", "ckpt", "--dst-strategy", config.folder)
    for rank, found in read_ranks(tmp_path / "back").items():
        for key, tensor in parts[rank].items():
            assert found[key].bits.tobytes() == tensor.bits.tobytes() or key in ("epoch_num", "step_num")
        assert [int(found[key].bits) for key in ("epoch_num", "step_num")] == [5, 5]
    assert not read_strategy(tmp_path / "saved").stages[0].keys() & counters.keys()


def test_convert_makes_a_checkpoint_2(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "hf")
    write_pytorch(folder / "model.safetensors", hugging_face_weights(1))
    strategy = write_two_ranks_strategy(tmp_path / "strategy")
    paths = ("--input-path", folder, "--output-path")
    run("convert", *paths, tmp_path / "saved", "--format", "checkpoint2", "--dst-strategy", strategy)
    assert sorted(path.name for path in (tmp_path / "saved/iteration_00000000").iterdir()) == [
        "CKP-model-0000000-0000002.safetensors",
        "CKP-model-0000001-0000002.safetensors",
        "metadata.json",
    ]
    transform(tmp_path / "saved", tmp_path / "whole")
    assert_whole(read_tensors(tmp_path / "whole/rank_0/checkpoint_0.safetensors"), weights(1))
    # Of one card: complete weights that know their names and go back.
    run("convert", *paths, tmp_path / "single", "--format", "checkpoint2")
    back = ("--input-path", tmp_path / "single", "--output-path", tmp_path / "again")
    run("convert", "--reversed", "--hf-config", folder, *back)
    assert_whole(read_tensors(tmp_path / "again/model.safetensors"), hugging_face_weights(1))
    assert "of the MindSpore side" in run(
        *("convert", "--reversed", "--format", "checkpoint2", "--hf-config", folder),
        *("--input-path", tmp_path / "single", "--output-path", tmp_path / "no"),
        code=1,
    )


def assert_whole(found: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(np.ascontiguousarray(found[name].bits).view(np.float32), array)


def test_merge_lora_makes_a_checkpoint_2_of_one(tmp_path: Path) -> None:
    tensors = weights(1)
    name = "model.layers.0.attention.wk.weight"
    module = f"{name[: -len('.weight')]}.mindpet_delta_lora"
    rows, columns = tensors[name].shape
    factors = {f"{module}_a": np.ones((1, columns), np.float32), f"{module}_b": np.ones((rows, 1), np.float32)}
    kind = FLOAT32
    held = {key: Tensor(kind, array.view(kind.carrier)) for key, array in {**tensors, **factors}.items()}
    write_tensors(tmp_path / "lora.ckpt", held)
    run(
        *("merge-lora", "--src-ckpt-path-or-dir", tmp_path / "lora.ckpt", "--dst-ckpt-dir", tmp_path / "out"),
        *("--lora-scaling", 2, "--save-format", "checkpoint2"),
    )
    (file,) = (tmp_path / "out/iteration_00000000").iterdir()
    tensors[name] = tensors[name] + np.float32(2)
    assert_whole(read_tensors(file), tensors)


def test_what_a_checkpoint_2_cannot_be_made_of(tmp_path: Path) -> None:
    saved = SAMPLES / "mf2.1.0/dp2tp2"
    as_new = ("--format", "checkpoint2", "--dst-strategy", saved)
    assert "made of all ranks at once" in transform(saved, tmp_path / "out", *as_new, "--ranks", "0", code=2)
    for name in ("a", "b"):
        write_tensors(tmp_path / f"two/{name}.ckpt", random_model({"w": (2,)}))
    assert "holds several checkpoints (a, b)" in transform(
        tmp_path / "two", tmp_path / "out", "--format", "checkpoint2", code=1
    )
    step = {"global_step": Tensor(INT32, np.full(1, 2**32 - 5, np.uint32))}
    write_tensors(tmp_path / "negative.ckpt", {**random_model({"w": (2,)}), **step})
    said = transform(tmp_path / "negative.ckpt", tmp_path / "out", "--format", "checkpoint2", code=1)
    assert "global_step or step_num is -5, and a checkpoint 2.0 is named after it" in said
    plan = ("plan", "--src-checkpoint", saved, *as_new)
    assert "16 files to write" not in run(*plan)
    assert "run transform instead" in run(*plan, "--out", tmp_path / "plan.json", code=2)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_2_is_verified_and_compared(tmp_path: Path) -> None:
    """By its manifest, against its source, and with another one; a byte that is wrong is seen."""
    saved, target = SAMPLES / "mf2.1.0/dp2tp2", SAMPLES / "mf2.1.0/pp2dp2tp2"
    options = ("--format", "checkpoint2", "--dst-strategy", target, "--hash", "--fingerprint")
    transform(saved, tmp_path / "out", *options)
    run("verify", tmp_path / "out")
    run("verify", tmp_path / "out", "--against", saved)
    assert "16 tensors are equal bit for bit, 0 differ" in run("diff", tmp_path / "out", saved)
    file = tmp_path / "out/iteration_00000007/CKP-model-0000001-0000008.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert file.name in run("verify", tmp_path / "out", code=1)
    assert file.name in run("verify", tmp_path / "out", "--against", saved, code=1)


# ---------------------------------------------------------------------------------------------- geometry


@st.composite
def sharded(draw: st.DrawFn) -> Layout:
    matrix = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3)))
    axes = list(draw(st.permutations(range(len(matrix)))))
    first, second = draw(st.integers(0, len(axes))), draw(st.integers(0, len(axes)))
    map_ = (tuple(axes[:first]), tuple(axes[first : first + second]))
    plain = Layout(matrix, map_)
    free = plain.rank_count // int(np.prod(plain.cuts))
    pieces = draw(st.sampled_from([-1, 0, *(value for value in range(1, free + 1) if free % value == 0)]))
    return Layout(matrix, map_, pieces)


@given(sharded())
def test_an_optimizer_shard_is_a_cut_along_further_axes(layout: Layout) -> None:
    try:
        plain = without_optimizer_shards(layout)
    except StrategyError as error:
        assert "is not a cut along axes" in str(error)
        return
    assert plain.optimizer_shards == 0
    assert plain.same_slices(layout)


@pytest.mark.parametrize(
    ("layout", "plain"),
    [
        (Layout((4, 2), ((0,), ()), -1), Layout((4, 2), ((0, 1), ()))),
        (Layout((4, 2), ((0,), ()), 2), Layout((2, 2, 2), ((0, 1), ()))),
        (Layout((2, 2, 2), ((1,), ()), 4), Layout((2, 2, 2), ((1, 2, 0), ()))),
        (Layout((8,), ((), ()), 8), Layout((8,), ((0,), ()))),
        (Layout((2, 3), ((), ())), Layout((2, 3), ((), ()))),
    ],
)
def test_optimizer_shards_by_hand(layout: Layout, plain: Layout) -> None:
    assert without_optimizer_shards(layout) == plain


def test_recorded_optimizer_shards_can_all_be_said() -> None:
    for folder in sorted(STRATEGIES.iterdir()):
        config = recorded(folder.name)
        if not config.file.name.startswith("merged") and "pp" in folder.name:
            continue  # the files of some ranks
        for stage in config.strategy.stages:
            for name, layout in stage.items():
                if not layout.flat_shape and name in config.parameters:
                    fitted = layout.for_whole(config.parameters[name].full_shape)
                    assert without_optimizer_shards(fitted).same_slices(fitted), (folder.name, name)
