from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from recorded import Tensor, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.errors import ConfigError, PlanError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import Slices, build_plan, compare_slices
from mindformers_ckpt.planning.computations import Cast, Dequantise
from mindformers_ckpt.planning.missing import patterns_of
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy

COMPLETE = Strategy.complete()
MP4 = Strategy.of_stages(({"w": Layout((4,), ((0,), ())), "v": Layout((4,), ((), (0,)))},), "mp4")
DP2MP2 = Strategy.of_stages(({"w": Layout((2, 2), ((0,), ())), "v": Layout((2, 2), ((), (0,)))},), "dp2mp2")
PP2 = Strategy.of_stages(({"w": Layout((2,), ((0,), ()))}, {"v": Layout((2,), ((), (0,)))}), "pp2")
MODEL = random_model({"w": (8, 4), "v": (4, 8)})


def source_of(tmp_path: Path, model: Mapping[str, Tensor]) -> Checkpoint:
    return Checkpoint(find_source(write_tensors(tmp_path / "model.ckpt", model)), COMPLETE)


def sharded(tmp_path: Path, strategy: Strategy, model: Mapping[str, Tensor], lost: tuple[int, ...] = ()) -> Checkpoint:
    ranks: dict[int, dict[str, Tensor]] = {}
    for rank in set(range(strategy.rank_count)) - set(lost):
        layouts = strategy.stages[strategy.stage_of(rank)]
        ranks[rank] = {
            name: tensor.part(layouts[name].box(tensor.bits.shape, rank % strategy.stage_size))
            if name in layouts
            else tensor
            for name, tensor in model.items()
            if name in layouts or name not in strategy.names()
        }
    return Checkpoint(find_source(write_ranks(tmp_path / "source", ranks)), strategy)


def held(plan: Plan) -> dict[str, dict[int, Box]]:
    """What every target rank gets: tensor -> rank -> box."""
    return {
        transfer.name: {plan.targets[place.file].rank: place.box for place in transfer.targets}
        for transfer in plan.transfers
    }


def test_what_goes_where(tmp_path: Path) -> None:
    plan = build_plan(source_of(tmp_path, MODEL), MP4)
    assert [target.path for target in plan.targets] == [f"rank_{rank}/checkpoint_{rank}.ckpt" for rank in range(4)]
    assert held(plan) == {
        "w": {rank: Box((2 * rank, 0), (2 * rank + 2, 4)) for rank in range(4)},
        "v": {rank: Box((0, 2 * rank), (4, 2 * rank + 2)) for rank in range(4)},
    }
    assert [[spec.shape for spec in target.tensors] for target in plan.targets] == [[(2, 4), (4, 2)]] * 4
    assert plan.warnings == ()
    assert len({id(target.tensors) for target in plan.targets}) == 1  # ranks that hold alike share one list


def test_names_of_the_files(tmp_path: Path) -> None:
    plan = build_plan(source_of(tmp_path, MODEL), MP4, prefix="llama_", format="safetensors", ranks=[3, 1])
    assert [(target.path, target.rank) for target in plan.targets] == [
        ("rank_1/llama_1.safetensors", 1),
        ("rank_3/llama_3.safetensors", 3),
    ]


