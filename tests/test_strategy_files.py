from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from recorded import CONFIGURATIONS, STRATEGIES, Recorded, recorded

from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.strategy.files import (
    is_strategy_folder,
    merge_strategies,
    rank_file_name,
    read_rank_file,
    read_strategy,
    write_strategy,
)
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.schema import (
    LayoutItems,
    read_layouts,
    strategy_map_class,
    unread_item_class,
    unread_map_class,
)

DP2MP2 = Layout((2, 2), ((0,), ()))
LAYOUTS = {"w": DP2MP2, "b": Layout((2, 2), ((),))}

# Where a strategy does not say what the ranks of its network hold: configuration -> kind of deviation -> what.
# "absent" is not in the strategy of its stage, "other" is a slice other than the strategy says.
TIED = "model.tok_embeddings.embedding_weight"
EXCEPTIONS = {
    # Frozen parameters under only_trainable_params=True.
    "dp2mp4_frozen": {"absent": {f"model.layers.0.{name}" for name in (
        *(f"attention.w{which}.weight" for which in "qkvo"), *(f"feed_forward.w{which}.weight" for which in "123"),
        "attention_norm.weight", "ffn_norm.weight")} | {TIED}},
    # The embedding that stage 1 shares with stage 0.
    "dp2mp2pp2_tied": {"absent": {f"{kind}{TIED}" for kind in ("", "adam_m.", "adam_v.", "accu_grads.")}},
    "dp2mp2pp2_tied_embdp": {"absent": {f"{kind}{TIED}" for kind in ("", "adam_m.", "adam_v.", "accu_grads.")}},
    "dp4pp2_opt_size2_tied": {
        "absent": {f"{kind}{TIED}" for kind in ("", "adam_m.", "adam_v.", "accu_grads.")},
        # Gradients that are not cut by the optimizer shard, although the file says so.
        "other": {f"accu_grads.model.layers.{layer}.{name}.weight" for layer in (2, 3) for name in (
            *(f"attention.w{which}" for which in "qkvo"), *(f"feed_forward.w{which}" for which in "123"))},
    },
    # Cut on the devices, whole in the checkpoint that aggregated_save writes.
    "dp4mp2_opt_aggsave": {"other": {
        f"{kind}{name}"
        for kind in ("", "adam_m.", "adam_v.")
        for name in (TIED, "lm_head.weight", *(
            f"model.layers.{layer}.{part}.weight" for layer in range(4) for part in (
                *(f"attention.w{which}" for which in "qkvo"), *(f"feed_forward.w{which}" for which in "123")))) }},
}  # fmt: skip


def job_strategy(config: Recorded, tmp_path: Path) -> Strategy:
    """The strategy of a configuration; stage 0 of the one that recorded only stage 1 comes from its neighbour."""
    if config.name != "dp2mp2pp2_tied_embdp":
        return read_strategy(config.folder)
    folder = tmp_path / "strategy"
    shutil.copytree(config.folder, folder)
    shutil.copy(STRATEGIES / "dp2mp2pp2_tied" / rank_file_name(0), folder)
    return read_strategy(folder)


def deviations(config: Recorded, strategy: Strategy) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, parameter in config.parameters.items():
        for rank, shape in parameter.shapes.items():
            assert config.stage_of_rank[rank] == strategy.stage_of(rank)
            layout = strategy.stages[strategy.stage_of(rank)].get(name)
            if layout is None:
                found.setdefault("absent", set()).add(name)
                continue
            box = layout.for_whole(parameter.full_shape).box(parameter.full_shape, rank % strategy.stage_size)
            assert layout.for_shard(box.shape) == layout.for_whole(parameter.full_shape)
            if box.shape != shape or box != parameter.slices.get(rank, box):
                found.setdefault("other", set()).add(name)
    return found


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_boxes_are_the_slices_that_the_framework_cut(name: str, tmp_path: Path) -> None:
    config = recorded(name)
    assert sum(len(parameter.shapes) for parameter in config.parameters.values()) >= 78
    assert deviations(config, job_strategy(config, tmp_path)) == EXCEPTIONS.get(name, {})


