from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from recorded import Tensor, random_model, recorded, slices_of, write_ranks, write_tensors

from mindformers_ckpt.errors import FormatError, PlanError
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.model import Strategy

MP4 = Strategy.of_stages(({"w": Layout((4,), ((0,), ())), "v": Layout((4,), ((), (0,)))},), "mp4")
MODEL = random_model({"w": (8, 4), "v": (4, 8), "step": ()})


def shards(strategy: Strategy, model: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What every rank holds of a model; parameters that no layout names are whole."""
    ranks: dict[int, dict[str, Tensor]] = {}
    for rank in range(strategy.rank_count):
        ranks[rank] = {}
        for name, tensor in model.items():
            layout = strategy.stages[strategy.stage_of(rank)].get(name)
            box = Box.whole(tensor.bits.shape)
            if layout is not None:
                box = layout.box(tensor.bits.shape, rank % strategy.stage_size)
            ranks[rank][name] = tensor.part(box)
    return ranks


def opened(root: Path, strategy: Strategy) -> Checkpoint:
    return Checkpoint(find_source(root), strategy)


def test_whole_tensors_and_their_shards(tmp_path: Path) -> None:
    write_ranks(tmp_path, shards(MP4, MODEL))
    tensors = opened(tmp_path, MP4).tensors()
    assert list(tensors) == ["w", "v", "step"]
    assert {name: tensor.spec.shape for name, tensor in tensors.items()} == {"w": (8, 4), "v": (4, 8), "step": ()}
    assert {name: tensor.spec.dtype for name, tensor in tensors.items()} == {n: t.dtype for n, t in MODEL.items()}
    assert [(shard.rank, shard.box) for shard in tensors["w"].shards] == [
        (rank, Box((2 * rank, 0), (2 * rank + 2, 4))) for rank in range(4)
    ]
    assert [(shard.rank, shard.box) for shard in tensors["step"].shards] == [(0, Box((), ()))]
    assert tensors["step"].layout is None
    assert tensors["w"].layout == MP4.stages[0]["w"]
    assert all(not tensor.missing for tensor in tensors.values())


def test_one_replica_of_each_box_is_chosen(tmp_path: Path) -> None:
    strategy = Strategy.of_stages(({"w": Layout((2, 4), ((0,), ()))},), "dp2mp4")
    write_ranks(tmp_path, shards(strategy, MODEL))
    source = opened(tmp_path, strategy)
    tensors = source.tensors()
    assert [shard.rank for shard in tensors["w"].shards] == [0, 1, 2, 3]
    assert len(source.used_files(tensors)) == 4


def test_shards_of_missing_ranks_are_named(tmp_path: Path) -> None:
    ranks = shards(MP4, MODEL)
    del ranks[2]
    write_ranks(tmp_path, ranks)
    tensors = opened(tmp_path, MP4).tensors()
    assert tensors["w"].missing == ((Box((4, 0), (6, 4)), (2,)),)
    assert tensors["w"].spec.shape == (8, 4)
    assert tensors["step"].missing == ()


def test_a_stage_whose_first_ranks_are_missing(tmp_path: Path) -> None:
    config = recorded("dp2mp2pp2")
    model = random_model({"model.layers.0.attention.wq.weight": (64, 64), "lm_head.weight": (256, 64)})
    ranks = slices_of(config, model)
    for lost in (0, 1, 6, 7):
        del ranks[lost]
    write_ranks(tmp_path, ranks)
    tensors = opened(tmp_path, config.strategy).tensors()
    assert {name: [shard.rank for shard in tensor.shards] for name, tensor in tensors.items()} == {
        "model.layers.0.attention.wq.weight": [2, 3],
        "lm_head.weight": [4, 5],
    }


def test_ranks_that_hold_different_shapes(tmp_path: Path) -> None:
    ranks = shards(MP4, MODEL)
    ranks[3]["w"] = MODEL["w"]
    ranks[1]["v"] = Tensor(by_name("uint8"), np.zeros((4, 2), np.uint8))
    write_ranks(tmp_path, ranks)
    with pytest.raises(PlanError) as raised:
        opened(tmp_path, MP4).tensors()
    text = str(raised.value)
    assert "does not fit the strategy it is read with (4 ranks (mp4))" in text
    assert "w: " in text
    assert "[8, 4], but other ranks of the stage hold" in text
    assert "v: " in text
    assert "uint8[4, 2]" in text


def test_a_tensor_of_other_dimensions(tmp_path: Path) -> None:
    write_ranks(tmp_path, {rank: random_model({"w": (8,), "v": (4, 2)}) for rank in range(4)})
    with pytest.raises(
        PlanError, match=r"w: the layout .* is that of a tensor of 2 dimensions, but the shape is \[8\]"
    ):
        opened(tmp_path, MP4).tensors()


def test_complete_weights_under_a_strategy(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "model.ckpt", MODEL)
    with pytest.raises(PlanError, match=r"is complete weights, but its strategy .* is for 4 ranks"):
        opened(path, MP4)
    assert list(opened(path, Strategy.complete()).tensors()) == list(MODEL)


def test_a_single_rank_folder_is_complete_weights(tmp_path: Path) -> None:
    write_tensors(tmp_path / "rank_0" / "model.ckpt", MODEL)
    assert list(opened(tmp_path, Strategy.complete()).tensors()) == list(MODEL)


def test_shards_without_a_strategy(tmp_path: Path) -> None:
    write_ranks(tmp_path, shards(MP4, MODEL))
    with pytest.raises(PlanError, match="holds the shards of 4 ranks, but no source strategy is given"):
        opened(tmp_path, Strategy.complete())


def test_more_ranks_than_the_strategy_has(tmp_path: Path) -> None:
    write_ranks(tmp_path, {rank: dict(MODEL) for rank in range(6)})
    with pytest.raises(PlanError, match=r"holds files of ranks \[4, 5\], but the strategy mp4 is for 4 ranks"):
        opened(tmp_path, MP4)


def test_a_lone_shard_of_another_rank_without_a_strategy(tmp_path: Path) -> None:
    write_tensors(tmp_path / "rank_3" / "model.ckpt", MODEL)
    with pytest.raises(PlanError, match="rank"):
        opened(tmp_path, Strategy.complete())


def test_all_damaged_files_are_reported_together(tmp_path: Path) -> None:
    write_ranks(tmp_path, shards(MP4, MODEL))
    for rank in (1, 3):
        path = tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.ckpt"
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"(?s)cannot be read.*rank_1.*truncated.*rank_3.*truncated"):
        opened(tmp_path, MP4).tensors()
    path = tmp_path / "rank_1" / "checkpoint_1.ckpt"
    path.unlink()
    path.with_suffix(".safetensors").write_bytes(b"garbage")
    with pytest.raises(FormatError, match=r"(?s)rank_1.*safetensors.*rank_3"):
        opened(tmp_path, MP4).tensors()


def test_several_complete_files(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", random_model({"w": (2, 2)}))
    write_tensors(tmp_path / "b.ckpt", random_model({"v": (2, 2)}))
    assert set(opened(tmp_path, Strategy.complete()).tensors()) == {"v", "w"}
    write_tensors(tmp_path / "c.ckpt", random_model({"w": (2, 2)}))
    with pytest.raises(PlanError, match=r"c.ckpt and .*a.safetensors both hold w: these are several checkpoints"):
        opened(tmp_path, Strategy.complete()).tensors()


def test_a_tied_embedding_is_one_tensor(tmp_path: Path) -> None:
    config = recorded("dp2mp2pp2_tied")
    name = "model.tok_embeddings.embedding_weight"
    write_ranks(tmp_path, slices_of(config, random_model({name: (256, 64)})))
    (tensor,) = opened(tmp_path, config.strategy).tensors().values()
    assert tensor.spec.shape == (256, 64)
    assert tensor.stages == (0, 1)
    assert [shard.rank for shard in tensor.shards] == [0, 1]


def test_a_tied_embedding_whose_first_stage_lost_ranks(tmp_path: Path) -> None:
    config = recorded("dp2mp2pp2_tied")
    ranks = slices_of(config, random_model({"model.tok_embeddings.embedding_weight": (256, 64)}))
    del ranks[1], ranks[3]
    write_ranks(tmp_path, ranks)
    (tensor,) = opened(tmp_path, config.strategy).tensors().values()
    assert [shard.rank for shard in tensor.shards] == [4, 5]
    assert tensor.missing == ()


@pytest.mark.parametrize("second_copy", ["cut", "whole"])
def test_the_second_copy_of_a_tied_embedding_may_lack_the_optimizer_shard(second_copy: str, tmp_path: Path) -> None:
    name, other = "emb", "head"
    cut = Layout((4,), ((), ()), optimizer_shards=2, optimizer_step=1)
    strategy = Strategy.of_stages(({name: cut}, {other: cut}), "dp4pp2")
    model = random_model({name: (8, 4), other: (8, 4)})
    ranks: dict[int, dict[str, Tensor]] = {}
    for rank in range(8):
        whole, box = Box.whole((8, 4)), cut.box((8, 4), rank % 4)
        if rank < 4:
            ranks[rank] = {name: model[name].part(box)}
        else:
            ranks[rank] = {
                other: model[other].part(box),
                name: model[name].part(box if second_copy == "cut" else whole),
            }
    write_ranks(tmp_path, ranks)
    tensors = opened(tmp_path, strategy).tensors()
    assert tensors[name].spec.shape == (8, 4)
    assert [shard.rank for shard in tensors[name].shards] == [0, 1]


def test_stages_that_contradict_each_other(tmp_path: Path) -> None:
    layout = Layout((2,), ((0,),))
    strategy = Strategy.of_stages(({"w": layout}, {"w": layout}), "pp2")
    write_ranks(tmp_path, {rank: random_model({"w": (4 if rank < 2 else 6,)}) for rank in range(4)})
    with pytest.raises(PlanError, match=r"w: stage 0 holds it as \w+\[8\], stage 1 as \w+\[12\]"):
        opened(tmp_path, strategy).tensors()


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
def test_equal_headers_are_parsed_once(format: str, tmp_path: Path) -> None:
    model = {name: Tensor(by_name("float32"), np.zeros((8, 8), np.uint32)) for name in "wv"}
    for rank, tensors in shards(MP4, model).items():
        write_tensors(tmp_path / f"rank_{rank}" / f"checkpoint_{rank}.{format}", tensors)
    source = opened(tmp_path, MP4)
    found = source.tensors()
    assert len({id(source.header(path).tensors) for path in source.files.files}) == 1
    assert [shard.path.parent.name for shard in found["w"].shards] == ["rank_0", "rank_1", "rank_2", "rank_3"]


@pytest.mark.parametrize("format", ["ckpt", "safetensors"])
@pytest.mark.parametrize("ranks", [4, 80])
def test_files_that_begin_alike_need_not_hold_the_same(ranks: int, format: str, tmp_path: Path) -> None:
    """Of a de-redundant checkpoint: equal sizes and beginnings, other tensors behind (case 01)."""
    strategy = Strategy.of_stages(({name: Layout((ranks,), ((),)) for name in ("a", "b", "c")},), "dp")
    for rank in range(ranks):
        second = "b" if rank < ranks // 2 else "c"
        write_tensors(tmp_path / f"rank_{rank}" / f"x.{format}", random_model({"a": (64,), second: (16,)}, seed=1))
    assert set(opened(tmp_path, strategy).tensors()) == {"a", "b", "c"}


def test_ranks_without_files_are_left_aside_where_replicas_hold_everything(tmp_path: Path) -> None:
    """The end of a checkpoint's life: one replica of everything is there, other folders are empty or older."""
    strategy = Strategy.of_stages(({"w": Layout((2, 2), ((0,), ())), "v": Layout((2, 2), ((), (0,)))},), "dp2mp2")
    ranks = shards(strategy, MODEL)
    for rank in (0, 1):
        write_tensors(tmp_path / f"rank_{rank}/gpt_rank_{rank}-1_20.ckpt", ranks[rank])
    (tmp_path / "rank_2").mkdir()
    write_tensors(tmp_path / "rank_3/gpt_rank_3-1_10.ckpt", ranks[3])
    source = opened(tmp_path, strategy)
    assert [shard.rank for shard in source.tensors()["w"].shards] == [0, 1]
    (warning,) = source.warnings
    assert "ranks 2, 3 are left aside, the others hold everything between them" in warning
    (tmp_path / "rank_1/gpt_rank_1-1_20.ckpt").unlink()
    with pytest.raises(PlanError, match=r"(?s)rank_1: no checkpoint file in .*rank_2: .*rank_3: its last file"):
        opened(tmp_path, strategy).tensors()


def test_ranks_without_a_folder_are_said_where_replicas_hold_everything(tmp_path: Path) -> None:
    """A copy that lacks folders of ranks is used, and not in silence."""
    strategy = Strategy.of_stages(({"w": Layout((2, 2), ((0,), ()))},), "dp2mp2")
    for rank, tensors in shards(strategy, {"w": MODEL["w"]}).items():
        if rank not in (0, 3):
            write_tensors(tmp_path / f"rank_{rank}/x.ckpt", tensors)
    (warning,) = opened(tmp_path, strategy).warnings
    assert "ranks 0, 3 of the strategy have no folder" in warning
    for rank in (0, 3):
        write_tensors(tmp_path / f"rank_{rank}/x.ckpt", shards(strategy, {"w": MODEL["w"]})[rank])
    assert opened(tmp_path, strategy).warnings == ()