def test_bytes_are_counted_once_for_replicas(tmp_path: Path) -> None:
    size = sum(tensor.bits.nbytes for tensor in MODEL.values())
    plan = build_plan(sharded(tmp_path, DP2MP2, MODEL), DP2MP2)
    assert (plan.bytes_read, plan.bytes_written) == (size, 2 * size)
    one = build_plan(sharded(tmp_path, DP2MP2, MODEL), DP2MP2, ranks=[0])
    assert (one.bytes_read, one.bytes_written) == (size // 2, size // 2)


def test_only_the_shards_that_ranks_need_are_read(tmp_path: Path) -> None:
    plan = build_plan(sharded(tmp_path, MP4, MODEL), DP2MP2, ranks=[1])
    (w,) = (transfer for transfer in plan.transfers if transfer.name == "w")
    assert [plan.sources[place.file].path.parent.name for place in w.sources] == ["rank_2", "rank_3"]


def test_shards_that_nobody_needs_may_be_missing(tmp_path: Path) -> None:
    source = sharded(tmp_path, MP4, {"w": MODEL["w"], "v": MODEL["v"]}, lost=(3,))
    target = Strategy.of_stages(({"w": DP2MP2.stages[0]["w"], "v": Layout((2, 2), ((), (0,)))},), "dp2mp2")
    assert [file.rank for file in build_plan(source, target, ranks=[0, 2]).targets] == [0, 2]
    with pytest.raises(PlanError) as raised:
        build_plan(source, target)
    assert str(raised.value).splitlines()[1:] == [
        "  - w[8, 4]: the box [6:8, 0:4] is held by ranks [3], none of whose files is there",
        "  - v[4, 8]: the box [0:4, 6:8] is held by ranks [3], none of whose files is there",
    ]


def test_a_part_of_a_plan(tmp_path: Path) -> None:
    plan = build_plan(source_of(tmp_path, MODEL), PP2)
    parts = [plan.for_targets([file]) for file in range(4)]
    assert [[transfer.name for transfer in part.transfers] for part in parts] == [["w"], ["w"], ["v"], ["v"]]
    assert sum(part.bytes_written for part in parts) == plan.bytes_written
    assert all(part.targets == plan.targets for part in parts)
    assert plan.for_targets(range(4)) == plan
    assert plan.for_targets([]).transfers == ()


def test_ranks_that_the_target_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"ranks \[4, 9\] are not among the 4 ranks"):
        build_plan(source_of(tmp_path, MODEL), MP4, ranks=[9, 0, 4])


def test_order_is_that_of_the_source_with_what_both_strategies_name_first(tmp_path: Path) -> None:
    names = {"step": (), "v": (4, 8), "scale": (1,), "w": (8, 4)}
    plan = build_plan(source_of(tmp_path, random_model(names)), MP4)
    assert [transfer.name for transfer in plan.transfers] == ["v", "w", "step", "scale"]
    plan = build_plan(sharded(tmp_path, MP4, random_model(names)), COMPLETE)
    assert [transfer.name for transfer in plan.transfers] == ["v", "w", "step", "scale"]


def test_a_target_parameter_that_nobody_holds(tmp_path: Path) -> None:
    strategy = Strategy.of_stages(({name: Layout((2,), ((0,),)) for name in ("w", "v", "u", "head.bias")},), "mine")
    source = source_of(tmp_path, random_model({"w": (4,)}))
    with pytest.raises(
        PlanError, match=r"(?s)lacks parameters that the target strategy \(mine\) has.*- head.bias.*- u.*- v"
    ):
        build_plan(source, strategy)
    assert list(held(build_plan(source, strategy, allow_missing=True))) == ["w"]


def test_states_that_are_not_in_the_source(tmp_path: Path) -> None:
    layout = Layout((2,), ((0,),))
    names = ("w", "v", "adam_m.w", "adam_m.v", "adam_v.w", "adam_v.v", "accu_grads.w", "accu_grads.v")
    strategy = Strategy.of_stages((dict.fromkeys(names, layout),), "mine")
    plan = build_plan(source_of(tmp_path, random_model({"w": (4,), "v": (4,)})), strategy)
    assert [warning.partition(":")[0] for warning in plan.warnings] == [
        "the source holds no adam_m.* (2 parameters of the target strategy)",
        "the source holds no adam_v.* (2 parameters of the target strategy)",
    ]
    # Some of the states, but not all, is a damaged checkpoint.
    source = source_of(
        tmp_path, random_model({"w": (4,), "v": (4,), "adam_m.w": (4,), "adam_v.w": (4,), "adam_v.v": (4,)})
    )
    with pytest.raises(PlanError, match=r"- adam_m.v$"):
        build_plan(source, strategy)


