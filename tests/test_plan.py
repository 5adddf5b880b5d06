from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import Tensor, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, TargetFile, Transfer, View
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
        "the source holds no accu_grads.* (2 parameters of the target strategy)",
        "the source holds no adam_m.* (2 parameters of the target strategy)",
        "the source holds no adam_v.* (2 parameters of the target strategy)",
    ]
    # Some of the states, but not all, is a damaged checkpoint.
    source = source_of(
        tmp_path, random_model({"w": (4,), "v": (4,), "adam_m.w": (4,), "adam_v.w": (4,), "adam_v.v": (4,)})
    )
    with pytest.raises(PlanError, match=r"- adam_m.v$"):
        build_plan(source, strategy)


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
        ([TOP], [Box((0, 0), (2, 5))], r"w: the box \[0:2, 0:5\] lies outside of the shape \[4, 4\]"),
        ([Box((0, -1), (2, 4))], [TOP], r"w: the box \[0:2, -1:4\] lies outside of the shape"),
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


def test_a_digest_tells_plans_apart() -> None:
    """Alike for equal plans, whoever built them; another one for any change of what is read or written."""
    box, half = Box((0, 0), (4, 4)), Box((0, 0), (2, 4))
    transfer = Transfer("w", by_name("float32"), (4, 4), (Place(0, box),), (Place(0, half), Place(1, box)))
    target = TargetFile("rank_0/a.ckpt", 0, "ckpt", (TensorSpec("w", by_name("float32"), (2, 4)),))
    plan = Plan((SourceFile(Path("/a/b.ckpt"), 9),), (target,), (transfer,))
    again = Plan((SourceFile(Path("/a/b.ckpt"), 9),), (target,), (transfer._replace(shape=(4, 4)),))
    assert digest_of(plan) == digest_of(again)
    view = View((16,), Box((0,), (16,)), (0,))
    changes = [
        replace(plan, sources=(SourceFile(Path("/a/b.ckpt"), 8),)),
        replace(plan, sources=(SourceFile(Path("/a/c.ckpt"), 9),)),
        replace(plan, targets=(target._replace(path="rank_1/a.ckpt"),)),
        replace(plan, targets=(target._replace(metadata=(("a", "b"),)),)),
        *(
            replace(plan, transfers=(changed,))
            for changed in (
                transfer._replace(name="v"),
                transfer._replace(dtype=by_name("int32")),
                transfer._replace(sources=(Place(1, box),)),
                transfer._replace(sources=(Place(0, box, "x"),)),
                transfer._replace(sources=(Place(0, box, "", view),)),
                transfer._replace(targets=(Place(0, half), Place(1, half))),
                transfer._replace(targets=(Place(1, box), Place(0, half))),
            )
        ),
    ]
    digests = {digest_of(changed) for changed in changes}
    assert len(digests) == len(changes)
    assert digest_of(plan) not in digests
    moved = replace(plan, sources=(SourceFile(Path("/z/b.ckpt"), 9),))
    assert digest_of(plan, Path("/a")) == digest_of(moved, Path("/z"))
