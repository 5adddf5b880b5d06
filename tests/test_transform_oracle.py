"""The same checkpoints re-sliced by us and by `mindspore.transform_checkpoints`, and compared with what the
framework itself cut (slices.json)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded import (
    Recorded,
    Tensor,
    assert_ranks,
    assert_same,
    random_model,
    read_ranks,
    recorded,
    slices_of,
    write_ranks,
)

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.model import Plan
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.files import merge_strategies, rank_file_name, read_strategy, write_strategy
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.transform import transform

# Source and target configuration. "dp1" is complete weights. Every configuration of which all ranks were
# recorded occurs on both sides.
# Every configuration occurs in one of these.
_ALWAYS = """
dp1 dp1mp4pp2
dp1 dp2mp4_kvrep_opt
dp1 layout_mixed
dp1 pp4
dp2mp2pp2 dp4mp2_opt
dp2mp2pp2_json mp8
dp2mp2pp2_tied dp2mp2_tied
dp2mp4 dp4mp2
dp2mp4_json dp4mp2_opt_json
dp2mp4_layout_dpmp dp4mp2_opt_size2
dp2mp4_layout_dpmp dp8
dp4mp2_2d dp8_opt
layout_cube dp1
dp2mp4_infer mp4_infer
"""
_SLOW = """
dp1 dp2mp2pp2_json
dp1 dp4mp2_opt
dp1 mp8
dp1mp4pp2 dp1
dp1mp4pp2 dp2mp4
dp1mp4pp2 pp4
dp2mp2pp2 dp1mp4pp2
dp2mp2pp2_tied dp1
dp2mp4 dp2mp2pp2
dp2mp4 mp8
dp2mp4 pp4
dp2mp4_kvrep_opt dp1
dp4mp2 dp2mp4_layout_dpmp
dp4mp2_2d layout_mixed
dp4mp2_opt dp1
dp4mp2_opt dp2mp2pp2
dp4mp2_opt dp4mp2_2d
dp4mp2_opt_json dp2mp4_json
dp4mp2_opt_json dp4mp2
dp4mp2_opt_size2 dp1mp4pp2
dp4mp2_opt_size2 dp2mp2_tied
dp8 dp4mp2_2d
dp8_opt dp1
dp8_opt dp1mp4pp2
dp8_opt dp4mp2_opt_size2
layout_cube mp8
layout_mixed dp2mp4
mp8 dp1
mp8 dp4mp2_opt
mp8 dp8_opt
mp8 layout_cube
pp4 dp1
pp4 dp2mp2pp2
dp2mp2pp2_json dp2mp4_infer
mp4_infer dp2mp4_infer
"""
ALWAYS, SLOW = ([tuple(line.split()) for line in text.split("\n") if line] for text in (_ALWAYS, _SLOW))
PAIRS = ALWAYS + SLOW

# In no strategy: every rank holds them whole.
REPLICATED = {"global_step": (), "loss_scale": (), "epoch_num": (1,), "overflow_flags": (3,)}
_SOME_STATES = re.compile(r"adam_m\..*(wq|w2|lm_head|norm_out)\.weight|adam_m\..*embedding_weight")
TIED = "model.tok_embeddings.embedding_weight"

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:mindspore")


@pytest.fixture(scope="module")
def ms() -> Any:
    mindspore = pytest.importorskip("mindspore")
    if mindspore.get_context("device_target") != "CPU":
        mindspore.set_device("CPU")  # refused once another test has run a kernel
    return mindspore


def common_model(source: Recorded, target: Recorded) -> dict[str, Tensor]:
    """Random weights and states of what both configurations have.

    Gradients are not in checkpoints, and of the states here are but some: MindSpore's time goes by the number
    of tensors.
    """
    names = {
        name: parameter.full_shape
        for name, parameter in source.parameters.items()
        if name in target.parameters and (name.startswith(("model.", "lm_head.")) or _SOME_STATES.fullmatch(name))
    }
    assert all(target.parameters[name].full_shape == shape for name, shape in names.items())
    # A checkpoint ends in what is in no strategy; MindSpore writes those last whatever their place.
    return random_model({**names, **REPLICATED})


def strategy_of(config: Recorded) -> Strategy:
    return Strategy.complete() if config.strategy.is_complete else config.strategy


def our_plan(source: Path, strategy: Strategy, target: Strategy, **options: Any) -> Plan:
    return build_plan(Checkpoint(find_source(source), strategy), target, **options)


def recorded_plan(root: Path, source: Recorded, target: Recorded, **options: Any) -> Plan:
    return our_plan(root, strategy_of(source), strategy_of(target), allow_missing=True, **options)


def assert_mindspore_loads(ms: Any, root: Path, expected: Mapping[int, Mapping[str, Tensor]]) -> None:
    """mindspore.load_checkpoint finds in every file what the rank should hold."""
    for rank, tensors in expected.items():
        (path,) = (root / f"rank_{rank}").iterdir()
        loaded = ms.load_checkpoint(str(path), format=path.suffix[1:])
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert str(loaded[name].dtype) == tensor.dtype.ckpt, name
            assert loaded[name].shape == tensor.bits.shape, name
            assert bytes(loaded[name].get_bytes()) == tensor.bits.tobytes(), name


def test_the_pairs() -> None:
    assert len(PAIRS) == len(set(PAIRS)) == 49
    assert {name for pair in ALWAYS for name in pair} == {name for pair in PAIRS for name in pair}
    complete = {name for pair in PAIRS for name in pair if recorded(name).is_complete}
    assert len(complete) == 20
    assert sum(from_one_stage(recorded(source), recorded(target)) for source, target in PAIRS) == 40


def from_one_stage(source: Recorded, target: Recorded) -> bool:
    """Whether every target rank takes its tensors from one stage. MindSpore joins stages in an order of its own."""
    stage_of = {name: stage for stage, layouts in enumerate(source.strategy.stages) for name in layouts}
    return all(len({stage_of[name] for name in layouts if name in stage_of}) == 1 for layouts in target.strategy.stages)


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id="-".join(pair), marks=[pytest.mark.slow] if pair in SLOW else []) for pair in PAIRS],
)
def test_our_result_is_that_of_mindspore(pair: tuple[str, str], ms: Any, tmp_path: Path) -> None:
    source, target = map(recorded, pair)
    model = common_model(source, target)
    root = write_ranks(tmp_path / "source", slices_of(source, model, REPLICATED))
    transform(recorded_plan(root, source, target), tmp_path / "ours")
    expected = slices_of(target, model, REPLICATED)
    assert_ranks(tmp_path / "ours", expected)

    files = [None if config.strategy.is_complete else str(config.file) for config in (source, target)]
    ms.transform_checkpoints(str(root), str(tmp_path / "theirs"), "checkpoint_", *files)
    assert_ranks(tmp_path / "theirs", expected)
    identical = set()
    for rank in expected:
        name = Path(f"rank_{rank}", f"checkpoint_{rank}.ckpt")
        ours, theirs = (tmp_path / "ours" / name).read_bytes(), (tmp_path / "theirs" / name).read_bytes()
        assert len(ours) == len(theirs)
        identical.add(ours == theirs)
    assert identical == {from_one_stage(source, target)}
    assert_mindspore_loads(ms, tmp_path / "ours", expected)


@pytest.mark.parametrize(
    ("name", "other"),
    [("dp2mp4", "dp1"), ("dp1", "layout_cube"), ("dp2mp2pp2", "dp4mp2_opt"), ("dp4mp2_opt", "dp1mp4pp2")],
)
@pytest.mark.parametrize(("source_format", "format"), [("safetensors", "safetensors"), ("ckpt", "safetensors")])
def test_safetensors(name: str, other: str, source_format: str, format: str, ms: Any, tmp_path: Path) -> None:
    source, target = recorded(name), recorded(other)
    model = common_model(source, target)
    root = write_ranks(tmp_path / "source", slices_of(source, model, REPLICATED), source_format)
    transform(recorded_plan(root, source, target, format=format), tmp_path / "ours")
    expected = slices_of(target, model, REPLICATED)
    assert_ranks(tmp_path / "ours", expected)
    assert_mindspore_loads(ms, tmp_path / "ours", expected)


def test_a_strategy_that_we_wrote_is_read_by_mindspore(ms: Any, tmp_path: Path) -> None:
    mesh = {"dp": 2, "sp": 2, "mp": 2}
    layouts = {
        "plain": Layout.on(mesh, "mp", None),
        "both": Layout.on(mesh, "mp", "dp"),
        "several": Layout.on(mesh, ("mp", "dp"), None),
        "optimizer": Layout.on(mesh, None, "mp", optimizer_shards=-1),
        "whole": Layout.on(mesh, None),
        "vector": Layout.on(mesh, "sp"),
    }
    # MindSpore reads the step, we do not: a single free axis, the innermost one that does not cut.
    layouts["optimizer"] = Layout(layouts["optimizer"].device_matrix, ((), (0,)), 4, 2)
    shapes = {"plain": (8, 4), "both": (8, 4), "several": (16, 4), "optimizer": (8, 4), "whole": (6,), "vector": (8,)}
    strategy = Strategy.of_stages((layouts,), "written")
    model = random_model({**shapes, "global_step": ()})
    write_strategy(layouts, tmp_path / "strategy.ckpt")
    root = write_ranks(tmp_path / "complete", {0: model})
    transform(our_plan(root, Strategy.complete(), strategy), tmp_path / "ours")
    ms.transform_checkpoints(str(root), str(tmp_path / "theirs"), "checkpoint_", None, str(tmp_path / "strategy.ckpt"))
    expected = cut(strategy, model)
    assert_ranks(tmp_path / "ours", expected)
    assert_ranks(tmp_path / "theirs", expected)
    back = read_strategy(tmp_path / "strategy.ckpt")
    transform(our_plan(tmp_path / "theirs", back, Strategy.complete()), tmp_path / "back")
    assert_ranks(tmp_path / "back", {0: model})


def test_a_pipeline_strategy_that_we_wrote_and_merged_is_read_by_mindspore(ms: Any, tmp_path: Path) -> None:
    stages = tuple(
        {f"layer.{stage}.w": Layout((2, 2), ((0,), ())), f"layer.{stage}.v": Layout((4,), ((), (0,)))}
        for stage in range(2)
    )
    for rank in range(8):
        write_strategy(stages[rank // 4], tmp_path / "strategy" / rank_file_name(rank), rank // 4)
    merged = tmp_path / "merged.ckpt"
    strategy = merge_strategies(tmp_path / "strategy", merged)
    model = random_model({f"layer.{stage}.{name}": (8, 8) for stage in range(2) for name in "wv"})
    root = write_ranks(tmp_path / "complete", {0: model})
    transform(our_plan(root, Strategy.complete(), strategy), tmp_path / "ours")
    ms.transform_checkpoints(str(root), str(tmp_path / "theirs"), "checkpoint_", None, str(merged))
    for rank, tensors in cut(strategy, model).items():
        assert_same(read_ranks(tmp_path / "ours")[rank], tensors)
        assert_same(read_ranks(tmp_path / "theirs")[rank], tensors)
    ms.transform_checkpoints(str(tmp_path / "ours"), str(tmp_path / "back"), "checkpoint_", str(merged), None)
    assert_ranks(tmp_path / "back", {0: model})


# What MindSpore cannot do, checked against the cut of the true tensor.


def cut(strategy: Strategy, model: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What every rank should hold; a parameter that no stage names is whole on all ranks."""
    named = strategy.names()
    ranks: dict[int, dict[str, Tensor]] = {rank: {} for rank in range(strategy.rank_count)}
    for rank, tensors in ranks.items():
        stage = strategy.stages[strategy.stage_of(rank)]
        for name, tensor in model.items():
            if name in stage:
                tensors[name] = tensor.part(stage[name].box(tensor.bits.shape, rank % strategy.stage_size))
            elif name not in named:
                tensors[name] = tensor
    return ranks


