"""What one rank takes of a checkpoint 2.0, planned by itself from the layouts and files that metadata.json names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint2_files import SAMPLES

from mindformers_ckpt.errors import FormatError, PlanError, StrategyError
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.integrations.checkpoint2 import recorded
from mindformers_ckpt.job.direct import read_direct
from mindformers_ckpt.planning.one_rank import Held, Wanted, plan_of_rank
from mindformers_ckpt.strategy.files import read_metadata, read_strategy
from mindformers_ckpt.strategy.metadata import Metadata

CASES = ("mf1.9.0/dp2tp2", "mf2.1.0/dp2tp2_no_redundancy", "mf2.1.0/pp2dp2tp2")
LAYOUT = "mf2.1.0/pp2dp2tp2"


def read(case: str) -> tuple[Metadata, dict[str, Any]]:
    with np.load(SAMPLES / f"{case}_full.npz") as content:
        whole = {name: content[name] for name in content.files}
    return read_metadata(SAMPLES / case / "iteration_00000007" / "metadata.json"), whole


def held_in(metadata: Metadata, last: bool = False) -> dict[str, Held]:
    """The slices of all tensors: of each the first file that is named, or the last."""
    files: dict[str, dict[int, Path]] = {name: {} for name in metadata.tensors}
    for slice in metadata.stored:
        path = metadata.path.parent / slice.file
        files[slice.name][slice.cell] = path if last else files[slice.name].get(slice.cell, path)
    return {name: Held(entry, files[name].get) for name, entry in metadata.tensors.items()}


def wanted_by(rank: int, whole: Mapping[str, Any]) -> dict[str, Wanted]:
    strategy = read_strategy(SAMPLES / LAYOUT)
    stage, inner = divmod(rank, strategy.stage_size)
    return {
        name: Wanted(array.shape, strategy.stages[stage][name].box(array.shape, inner))
        for name, array in whole.items()
        if name in strategy.stages[stage]
    }


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_gets_its_boxes(case: str, last: bool) -> None:
    metadata, whole = read(case)
    for rank in range(8):
        wanted = wanted_by(rank, whole)
        own = plan_of_rank(rank, wanted, held_in(metadata, last), "here")
        found = dict(read_direct(own.plan, lambda: None, own.headers))
        assert {spec.name for spec in found} == wanted.keys()
        for spec, content in found.items():
            expected = whole[spec.name][wanted[spec.name].box.slices()]
            assert spec.shape == expected.shape
            assert content.tobytes() == np.ascontiguousarray(expected).tobytes()


def test_only_files_that_a_rank_takes_from_are_opened() -> None:
    metadata, whole = read(LAYOUT)
    wanted = wanted_by(0, whole)
    own = plan_of_rank(0, wanted, held_in(metadata), "here")
    assert own.plan.sources
    ranks = {int(file.path.name.split("-")[-2]) for file in own.plan.sources}
    assert ranks <= {0, 1, 2, 3}  # its stage's


def test_all_that_does_not_fit_is_told() -> None:
    metadata, whole = read(CASES[0])
    held = held_in(metadata)
    lost, other = [name for name, entry in metadata.tensors.items() if entry.layout and max(entry.layout.cuts) > 1][:2]
    held[lost] = held[lost]._replace(file_of=lambda number: None)
    shape = tuple(2 * extent for extent in whole[other].shape)
    wanted = {
        lost: Wanted(whole[lost].shape, Box.whole(whole[lost].shape)),
        other: Wanted(shape, Box.whole(shape)),
    }
    with pytest.raises(
        PlanError, match="here cannot be loaded by rank 3; is it the checkpoint of this model"
    ) as caught:
        plan_of_rank(3, wanted, held, "here")
    lines = str(caught.value).splitlines()[1:]
    assert [f"(slice {number}) is in no file" in line for number, line in enumerate(lines)] == [True, True, False]
    assert lines[2] == f"  - {other}: {list(whole[other].shape)} in the checkpoint, {list(shape)} in the network"


def test_files_that_hold_something_else_are_told(tmp_path: Path) -> None:
    metadata, whole = read(CASES[0])
    name = next(iter(whole))
    wanted = {name: Wanted(whole[name].shape, Box.whole(whole[name].shape))}
    held = held_in(metadata)[name]
    other = next(path for path in sorted(metadata.path.parent.glob("*-opt-*")))
    with pytest.raises(PlanError, match="files and their metadata do not belong together") as caught:
        plan_of_rank(0, wanted, {name: held._replace(file_of=lambda number: other)}, "here")
    assert f"{other.name} lacks {name}" in str(caught.value)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no header")
    with pytest.raises(FormatError, match=r"broken\.safetensors"):
        plan_of_rank(0, wanted, {name: held._replace(file_of=lambda number: broken)}, "here")


class Described:
    """A parameter as MindFormers describes it."""

    def __init__(self, layout: dict[str, Any]) -> None:
        self.global_shape, self.axis_fragmentations, self.layout = (8, 6), (2, 1), self
        self._layout = layout

    def to_dict(self) -> dict[str, Any]:
        return self._layout


def test_a_layout_that_cannot_be_read_names_its_parameter() -> None:
    entry = json.loads('{"device_matrix": [2, 2], "tensor_map": [0, -1], "rank_list": [0, 1, 2, 3]}')
    found = recorded("w", Described({**entry, "interleaved_parallel": False, "tensor_map": ((0,), -1)}))
    assert found.layout is not None
    assert found.layout.box((8, 6), 1) == Box((4, 0), (8, 6))
    with pytest.raises(StrategyError, match=r"^w: its slices are interleaved"):
        recorded("w", Described({**entry, "interleaved_parallel": True}))
    with pytest.raises(StrategyError, match=r"^w: KeyError"):
        recorded("w", Described({"device_matrix": [2, 2]}))
