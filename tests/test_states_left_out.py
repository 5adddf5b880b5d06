"""States of an optimizer that a strategy leaves out, as a declared one does, are cut like their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from recorded import Tensor, assert_same, random_bits, read_ranks, read_tensors, write_ranks, write_tensors

import mindformers_ckpt as mc
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.planning.build import Slices, compare_slices
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_mindspore
from mindformers_ckpt.strategy.model import Strategy
from mindformers_ckpt.strategy.states import with_states

WEIGHTS = {"up": (16, 8), "down": (8, 16), "norm": (8,)}
# Adam's moments, and a state of CAME whose word is joined with "_".
KINDS = ("moment1.", "adam_v.", "exp_avg_insta_row_")
# A state of another shape than its weight, and counters: whole on every rank.
WHOLE = {"exp_avg_sq_row.up": (16,), "global_step": (1,), "beta1_power": ()}
STATES = {f"{kind}{name}": shape for kind in KINDS for name, shape in WEIGHTS.items()}


def model() -> dict[str, Tensor]:
    random = np.random.default_rng(3)
    return {name: random_bits(by_name("float32"), shape, random) for name, shape in (WEIGHTS | STATES | WHOLE).items()}


def stages(*stages: Mapping[str, mc.Layout]) -> Strategy:
    return Strategy.of_stages(stages, "declared")


MESH, STAGE = {"dp": 2, "mp": 2}, {"dp": 1, "mp": 2}
SOURCE = stages(
    {
        "up": mc.Layout.on(MESH, "mp", None),
        "down": mc.Layout.on(MESH, None, "mp", optimizer_shards=2),
        "norm": mc.Layout.on(MESH, None),
    }
)
TARGET = stages(
    {"up": mc.Layout.on(STAGE, None, "mp")},
    {"down": mc.Layout.on(STAGE, "mp", None), "norm": mc.Layout.on(STAGE, None)},
)


def named_in_full(strategy: Strategy) -> Strategy:
    """The same strategy as MindSpore writes it: with the states."""
    full = with_states(strategy, WEIGHTS | STATES)
    assert full.names() == WEIGHTS.keys() | STATES.keys()
    return full


def shards(strategy: Strategy, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """What every rank holds, cut by the layouts of the weights."""
    held: dict[int, dict[str, Tensor]] = {rank: {} for rank in range(strategy.rank_count)}
    for name, tensor in tensors.items():
        weight = next((weight for weight in WEIGHTS if name not in WHOLE and name.endswith(weight)), "")
        for rank in held:
            stage, position = divmod(rank, strategy.stage_size)
            layout = strategy.stages[stage].get(weight)
            if not weight:
                held[rank][name] = tensor
            elif layout is not None:
                held[rank][name] = tensor.part(layout.box(tensor.bits.shape, position))
    return held


@pytest.mark.parametrize("full", ["neither", "source", "target"])
def test_they_are_cut_like_their_weights(full: str, tmp_path: Path) -> None:
    """Whichever of the two strategies leaves them out, and said in a warning."""
    tensors = model()
    write_ranks(tmp_path / "source", shards(SOURCE, tensors))
    source = named_in_full(SOURCE) if full == "source" else SOURCE
    target = named_in_full(TARGET) if full == "target" else TARGET
    report = mc.transform(tmp_path / "source", tmp_path / "out", src_strategy=source, dst_strategy=target)
    expected = shards(TARGET, tensors)
    for rank, found in read_ranks(tmp_path / "out").items():
        assert_same(found, expected[rank])
    said = [warning for warning in report.warnings if "cut like their weights" in warning]
    assert [warning.partition(",")[0] for warning in said] == [
        f"not in the {side} strategy" for side in ("source", "target") if side != full
    ]
    whole = mc.transform(tmp_path / "out", tmp_path / "whole", src_strategy=TARGET)
    assert_same(read_tensors(tmp_path / "whole/rank_0/checkpoint_0.ckpt"), tensors)
    assert [warning for warning in whole.warnings if "cut like" in warning]


def test_from_complete_weights_and_as_checkpoint_2(tmp_path: Path) -> None:
    """metadata.json describes the slices that the files hold: read back by it they are the whole tensors."""
    tensors = {name: tensor for name, tensor in model().items() if name not in WHOLE}
    write_tensors(tmp_path / "whole.ckpt", tensors)
    mc.transform(tmp_path / "whole.ckpt", tmp_path / "two", dst_strategy=TARGET, format="checkpoint2")
    with mc.open_checkpoint(tmp_path / "two") as saved:
        layout = saved["moment1.up"].layout
        assert layout is not None
        assert layout.cuts == (1, 2)
        for name, tensor in tensors.items():
            assert np.asarray(saved[name][...]).tobytes() == tensor.bits.tobytes()


def test_slices_are_compared_so(tmp_path: Path) -> None:
    """A job on the same strategy loads its files as they are."""
    write_ranks(tmp_path, shards(SOURCE, model()))
    for source in (SOURCE, named_in_full(SOURCE)):
        opened = Checkpoint(find_mindspore(tmp_path), source)
        for target in (SOURCE, named_in_full(SOURCE)):
            assert compare_slices(opened, target) is Slices.SAME


def test_a_state_that_was_saved_whole_stays_whole(tmp_path: Path) -> None:
    """Its shape is that of the whole weight, not of a slice."""
    tensors = {name: tensor for name, tensor in model().items() if name in ("up", "moment1.up")}
    held = {
        rank: {"up": part["up"], "moment1.up": tensors["moment1.up"]} for rank, part in shards(SOURCE, tensors).items()
    }
    write_ranks(tmp_path / "source", held)
    report = mc.transform(tmp_path / "source", tmp_path / "out", src_strategy=SOURCE)
    assert_same(read_tensors(tmp_path / "out/rank_0/checkpoint_0.ckpt"), tensors)
    assert not [warning for warning in report.warnings if "cut like" in warning]


def test_words_that_nobody_knows_are_no_states(tmp_path: Path) -> None:
    """`teacher.up` may be another model's matrix: it is taken as whole, and the contents are compared."""
    tensors = {"up": model()["up"], "teacher.up": model()["moment1.up"]}
    held = {
        rank: {
            name: tensor.part(SOURCE.stages[0]["up"].box(tensor.bits.shape, rank)) for name, tensor in tensors.items()
        }
        for rank in range(4)
    }
    write_ranks(tmp_path / "source", held)
    assert with_states(TARGET, {"up": (16, 8), "teacher.up": (16, 8)}) is TARGET
    opened = Checkpoint(find_mindspore(tmp_path / "source"), SOURCE)
    assert opened.tensors()["teacher.up"].layout is None