def check_against_the_cut(source: Strategy, target: Strategy, model: Mapping[str, Tensor], tmp_path: Path) -> None:
    root = write_ranks(tmp_path / "source", cut(source, model))
    transform(our_plan(root, source, target), tmp_path / "ours")
    assert_ranks(tmp_path / "ours", cut(target, model))


@pytest.mark.parametrize("counts", [(3, 4), (4, 3), (6, 8), (8, 6), (4, 6), (12, 9)])
def test_incumbent_finding_11_rank_counts_that_do_not_divide(counts: tuple[int, int], ms: Any, tmp_path: Path) -> None:
    """MindSpore: "Cannot transform device_num from 4 to 6"."""
    source, target = (
        Strategy.of_stages(({"w": Layout((count,), ((0,), ())), "v": Layout((count,), ((), (0,)))},), f"mp{count}")
        for count in counts
    )
    model = random_model({"w": (72, 4), "v": (5, 72), "global_step": ()})
    check_against_the_cut(source, target, model, tmp_path)
    for strategy in (source, target):
        write_strategy(strategy.stages[0], tmp_path / f"{strategy.origin}.ckpt")
    files = [str(tmp_path / f"{strategy.origin}.ckpt") for strategy in (source, target)]
    with pytest.raises(ValueError, match="Cannot transform device_num"):
        ms.transform_checkpoints(str(tmp_path / "source"), str(tmp_path / "theirs"), "checkpoint_", *files)