def test_states_of_weights_that_were_frozen(tmp_path: Path) -> None:
    """A job that trains more than the one that saved: all states of a weight are missing, and the weight is there."""
    names = ("w", "v", "adam_m.w", "adam_m.v", "adam_v.w", "adam_v.v")
    strategy = Strategy.of_stages((dict.fromkeys(names, Layout((2,), ((0,),))),), "mine")
    source = source_of(tmp_path, random_model(dict.fromkeys(("w", "v", "adam_m.w", "adam_v.w"), (4,))))
    assert build_plan(source, strategy).warnings == (
        "states of weights that were frozen start from their initial values: adam_m.v, adam_v.v",
    )
    source = source_of(tmp_path, random_model(dict.fromkeys(("w", "adam_m.w", "adam_v.w"), (4,))))
    with pytest.raises(PlanError, match=r"(?s)- adam_m.v.*- adam_v.v.*- v"):
        build_plan(source, strategy)


@pytest.mark.parametrize(("allow", "refused"), [(["v", "head.*"], "u"), (["[uv]"], "head.bias"), ([], "head.bias")])
def test_names_that_may_be_missing(tmp_path: Path, allow: list[str], refused: str) -> None:
    strategy = Strategy.of_stages(({name: Layout((2,), ((0,),)) for name in ("w", "v", "u", "head.bias")},), "mine")
    source = source_of(tmp_path, random_model({"w": (4,)}))
    with pytest.raises(PlanError, match=f"- {refused}"):
        build_plan(source, strategy, allow_missing=allow)
    assert list(held(build_plan(source, strategy, allow_missing=[*allow, "[uv]", "head.*"]))) == ["w"]


def test_a_text_is_names_and_not_its_letters() -> None:
    assert patterns_of("head.*, *.bias") == ("head.*", "*.bias")
    for wrong in ("", "a,,b", 3, [3], ["a", " "], None):
        with pytest.raises(ConfigError, match="allow_missing: True, False or a list of parameter names was expected"):
            patterns_of(wrong)  # type: ignore[arg-type]


def test_adapters_that_are_not_in_the_source(tmp_path: Path) -> None:
    layout = Layout((2,), ((0,),))
    strategy = Strategy.of_stages(({"w": layout, "w.mindpet_delta_lora_a": layout, "w.lora_b": layout},), "mine")
    plan = build_plan(source_of(tmp_path, random_model({"w": (4,)})), strategy)
    assert plan.warnings == (
        "adapter parameters that are not in the source keep their initial values: w.lora_b, w.mindpet_delta_lora_a",
    )


def test_parameters_that_one_strategy_names(tmp_path: Path) -> None:
    source = Strategy.of_stages(({"w": MP4.stages[0]["w"], "u": Layout((4,), ((),))},), "source")
    plan = build_plan(sharded(tmp_path, source, random_model({"w": (8, 4), "u": (4,), "v": (4, 8)})), MP4)
    assert plan.warnings == (
        "not in the target strategy, every target rank gets them whole: u",
        "not in the source strategy, taken as whole in every source file: v",
    )
    assert set(held(plan)["u"].values()) == {Box((0,), (4,))}


def test_parameters_of_a_stage_go_to_its_ranks_alone(tmp_path: Path) -> None:
    plan = build_plan(source_of(tmp_path, random_model({"w": (8, 4), "v": (4, 8), "step": ()})), PP2)
    assert {name: sorted(boxes) for name, boxes in held(plan).items()} == {
        "w": [0, 1],
        "v": [2, 3],
        "step": [0, 1, 2, 3],
    }


def test_a_parameter_that_two_stages_name(tmp_path: Path) -> None:
    strategy = Strategy.of_stages(({"w": Layout((2,), ((0,), ()))}, {"w": Layout((2,), ((), (0,)))}), "pp2")
    plan = build_plan(source_of(tmp_path, {"w": MODEL["w"]}), strategy)
    assert held(plan)["w"] == {
        0: Box((0, 0), (4, 4)),
        1: Box((4, 0), (8, 4)),
        2: Box((0, 0), (8, 2)),
        3: Box((0, 2), (8, 4)),
    }