def test_only_states_of_several_axes_are_known_by_shape_alone() -> None:
    by_shape = {
        name
        for name in CONFIGURATIONS
        for parameter in recorded(name).parameters.values()
        if parameter.slices.keys() != parameter.shapes.keys()
    }
    assert by_shape == {
        "dp2mp4_layout_dpmp", "dp2mp4_layout_dpmp_json", "dp4mp2_layout_mpdp_opt", "layout_cube", "layout_mixed",
    }  # fmt: skip
    for name in by_shape:
        parameters = recorded(name).parameters.items()
        assert all(parameter.startswith("adam_") for parameter, seen in parameters if not seen.slices)


def test_a_tied_embedding_is_cut_on_the_second_stage_as_on_the_first() -> None:
    config = recorded("dp2mp2pp2_tied")
    for kind in ("", "adam_m.", "adam_v."):
        parameter = config.parameters[kind + TIED]
        assert set(parameter.slices) == set(range(8))
        for rank, box in parameter.slices.items():
            layout = config.strategy.layout(kind + TIED, config.strategy.stage_of(rank))
            assert layout is not None
            assert layout.box(parameter.full_shape, rank % 4) == box


def test_the_second_copy_of_a_tied_embedding_escapes_the_optimizer_shard() -> None:
    config = recorded("dp4pp2_opt_size2_tied")
    strategy = read_strategy(config.folder)
    for kind in ("", "adam_m.", "adam_v."):
        first, second = (strategy.layout(kind + TIED, stage) for stage in range(2))
        parameter = config.parameters[kind + TIED]
        assert first is not None
        assert second is not None
        assert (first.optimizer_pieces, second.optimizer_pieces) == (2, 1)
        assert {second.box(parameter.full_shape, rank % 4) for rank in (4, 7)} == set(parameter.slices.values())


def test_aggregated_save_says_what_the_checkpoint_holds() -> None:
    config = recorded("dp4mp2_opt_aggsave")
    on_device = recorded("dp4mp2_opt").strategy
    assert {layout.optimizer_shards for layout in config.strategy.stages[0].values()} == {0}
    for name in EXCEPTIONS["dp4mp2_opt_aggsave"]["other"]:
        layout = on_device.stages[0][name]
        shape = config.parameters[name].full_shape
        for rank, box in config.parameters[name].slices.items():
            assert layout.box(shape, rank) == box


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_files_of_all_ranks_say_the_same_as_one(name: str) -> None:
    config = recorded(name)
    if name == "dp2mp2pp2_tied_embdp":
        with pytest.raises(StrategyError, match=r"pipeline stages \[0\] are missing \(stages \[1\] are there\)"):
            read_strategy(config.folder)
        return
    by_folder = read_strategy(config.folder)
    if name == "dp4pp2_opt_size2_tied":  # a pipeline without a merged file
        with pytest.raises(StrategyError, match="of pipeline stage 0 alone; give the merged file or the folder"):
            read_strategy(config.file)
        return
    by_file = read_strategy(config.file)
    assert by_folder.stages == by_file.stages
    assert by_folder.stage_size == by_file.stage_size
    assert is_strategy_folder(config.folder)


@pytest.mark.parametrize("name", ["dp2mp2pp2", "dp1mp4pp2", "pp4", "dp2pp4", "dp2mp2pp2_json"])
def test_merging_again_gives_the_recorded_strategy(name: str, tmp_path: Path) -> None:
    config = recorded(name)
    merged = tmp_path / "new" / f"merged{config.file.suffix}"
    returned = merge_strategies(config.folder, merged)
    assert returned.stages == read_strategy(merged).stages == config.strategy.stages
    # A single file that stands for the job must not be the file of one stage.
    stage_file = next(config.folder.glob(f"ckpt_strategy_rank_0.{config.file.suffix[1:]}"))
    with pytest.raises(StrategyError, match="of pipeline stage 0 alone"):
        read_strategy(stage_file)
    last = max(config.folder.glob("ckpt_strategy_rank_*"))
    with pytest.raises(StrategyError, match=f"of pipeline stage {len(config.strategy.stages) - 1} alone"):
        read_strategy(last)