def test_incumbent_finding_12_names_with_hyphens(ms: Any, tmp_path: Path) -> None:
    """MindSpore: "invalid literal for int() with base 10: 'my'"."""
    stages = ({"my-w": Layout((2,), ((0,), ())), "1-w": Layout((2,), ((), ()))}, {"7-v": Layout((2,), ((), (0,)))})
    for rank in range(4):
        write_strategy(stages[rank // 2], tmp_path / "strategy" / rank_file_name(rank), rank // 2)
    source = merge_strategies(tmp_path / "strategy", tmp_path / "merged.ckpt")
    assert source.stages == stages == read_strategy(tmp_path / "merged.ckpt").stages
    target = Strategy.of_stages(
        ({"my-w": Layout((4,), ((), (0,))), "1-w": Layout((4,), ((0,), ())), "7-v": Layout((4,), ((0,), ()))},), "mp4"
    )
    check_against_the_cut(source, target, random_model({"my-w": (4, 4), "1-w": (8, 2), "7-v": (4, 6)}), tmp_path)
    with pytest.raises(ValueError, match=r"invalid literal for int\(\)|too many values to unpack"):
        ms.transform_checkpoints(
            str(tmp_path / "source"), str(tmp_path / "theirs"), "checkpoint_", str(tmp_path / "merged.ckpt"), None
        )


@pytest.mark.parametrize("other", ["dp1", "mp8", "dp2mp2pp2", "dp2mp4_layout_dpmp"])
@pytest.mark.parametrize("back", [False, True])
def test_json_strategies_with_several_axes(other: str, back: bool, ms: Any, tmp_path: Path) -> None:
    """MindSpore: "the tensor map dimensions must match the tensor shape dimensions"."""
    source, target = recorded("dp2mp4_layout_dpmp_json"), recorded(other)
    if back:
        source, target = target, source
    model = common_model(source, target)
    root = write_ranks(tmp_path / "source", slices_of(source, model, REPLICATED))
    transform(recorded_plan(root, source, target), tmp_path / "ours")
    assert_ranks(tmp_path / "ours", slices_of(target, model, REPLICATED))
    files = [None if config.strategy.is_complete else str(config.file) for config in (source, target)]
    # Where both sides cut along several axes it fails in its framework.
    refusals = "[Tt]he tensor map dimensions (must match|should be equal)", "is not a valid redistrbution op"
    with pytest.raises((ValueError, RuntimeError), match="|".join(refusals)):
        ms.transform_checkpoints(str(root), str(tmp_path / "theirs"), "checkpoint_", *files)


@pytest.mark.parametrize("name", ["dp2pp4", "dp4mp2_ep4_moe", "dp4mp2_layout_mpdp_opt", "dp2mp4_fused_qkv"])
def test_configurations_of_which_some_ranks_were_recorded(name: str, tmp_path: Path) -> None:
    """To complete weights and back; the slices that were not recorded are those of the layout."""
    config = recorded(name)
    model = random_model(
        {name: seen.full_shape for name, seen in config.parameters.items() if not name.startswith("accu_grads.")}
    )
    expected = slices_of(config, model)
    root = write_ranks(tmp_path / "source", expected)
    transform(our_plan(root, config.strategy, Strategy.complete()), tmp_path / "complete")
    assert_ranks(tmp_path / "complete", {0: model})
    transform(our_plan(tmp_path / "complete", Strategy.complete(), config.strategy), tmp_path / "back")
    assert_ranks(tmp_path / "back", expected)


def test_a_tied_embedding_reaches_the_last_stage_of_a_pipeline(tmp_path: Path) -> None:
    source = recorded("dp2mp2pp2_tied")
    target = read_strategy(recorded("dp4pp2_opt_size2_tied").folder)
    shapes = {name: seen.full_shape for name, seen in source.parameters.items() if not name.startswith("accu_grads.")}
    model = random_model(shapes)
    root = write_ranks(tmp_path / "source", slices_of(source, model))
    transform(our_plan(root, source.strategy, target), tmp_path / "ours")
    found = read_ranks(tmp_path / "ours")
    slices = recorded("dp4pp2_opt_size2_tied").parameters
    for rank in (4, 7):
        assert TIED in found[rank]
        expected = {name: model[name].part(seen.slices[rank]) for name, seen in slices.items() if name in model}
        assert_same(found[rank], expected)


def test_a_tied_embedding_of_one_stage_does_not_reach_the_second(ms: Any, tmp_path: Path) -> None:
    """Neither strategy tells that the last stage shares it. MindSpore leaves it out as well."""
    source, target = recorded("dp8"), recorded("dp2mp2pp2_tied")
    model = common_model(source, target)
    root = write_ranks(tmp_path / "source", slices_of(source, model, REPLICATED))
    transform(recorded_plan(root, source, target), tmp_path / "ours")
    ms.transform_checkpoints(str(root), str(tmp_path / "theirs"), "checkpoint_", str(source.file), str(target.file))
    expected = slices_of(target, model, REPLICATED)
    for rank in range(4, 8):
        for kind in ("", "adam_m."):
            del expected[rank][kind + TIED]
    assert_ranks(tmp_path / "ours", expected)
    assert_ranks(tmp_path / "theirs", expected)


# What the incumbent does silently wrong.


MP4 = Strategy.of_stages(({"w": Layout((4,), ((0,), ())), "v": Layout((4,), ((), (0,)))},), "mp4")
MP2 = Strategy.of_stages(({"w": Layout((2,), ((0,), ())), "v": Layout((2,), ((), (0,)))},), "mp2")


def test_incumbent_finding_2_bfloat16_needs_no_numpy_type(tmp_path: Path) -> None:
    """MindSpore fails on bf16 with numpy 2. We move its bits as uint16."""
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    model = {"w": Tensor(by_name("bfloat16"), bits), "v": Tensor(by_name("bfloat16"), bits.T.copy())}
    check_against_the_cut(MP4, MP2, model, tmp_path)
    assert by_name("bfloat16").carrier == np.dtype(np.uint16)


def test_incumbent_finding_4_parameter_in_one_strategy_only(tmp_path: Path) -> None:
    """MindSpore gives every rank some raw shard of it, half of the data gone. We give it whole, and say so."""
    target = Strategy.of_stages(({"w": MP2.stages[0]["w"]},), "mp2 without v")
    model = random_model({"w": (8, 4), "v": (4, 8)})
    root = write_ranks(tmp_path / "source", cut(MP4, model))
    plan = our_plan(root, MP4, target)
    assert plan.warnings == ("not in the target strategy, every target rank gets them whole: v",)
    transform(plan, tmp_path / "ours")
    assert_ranks(
        tmp_path / "ours", {rank: {**tensors, "v": model["v"]} for rank, tensors in cut(target, model).items()}
    )


def test_incumbent_finding_4_the_other_way_round(tmp_path: Path) -> None:
    source = Strategy.of_stages(({"w": MP4.stages[0]["w"]},), "mp4 without v")
    model = random_model({"w": (8, 4), "v": (4, 8)})
    root = write_ranks(tmp_path / "source", cut(source, model))
    plan = our_plan(root, source, MP2)
    assert plan.warnings == ("not in the source strategy, taken as whole in every source file: v",)
    transform(plan, tmp_path / "ours")
    assert_ranks(tmp_path / "ours", cut(MP2, model))


def test_incumbent_finding_5_strategy_for_fewer_ranks(tmp_path: Path) -> None:
    """MindSpore makes 12x4 of 16x4 when 4 files are read with a strategy of 3 ranks."""
    root = write_ranks(tmp_path / "source", cut(MP4, random_model({"w": (16, 4)})))
    strategy = Strategy.of_stages(({"w": Layout((3,), ((0,), ()))},), "mp3")
    with pytest.raises(PlanError, match=r"files of ranks \[3\], but the strategy mp3 is for 3 ranks"):
        our_plan(root, strategy, Strategy.complete())


def test_incumbent_finding_5_strategy_for_more_ranks(tmp_path: Path) -> None:
    root = write_ranks(tmp_path / "source", cut(MP4, random_model({"w": (16, 4)})))
    strategy = Strategy.of_stages(({"w": Layout((8,), ((0,), ()))},), "mp8")
    with pytest.raises(PlanError, match=r"w\[32, 4\]: the box \[16:20, 0:4\] is held by ranks \[4\], none of whose"):
        our_plan(root, strategy, Strategy.complete())


def test_incumbent_finding_5_no_strategy(tmp_path: Path) -> None:
    """MindSpore uses rank 0 alone."""
    root = write_ranks(tmp_path / "source", cut(MP4, random_model({"w": (16, 4)})))
    with pytest.raises(PlanError, match="no source strategy is given"):
        our_plan(root, Strategy.complete(), MP2)


def test_incumbent_finding_5_cut_along_another_dimension(tmp_path: Path) -> None:
    """MindSpore puts the parts together the wrong way. Nothing in the files tells, if all shapes allow it."""
    root = write_ranks(tmp_path / "source", cut(MP4, random_model({"w": (64, 64)})))
    strategy = Strategy.of_stages(({"w": Layout((4,), ((), (0,)))},), "other")
    plan = our_plan(root, strategy, Strategy.complete())
    assert [spec.shape for spec in plan.targets[0].tensors] == [(16, 256)]


def test_incumbent_finding_5_replicated_strategy_over_sliced_files(tmp_path: Path) -> None:
    """MindSpore takes rank 0's shard for the whole. Replicas that differ give it away."""
    root = write_ranks(tmp_path / "source", cut(MP4, random_model({"w": (64, 64), "v": (64, 64)})))
    strategy = Strategy.of_stages(({"w": Layout((4,), ((), ())), "v": Layout((4,), ((), ()))},), "dp4")
    with pytest.raises(PlanError, match=r"(?s)contradict its strategy \(dp4\).*w: ranks 0 and \d should hold the same"):
        our_plan(root, strategy, Strategy.complete())


def test_incumbent_finding_6_optimizer_shard_recorded_but_not_cut(tmp_path: Path) -> None:
    """MindSpore returns (32, 4) with duplicated rows. Equal contents of all ranks give it away."""
    root = write_ranks(tmp_path / "source", {rank: random_model({"w": (64, 16)}) for rank in range(2)})
    strategy = Strategy.of_stages(({"w": Layout((2,), ((), ()), -1, 1)},), "dp2 optimizer shard")
    with pytest.raises(PlanError, match="ranks 0 and 1 hold the same values"):
        our_plan(root, strategy, Strategy.complete())


def test_frozen_parameters_that_the_strategy_does_not_name(tmp_path: Path) -> None:
    """only_trainable_params=True leaves them out of the strategy, although they are cut."""
    config = recorded("dp2mp4_frozen")
    model = random_model({name: seen.full_shape for name, seen in config.parameters.items()})
    ranks = slices_of(config, model)
    frozen = "model.layers.0.attention.wq.weight"
    for rank, tensors in ranks.items():
        tensors[frozen] = model[frozen].part(recorded("dp2mp4").parameters[frozen].slices[rank])
    root = write_ranks(tmp_path / "source", ranks)
    with pytest.raises(PlanError, match=r"(?s)contradict its strategy.*only_trainable_params: False.*wq\.weight"):
        our_plan(root, config.strategy, Strategy.complete())


def test_incumbent_finding_9_a_truncated_file_fails_the_run(tmp_path: Path) -> None:
    """With two processes MindSpore returns normally, and a rank is missing from its output."""
    root = write_ranks(tmp_path / "source", cut(MP4, random_model({"w": (16, 4)})))
    os.truncate(root / "rank_3" / "checkpoint_3.ckpt", 30)
    with pytest.raises(ValueError, match=r"rank_3.*truncated"):
        our_plan(root, MP4, MP2)
    assert not (tmp_path / "ours").exists()


def test_incumbent_finding_10_lost_replicas(ms: Any, tmp_path: Path) -> None:
    """MindSpore: "The checkpoint file of rank2 is needed for converting rank0's checkpoint, but it is missing"."""
    layouts = {"w": Layout((2, 2), ((0,), ())), "v": Layout((2, 2), ((), (0,)))}
    source = Strategy.of_stages((layouts,), "dp2mp2")
    model = random_model({"w": (8, 4), "v": (4, 8), "global_step": ()})
    ranks = cut(source, model)
    del ranks[1], ranks[2]
    root = write_ranks(tmp_path / "source", ranks)
    transform(our_plan(root, source, MP4), tmp_path / "ours")
    assert_ranks(tmp_path / "ours", cut(MP4, model))
    write_strategy(layouts, tmp_path / "source.ckpt")
    write_strategy(MP4.stages[0], tmp_path / "target.ckpt")
    with pytest.raises(ValueError, match="missing"):
        ms.transform_checkpoints(
            str(root),
            str(tmp_path / "theirs"),
            "checkpoint_",
            str(tmp_path / "source.ckpt"),
            str(tmp_path / "target.ckpt"),
        )
    del ranks[3]
    (root / "rank_3" / "checkpoint_3.ckpt").unlink()
    (root / "rank_3").rmdir()
    with pytest.raises(PlanError, match=r"w\[8, 4\]: the box \[4:8, 0:4\] is held by ranks \[1, 3\], none of whose"):
        our_plan(root, source, MP4)


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e5m2", "hifloat8", "complex64", "complex128", "bfloat16", "qint4x2", "uint16"]
)
def test_incumbent_finding_13_all_bits_of_all_types(name: str, tmp_path: Path) -> None:
    """MindSpore cannot initialise fp8 and complex tensors, and canonicalises 253 NaNs of bf16."""
    dtype = by_name(name)
    values = np.arange(1 << (8 if dtype.itemsize == 1 else 16), dtype=np.uint32)
    bits = np.repeat(values.astype(f"u{min(dtype.itemsize, 2)}"), max(1, dtype.itemsize // 2)).view(dtype.carrier)
    bits = bits.reshape(-1, 16)
    model = {"w": Tensor(dtype, bits), "v": Tensor(dtype, np.ascontiguousarray(bits.T))}
    check_against_the_cut(MP4, MP2, model, tmp_path)


def test_incumbent_finding_14_tensors_without_elements(tmp_path: Path) -> None:
    """MindSpore drops them from .ckpt files. So do we: its load_checkpoint would misread them there."""
    model = random_model({"w": (8, 4), "v": (4, 8), "none": (0, 4)})
    root = write_ranks(tmp_path / "source", cut(MP4, model), "safetensors")
    transform(our_plan(root, MP4, MP2, format="safetensors"), tmp_path / "safetensors")
    assert_ranks(tmp_path / "safetensors", cut(MP2, model))
    transform(our_plan(root, MP4, MP2), tmp_path / "ckpt")
    del model["none"]
    assert_ranks(tmp_path / "ckpt", cut(MP2, model))


def test_errors_name_every_parameter_that_does_not_divide(tmp_path: Path) -> None:
    root = write_ranks(tmp_path / "source", {0: random_model({"w": (10, 4), "v": (4, 6), "u": (8,)})})
    with pytest.raises(PlanError) as raised:
        our_plan(root, Strategy.complete(), MP4)
    lines = str(raised.value).splitlines()
    assert re.match(r"  - w: a tensor of shape \[10, 4\] cannot be cut evenly by .* 10 is to be cut into 4", lines[1])
    assert re.match(r"  - v: a tensor of shape \[4, 6\] cannot be cut evenly by .* 6 is to be cut into 4", lines[2])
    assert len(lines) == 3