def test_a_tied_embedding_goes_to_the_last_stage(tmp_path: Path) -> None:
    config, other = recorded("dp2mp2pp2_tied"), recorded("pp4")
    name = "model.tok_embeddings.embedding_weight"
    write_ranks(tmp_path, slices_of(config, random_model({name: (256, 64)})))
    source = Checkpoint(find_source(tmp_path), config.strategy)
    assert sorted(held(build_plan(source, config.strategy, allow_missing=True))[name]) == list(range(8))
    assert sorted(held(build_plan(source, other.strategy, allow_missing=True))[name]) == [0, 3]


FLOAT = by_name("float32")


def plan_of(shape: tuple[int, ...], sources: list[Box], targets: list[Box]) -> Plan:
    transfer = Transfer(
        "w",
        FLOAT,
        shape,
        tuple(Place(0, box) for box in sources),
        tuple(Place(0, box) for box in targets),
    )
    return Plan((SourceFile(Path("a.ckpt"), 1),), (TargetFile("rank_0/b.ckpt", 0, "ckpt", ()),), (transfer,))


TOP, BOTTOM = Box((0, 0), (2, 4)), Box((2, 0), (4, 4))


@pytest.mark.parametrize(
    ("sources", "targets", "fault"),
    [
        ([TOP, BOTTOM], [Box((0, 0), (4, 4))], None),
        ([TOP], [TOP, TOP], None),
        ([BOTTOM], [Box((2, 1), (3, 3))], None),
        ([TOP], [Box((1, 0), (3, 4))], r"w: of the box \[1:3, 0:4\], 4 of 8 elements are in no source file"),
        ([TOP, BOTTOM, Box((1, 1), (3, 3))], [TOP], "w: source shards overlap"),
        ([TOP, TOP], [TOP], "w: source shards overlap"),
        ([TOP], [Box((0, 0), (2, 5))], r"w: the box \[0:2, 0:5\] is outside of the shape \[4, 4\]"),
        ([Box((0, -1), (2, 4))], [TOP], r"w: the box \[0:2, -1:4\] is outside of the shape"),
    ],
)
def test_a_plan_is_checked(sources: list[Box], targets: list[Box], fault: str | None) -> None:
    plan = plan_of((4, 4), sources, targets)
    if fault is None:
        plan.check()
        return
    with pytest.raises(PlanError, match=fault):
        plan.check()


def test_many_overlapping_shards_are_noticed() -> None:
    boxes = [Box((row,), (row + 1,)) for row in range(300)]
    plan_of((300,), boxes, [Box((0,), (300,))]).check()
    with pytest.raises(PlanError, match="overlap"):
        plan_of((300,), [*boxes, Box((7,), (8,))], [Box((0,), (300,))]).check()
    with pytest.raises(PlanError, match="w: "):
        plan_of((300,), [*boxes[:-1], Box((7,), (8,))], [Box((0,), (300,))]).check()


# ------------------------------------------------------------------------------------------------ the same slices

DP2 = Layout((2,), ((), ()))
MP2 = Layout((2,), ((0,), ()))


@pytest.mark.parametrize(
    ("held_by", "found"),
    [
        ({0: ("w", "v", "step"), 1: ("w", "v", "step")}, Slices.SAME),
        ({0: ("w", "step"), 1: ("v", "step")}, Slices.SHARES),  # redundancy removed at saving
        ({0: ("w", "v", "step"), 1: ("v", "step")}, Slices.SHARES),
        ({0: ("w", "v", "step"), 1: ("w", "v")}, Slices.SHARES),  # and a counter
        ({0: ("w", "v", "step")}, Slices.SHARES),  # the files of a rank are lost
    ],
)
def test_the_same_slices_are_those_that_the_files_hold(
    tmp_path: Path, held_by: dict[int, tuple[str, ...]], found: Slices
) -> None:
    strategy = Strategy.of_stages(({"w": DP2, "v": DP2},), "dp2")
    model = random_model({"w": (4, 2), "v": (2, 2), "step": (1,)})
    ranks = {rank: {name: model[name] for name in names} for rank, names in held_by.items()}
    source = Checkpoint(find_source(write_ranks(tmp_path / "source", ranks)), strategy)
    assert compare_slices(source, strategy) is found
    plan = build_plan(source, strategy)
    assert [{spec.name for spec in target.tensors} for target in plan.targets] == [set(model)] * 2