def test_merging_into_the_folder_itself(tmp_path: Path) -> None:
    folder = tmp_path / "strategy"
    shutil.copytree(recorded("dp2mp2pp2").folder, folder)
    target = folder / "merged_ckpt_strategy.ckpt"
    target.write_bytes(b"old")
    with pytest.raises(StrategyError, match="is not a strategy file and is not replaced"):
        merge_strategies(folder, target)
    merge_strategies(folder, target, anything=True)
    assert read_strategy(target).stages == read_strategy(folder).stages
    assert sorted(folder.glob(".*")) == []


def test_merging_needs_all_stages_and_leaves_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "strategy"
    folder.mkdir()
    shutil.copy(recorded("pp4").folder / rank_file_name(2), folder)
    target = tmp_path / "merged.ckpt"
    target.write_bytes(b"old")
    with pytest.raises(StrategyError, match=r"pipeline stages \[0, 1\] are missing \(stages \[2\] are there\)"):
        merge_strategies(folder, target, anything=True)
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", ["ckpt", "json"])
def test_written_files_are_read_back(suffix: str, tmp_path: Path) -> None:
    layouts = {
        "w": Layout((2, 4), ((0,), ()), -1, 4),
        "v": Layout((8,), ((), (0,))),
        "b": Layout((2, 2, 2), ((),), 2, 1),
        "scale": Layout((8,), ()),
    }
    for rank in range(16):
        write_strategy(layouts, tmp_path / rank_file_name(rank, suffix), stage=rank // 8)
    strategy = read_strategy(tmp_path)
    assert strategy.stages == (layouts, layouts)
    assert (strategy.stage_size, strategy.rank_count) == (8, 16)
    merged = tmp_path / "merged" / f"merged.{suffix}"
    merge_strategies(tmp_path, merged)
    assert read_strategy(merged).stages == (layouts, layouts)


def test_several_axes_are_written_to_ckpt_alone(tmp_path: Path) -> None:
    layouts = {"w": Layout((2, 2, 2), ((2, 0), ())), "b": Layout((2, 2, 2), ((1, 0),))}
    path = tmp_path / "strategy.ckpt"
    write_strategy(layouts, path)
    (stage,) = read_strategy(path).stages
    assert stage["w"].for_shard((4, 4)) == layouts["w"]
    assert stage["b"].for_shard((4,)) == layouts["b"]
    with pytest.raises(StrategyError, match=r"w: a dimension cut along several axes cannot be written as JSON"):
        write_strategy(layouts, tmp_path / "strategy.json")
    assert not (tmp_path / "strategy.json").exists()


@pytest.mark.parametrize("suffix", ["ckpt", "json"])
def test_names_with_hyphens_and_numbers(suffix: str, tmp_path: Path) -> None:
    layouts = {"my-layer-0.weight": DP2MP2, "3-w": DP2MP2, "-": DP2MP2, "名字": DP2MP2}
    path = tmp_path / f"strategy.{suffix}"
    write_strategy(layouts, path)
    assert read_strategy(path).stages == (layouts,)
    for rank in range(8):
        write_strategy(layouts, tmp_path / "all" / rank_file_name(rank, suffix), stage=rank // 4)
    merge_strategies(tmp_path / "all", tmp_path / f"merged.{suffix}")
    assert read_strategy(tmp_path / f"merged.{suffix}").stages == (layouts, layouts)


def test_names_that_all_look_like_those_of_a_merged_file(tmp_path: Path) -> None:
    layouts = {"0-w": DP2MP2, "1-w": DP2MP2}
    write_strategy(layouts, tmp_path / "strategy.ckpt")
    assert read_strategy(tmp_path / "strategy.ckpt").stages == (layouts,)


def test_a_folder_with_a_merged_file_alone(tmp_path: Path) -> None:
    shutil.copy(recorded("dp2mp2pp2").file, tmp_path)
    assert is_strategy_folder(tmp_path)
    assert read_strategy(tmp_path).stages == recorded("dp2mp2pp2").strategy.stages
    with pytest.raises(StrategyError, match="no strategy file"):
        merge_strategies(tmp_path, tmp_path / "merged.ckpt")


def test_missing_replicas_of_files_do_no_harm(tmp_path: Path) -> None:
    for rank in (1, 6):
        shutil.copy(recorded("dp2mp2pp2").folder / rank_file_name(rank), tmp_path)
    assert read_strategy(tmp_path).stages == recorded("dp2mp2pp2").strategy.stages


def message_bytes(layouts: Mapping[str, Layout], change: Callable[[Any], None], tmp_path: Path) -> bytes:
    """The content of a strategy file, changed in its protobuf message."""
    write_strategy(layouts, tmp_path / "plain.ckpt")
    message = strategy_map_class()()
    message.ParseFromString((tmp_path / "plain.ckpt").read_bytes())
    change(message)
    data: bytes = message.SerializeToString()
    return data


@pytest.mark.parametrize(
    ("sizes", "offsets"),
    [
        ([64, 32, 96, 64], [0, 64, 96, 192]),  # as MindSpore writes it
        ([64, 32], [0, 64]),  # as many as the tensor has dimensions
        ([64, 32, 96, 64], []),
        ([], [0, 64]),
    ],
)
def test_an_uneven_split_is_refused_by_name(sizes: list[int], offsets: list[int], tmp_path: Path) -> None:
    def split(message: Any) -> None:
        fields = message.parallel_layout_item[0].parallel_layouts
        fields.param_split_shape[0].dim.extend(sizes)
        fields.indices_offset[0].dim.extend(offsets)

    path = tmp_path / "strategy.ckpt"
    path.write_bytes(message_bytes(LAYOUTS, split, tmp_path))
    with pytest.raises(StrategyError, match=r"- w: split manually into uneven pieces \(sizes .*, offsets .*save the"):
        read_strategy(path)
    items = {"w": {"dev_matrix": [2, 2], "tensor_map": [0, -1], "param_split_shape": sizes, "indices_offset": offsets}}
    (tmp_path / "strategy.json").write_text(json.dumps({"parallel_layout_item": items}))
    with pytest.raises(StrategyError, match="- w: split manually into uneven pieces"):
        read_strategy(tmp_path / "strategy.json")


def test_the_shape_of_a_slice_is_no_uneven_split(tmp_path: Path) -> None:
    """MindFormers' save_strategy_file writes it; see also tests/data for what MindSpore writes."""

    def record_shapes(message: Any) -> None:
        for item, shape in zip(message.parallel_layout_item, ([16, 32], [64])):
            item.parallel_layouts.param_split_shape[0].dim.extend(shape)

    path = tmp_path / "strategy.ckpt"
    path.write_bytes(message_bytes(LAYOUTS, record_shapes, tmp_path))
    assert read_strategy(path).stages == (LAYOUTS,)


def in_parts(data: bytes, cut: int) -> bytes:
    """A strategy file whose layouts are written in two parts, after so many of their fields, which protobuf joins."""
    message = unread_map_class()()
    message.ParseFromString(data)
    for number, written in enumerate(message.parallel_layout_item):
        item = unread_item_class()()
        item.ParseFromString(written)
        (whole,) = item.parallel_layouts
        layouts = read_layouts([whole])
        first = type(layouts)()
        for field, value in layouts.ListFields()[:cut]:
            if isinstance(value, int):
                setattr(first, field.name, value)
            else:
                getattr(first, field.name).extend(value)
            layouts.ClearField(field.name)
        del item.parallel_layouts[:]
        item.parallel_layouts.extend(part.SerializePartialToString() for part in (first, layouts))
        message.parallel_layout_item[number] = item.SerializeToString()
    return bytes(message.SerializeToString())


@pytest.mark.parametrize("cut", range(8))
def test_a_layout_in_two_parts(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "strategy.ckpt"
    data = in_parts(message_bytes(LAYOUTS, lambda message: None, tmp_path), cut)
    path.write_bytes(data)
    assert read_strategy(path).stages == (LAYOUTS,)
    oracle = strategy_map_class()()
    oracle.ParseFromString(data)
    assert [len(item.parallel_layouts.dev_matrix) for item in oracle.parallel_layout_item] == [1] * len(LAYOUTS)


def field(number: int, content: bytes) -> bytes:
    """A field of a message as protobuf writes it."""
    return bytes([number << 3 | 2, len(content)]) + content


ITEM_FIELDS = st.one_of(
    st.sampled_from([b"a", b"b", "ä".encode(), b"\xff", b"a" * 127]).map(lambda name: field(1, name)),
    st.sampled_from([b"", b"x", b"y"]).map(lambda layouts: field(2, layouts)),
    st.sampled_from([field(3, b"unknown"), field(1, b"a")[:-1], b"\x0a\x81\x00c", b"\x0a"]),
)


@given(st.lists(st.lists(ITEM_FIELDS, max_size=5).map(b"".join), max_size=8))
def test_items_read_together_are_what_protobuf_reads_of_each(items: list[bytes]) -> None:
    reader = LayoutItems()
    for item in [*items, *items]:
        message = unread_item_class()()
        try:
            message.ParseFromString(item)
            expected = (message.param_name, tuple(message.parallel_layouts)) if message.IsInitialized() else None
        except (DecodeError, UnicodeDecodeError):  # the second in pure Python
            expected = None
        try:
            found = reader.read(item)
        except (DecodeError, UnicodeDecodeError):  # the second in pure Python
            found = None
        assert found == expected


def test_a_damaged_layout_before_a_sound_one(tmp_path: Path) -> None:
    message = unread_map_class()()
    message.ParseFromString(message_bytes(LAYOUTS, lambda message: None, tmp_path))
    item = unread_item_class()()
    item.ParseFromString(message.parallel_layout_item[0])
    item.parallel_layouts.insert(0, b"\x0a\x02op\x12\x02\x12\x1b")
    message.parallel_layout_item[0] = item.SerializeToString()
    path = tmp_path / "strategy.ckpt"
    path.write_bytes(message.SerializeToString())
    with pytest.raises(StrategyError, match="is not a strategy file"):
        read_strategy(path)


def test_a_parameter_that_stands_twice(tmp_path: Path) -> None:
    def repeat(message: Any) -> None:
        message.parallel_layout_item.append(message.parallel_layout_item[0])

    def contradict(message: Any) -> None:
        message.parallel_layout_item[1].param_name = "w"

    path = tmp_path / "strategy.ckpt"
    path.write_bytes(message_bytes(LAYOUTS, repeat, tmp_path))
    assert read_strategy(path).stages == (LAYOUTS,)
    path.write_bytes(message_bytes(LAYOUTS, contradict, tmp_path))
    with pytest.raises(StrategyError, match="- w: it stands twice in the file, with different layouts"):
        read_strategy(path)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    pipe = tmp_path / rank_file_name(0)
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        with pytest.raises(StrategyError, match="cannot be read: it is not a regular file"):
            read_strategy(path)


def test_many_missing_stages_are_not_all_listed(tmp_path: Path) -> None:
    for rank, stage in ((0, 0), (1, 65535)):
        write_strategy({"w": Layout((1,), ((),))}, tmp_path / rank_file_name(rank), stage)
    with pytest.raises(StrategyError, match=r"stages \[1, 2, .*, 20, …\] \(65534\) are missing \(stages \[0, 65535\]"):
        read_strategy(tmp_path)


def test_more_ranks_than_any_job_has(tmp_path: Path) -> None:
    layout = Layout((1 << 19,), ((),))
    assert Layout((1 << 20,), ((),)).rank_count == 1 << 20
    for extents in ((1 << 20, 2), (2**31 - 1, 2**31 - 1), (2,) * 21, (1 << 4000,)):
        with pytest.raises(StrategyError, match="no job has more than 1048576"):
            Layout(extents, ((),))
    assert Strategy.of_stages(({"w": layout},) * 2, "here").rank_count == 1 << 20
    with pytest.raises(StrategyError, match="here: 3 pipeline stages of 524288 ranks"):
        Strategy.of_stages(({"w": layout},) * 3, "here")


def test_all_unusable_layouts_are_listed(tmp_path: Path) -> None:
    def spoil(message: Any) -> None:
        for item in message.parallel_layout_item:
            item.parallel_layouts.tensor_map[0].dim[0] = 7

    path = tmp_path / "strategy.ckpt"
    path.write_bytes(message_bytes(LAYOUTS, spoil, tmp_path))
    with pytest.raises(StrategyError, match=r"(?s)strategy.ckpt: layouts.*- w: the tensor map .*- b: the tensor map"):
        read_strategy(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; a strategy file was expected"),
        (b"garbage \xff\x00", "is not a strategy file"),
        (b"{", "is not a strategy file"),
        (b"{}", "is not a strategy file"),
        (b'{"parallel_layout_item": {"w": {"dev_matrix": [2]}}}', "is not a strategy file"),
        (b'{"parallel_layout_item": [1]}', "is not a strategy file"),
        (b'{"parallel_layout_item": {"w": {"dev_matrix": ["x"], "tensor_map": [0]}}}', "is not a strategy file"),
        (b'{"parallel_layout_item": {"w": {"dev_matrix": [2], "tensor_map": [null]}}}', "is not a strategy file"),
        (b'{"parallel_layout_item": {"w": {"dev_matrix": 2, "tensor_map": [0]}}}', "is not a strategy file"),
        (b'{"parallel_layout_item": {}}', "no parameter has a layout"),
        (b"\x08\x02", "no parameter has a layout"),
    ],
)
def test_files_that_are_no_strategies(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "strategy.ckpt"
    path.write_bytes(content)
    with pytest.raises(StrategyError, match=message) as raised:
        read_strategy(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["dp2mp2pp2", "dp2mp4_json"])
def test_truncated_files(name: str, tmp_path: Path) -> None:
    whole = recorded(name).file.read_bytes()
    path = tmp_path / recorded(name).file.name
    for length in range(1, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        try:
            strategy = read_strategy(path)
        except StrategyError as error:
            assert str(path) in str(error)
        else:  # cut between two parameters, or in what is not read
            assert strategy.names() <= recorded(name).strategy.names()


def test_a_checkpoint_is_no_strategy(tmp_path: Path) -> None:
    from recorded import random_model, write_tensors

    path = write_tensors(tmp_path / "model.ckpt", random_model({"w": (4, 4)}))
    with pytest.raises(StrategyError, match=r"model\.ckpt"):
        read_strategy(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match="no strategy file or folder at"):
        read_strategy(tmp_path / "nothing")
    with pytest.raises(StrategyError, match=r"no strategy file \(ckpt_strategy_rank_<n>.ckpt\) in this folder"):
        read_strategy(tmp_path)
    assert not is_strategy_folder(tmp_path)
    assert not is_strategy_folder(tmp_path / "nothing")


def test_files_of_different_runs_are_refused(tmp_path: Path) -> None:
    write_strategy(LAYOUTS, tmp_path / rank_file_name(0))
    write_strategy({"w": Layout((4,), ((0,), ()))}, tmp_path / rank_file_name(3))
    with pytest.raises(StrategyError, match=r"(?s)files of different runs are mixed.*rank_0.ckpt and .*rank_3.ckpt"):
        read_strategy(tmp_path)


def test_a_stale_file_of_a_larger_run_is_refused(tmp_path: Path) -> None:
    for rank in (0, 1, 2, 3, 5):
        write_strategy(LAYOUTS, tmp_path / rank_file_name(rank))
    with pytest.raises(StrategyError, match=r"rank_5\.ckpt says stage 0, but rank 5 of 4 does not exist"):
        read_strategy(tmp_path)


def test_a_file_of_the_wrong_stage_is_refused(tmp_path: Path) -> None:
    for rank, stage in enumerate((0, 0, 0, 1, 1, 1, 1, 1)):
        write_strategy(LAYOUTS, tmp_path / rank_file_name(rank), stage)
    with pytest.raises(StrategyError, match=r"rank_3\.ckpt says stage 1, but rank 3 of 8 belongs to stage 0"):
        read_strategy(tmp_path)


def test_layouts_on_different_numbers_of_ranks_are_refused(tmp_path: Path) -> None:
    write_strategy({"w": DP2MP2, "v": Layout((8,), ((0,), ()))}, tmp_path / "strategy.ckpt")
    with pytest.raises(StrategyError, match=r"different numbers of ranks: w on 4 ranks.*, v on 8 ranks"):
        read_strategy(tmp_path / "strategy.ckpt")


def test_both_flavours_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_strategy(LAYOUTS, tmp_path / rank_file_name(0, "ckpt"))
    write_strategy(LAYOUTS, tmp_path / rank_file_name(1, "json"))
    with pytest.raises(StrategyError, match=r"\.ckpt and \.json strategy files are mixed"):
        read_strategy(tmp_path)
    shutil.copy(tmp_path / rank_file_name(1, "json"), tmp_path / rank_file_name(0, "json"))
    with pytest.raises(StrategyError, match=r"\.ckpt and \.json strategy files are mixed"):
        read_strategy(tmp_path)


def test_two_files_of_one_rank_are_refused(tmp_path: Path) -> None:
    write_strategy(LAYOUTS, tmp_path / "ckpt_strategy_rank_0.ckpt")
    write_strategy(LAYOUTS, tmp_path / "old_rank_0.ckpt")
    with pytest.raises(StrategyError, match="are both strategy files of rank 0"):
        read_strategy(tmp_path)


def test_a_merged_file_under_the_name_of_a_rank_is_refused(tmp_path: Path) -> None:
    shutil.copy(recorded("pp4").file, tmp_path / rank_file_name(0))
    with pytest.raises(StrategyError, match="is a merged strategy under the name of a rank's file"):
        read_strategy(tmp_path)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StrategyError, match="cannot write the strategy file"):
        write_strategy(LAYOUTS, tmp_path / "file" / "strategy.ckpt")


def test_the_strategy_of_complete_weights() -> None:
    strategy = Strategy.complete()
    assert strategy.is_complete
    assert (strategy.rank_count, strategy.names(), strategy.layout("w", 0)) == (1, frozenset(), None)
    assert strategy.describe() == "complete weights"
    assert recorded("dp1").strategy.is_complete
    assert recorded("dp2mp2pp2").strategy.describe().startswith("8 ranks, 2 pipeline stages of 4 (")
    with pytest.raises(StrategyError, match="no parameter has a layout"):
        Strategy.of_stages(({},), "here")


def test_a_json_file_with_several_axes_is_the_protobuf_file() -> None:
    as_json, as_message = recorded("dp2mp4_layout_dpmp_json"), recorded("dp2mp4_layout_dpmp")
    assert as_json.strategy.names() == as_message.strategy.names()
    joined = 0
    for name, parameter in as_json.parameters.items():
        fitted = as_json.strategy.stages[0][name].for_whole(parameter.full_shape)
        assert fitted == as_message.strategy.stages[0][name].for_whole(parameter.full_shape)
        joined += any(len(axes) > 1 for axes in fitted.tensor_map)
    assert joined > 50
    content = json.loads(as_json.file.read_bytes())
    assert max(len(item["tensor_shape"]) for item in content["parallel_layout_item"].values()) == 3


def test_recorded_boxes_are_boxes() -> None:
    parameter = recorded("dp2mp4").parameters["lm_head.weight"]
    assert parameter.slices[5] == Box((64, 0), (128, 64))


class TestMindSporeAgrees:
    """MindSpore's own functions on the same files."""

    @pytest.fixture(autouse=True)
    def _mindspore(self) -> None:
        pytest.importorskip("mindspore")

    @pytest.mark.parametrize("name", ["dp2mp2pp2", "dp2mp2pp2_tied", "dp1mp4pp2", "pp4", "dp2pp4", "dp2mp2pp2_json"])
    def test_merged_file(self, name: str, tmp_path: Path) -> None:
        import mindspore as ms

        folder = tmp_path / "strategy"
        folder.mkdir()
        for file in recorded(name).folder.glob("ckpt_strategy_rank_*"):
            shutil.copy(file, folder)
        suffix = recorded(name).file.suffix
        theirs, ours = tmp_path / f"theirs{suffix}", tmp_path / f"ours{suffix}"
        ms.parallel.merge_pipeline_strategys(str(folder), str(theirs))
        merge_strategies(folder, ours)
        assert by_stage(ours) == by_stage(theirs)
        assert read_strategy(theirs).stages == read_strategy(ours).stages

    def test_a_written_file_is_merged_as_a_recorded_one(self, tmp_path: Path) -> None:
        import mindspore as ms

        for rank in range(8):
            write_strategy(LAYOUTS, tmp_path / "all" / rank_file_name(rank), rank // 4)
        ms.parallel.merge_pipeline_strategys(str(tmp_path / "all"), str(tmp_path / "merged.ckpt"))
        assert read_strategy(tmp_path / "merged.ckpt").stages == (LAYOUTS, LAYOUTS)


def by_stage(path: Path) -> Any:
    """The content of a merged strategy file with its items sorted by stage: MindSpore's order is that of the disk."""
    if path.suffix == ".json":
        content = json.loads(path.read_bytes())
        items = content["parallel_layout_item"]
        order = sorted(items, key=lambda name: int(name.partition("-")[0]))
        return content["current_stage"], content["parallel_strategy_item"], [(name, items[name]) for name in order]
    message = strategy_map_class()()
    message.ParseFromString(path.read_bytes())
    strategies = sorted(message.parallel_strategy_item, key=lambda item: item.parallel_strategys.stage)
    layouts = sorted(message.parallel_layout_item, key=lambda item: int(item.param_name.partition("-")[0]))
    return message.current_stage, strategies, layouts


def test_layouts_that_are_written_alike_are_one_object(tmp_path: Path) -> None:
    """Their bytes are parsed once, however many parameters have them."""
    layouts = {f"layers.{number}.w{kind}": Layout((2, 2), ((kind,), ())) for number in range(50) for kind in range(2)}
    write_strategy(layouts, tmp_path / "ckpt_strategy_rank_0.ckpt")
    found = read_rank_file(tmp_path / "ckpt_strategy_rank_0.ckpt")
    assert found == layouts
    assert len({id(layout) for layout in found.values()}) == 2


@pytest.mark.parametrize("implementation", ["python", "upb"])
def test_both_implementations_of_protobuf_read_the_same(implementation: str) -> None:
    """A job has the one in pure Python: MindSpore sets the variable when it is imported."""
    program = """
import sys
from google.protobuf.internal import api_implementation
from mindformers_ckpt.strategy.files import read_strategy
print(api_implementation.Type(), *(repr(read_strategy(path)) for path in sys.argv[1:]), sep="\\n")
"""
    paths = [STRATEGIES / name for name in ("dp2mp2pp2", "dp2mp4")]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)],
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": implementation},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [implementation, *(repr(read_strategy(path)) for path in paths)]