def test_the_same_slices_however_the_strategy_is_written(tmp_path: Path) -> None:
    source = sharded(tmp_path, Strategy.of_stages(({"w": MP2},), "mp2"), {"w": MODEL["w"]})
    for layout, found in (
        (Layout((1, 2), ((0,), ())), Slices.SAME),
        (Layout((2,), ((), (0,))), Slices.OTHER),
        (Layout((2,), ((), ())), Slices.OTHER),
    ):
        assert compare_slices(source, Strategy.of_stages(({"w": layout},), "target")) is found
    assert compare_slices(source, COMPLETE) is Slices.OTHER


def test_a_stage_without_any_file(tmp_path: Path) -> None:
    """Its parameters are in no file, so that nothing but the strategy tells that they are lost."""
    source = sharded(tmp_path, PP2, MODEL, lost=(2, 3))
    with pytest.raises(PlanError, match=r"(?s)holds no files of ranks \[2, 3\], and no other rank has.*- v"):
        build_plan(source, COMPLETE)
    plan = build_plan(source, COMPLETE, allow_missing=("v",))
    assert [transfer.name for transfer in plan.transfers] == ["w"]


def test_folders_that_are_not_there_do_no_harm_where_replicas_are(tmp_path: Path) -> None:
    plan = build_plan(sharded(tmp_path, DP2MP2, MODEL, lost=(2, 3)), COMPLETE)
    assert held(plan) == {name: {0: Box.whole(MODEL[name].bits.shape)} for name in MODEL}


def grid(rows: int, columns: int) -> tuple[Place, ...]:
    """The shards of a matrix of 64 x 64."""
    high, wide = 64 // rows, 64 // columns
    return tuple(
        Place(0, Box((row * high, column * wide), ((row + 1) * high, (column + 1) * wide)))
        for row in range(rows)
        for column in range(columns)
    )


def plan_of_cuts(*cuts: tuple[tuple[Place, ...], tuple[Place, ...]]) -> Plan:
    file, target = SourceFile(Path("/a"), 1), TargetFile("rank_0/checkpoint_0.ckpt", 0, "ckpt", ())
    transfers = (Transfer(f"w{number}", by_name("int8"), (64, 64), *cut) for number, cut in enumerate(cuts))
    return Plan((file,), (target,), tuple(transfers))


def test_a_plan_from_outside_is_checked_in_bounded_time() -> None:
    """Rows against columns: each of the boxes meets each of the others."""
    plan = plan_of_cuts((grid(64, 1), grid(1, 64)))
    plan.check()
    with pytest.raises(PlanError, match="it takes over 4,000 comparisons to check the boxes of the plan; make it"):
        plan.check(4000)


def test_tensors_that_are_cut_alike_are_checked_once() -> None:
    cut = (grid(8, 8), grid(4, 4))
    plan_of_cuts(*[cut] * 1000).check(1000)
    with pytest.raises(PlanError, match="w0: of the box"):
        plan_of_cuts((grid(8, 8)[1:], grid(4, 4))).check(1000)


def test_what_is_read_has_the_type_of_the_source() -> None:
    """FP8 that becomes bf16 is half of what is written, fp32 twice as much; each shard counts by itself."""
    kinds = {name: by_name(name) for name in ("float8_e4m3fn", "float32", "bfloat16")}
    halves = Box((0, 0), (4, 4)), Box((4, 0), (8, 4))
    blocks = Dequantise(kinds["float8_e4m3fn"], 0, "w_scale_inv", (4, 4), (4, 4), kinds["float32"])
    sources = (Place(0, halves[0], compute=blocks), Place(1, halves[1], compute=Cast(kinds["float32"])))
    transfer = Transfer("w", kinds["bfloat16"], (8, 4), sources, (Place(0, Box.whole((8, 4))),))
    assert (transfer.bytes_read, transfer.bytes_written) == (16 + 64, 64)
    upper = transfer._replace(targets=(Place(0, halves[0]),))
    assert (upper.bytes_read, upper.bytes_written) == (16, 32)
