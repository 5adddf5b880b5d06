"""Which files of a stage hold which tensors, against looking at every file by itself."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.formats import Header, TensorRecord, TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.sources.shards import Shard
from mindformers_ckpt.sources.stage_files import StageFiles

FLOAT32 = by_name("float32")
NAMES = ("a", "b", "c", "d")
RANKS, FIRST = 4, 8
LAYOUTS = (Layout((4,), ((0,), ())), Layout((2, 2), ((0,), ())), Layout((4,), ((), ())), None)


def tensors_of(names: tuple[str, ...], shape: tuple[int, ...] = (2, 3)) -> dict[str, TensorRecord]:
    return {name: TensorRecord(TensorSpec(name, FLOAT32, shape), ()) for name in names}


def header(path: str, tensors: dict[str, TensorRecord]) -> Header:
    return Header(Path(path), "ckpt", 1, tensors, {}, None)


class Files(NamedTuple):
    """Files of ranks, and the names in each; files with equal names share their header, or do not."""

    files: list[tuple[int, Header]]
    held: dict[str, dict[int, Path]]


@st.composite
def files(draw: st.DrawFn) -> Files:
    shared: dict[tuple[str, ...], dict[str, TensorRecord]] = {}
    found: list[tuple[int, Header]] = []
    held: dict[str, dict[int, Path]] = {}
    for rank in range(FIRST, FIRST + RANKS):
        left = list(NAMES)
        for number in range(draw(st.integers(0, 2))):
            names = tuple(draw(st.lists(st.sampled_from(left), unique=True))) if left else ()
            left = [name for name in left if name not in names]
            tensors = shared.setdefault(names, tensors_of(names)) if draw(st.booleans()) else tensors_of(names)
            path = f"rank_{rank}/{number}.ckpt"
            found.append((rank, header(path, tensors)))
            for name in names:
                held.setdefault(name, {})[rank] = Path(path)
    return Files(found, held)


@given(files(), st.sampled_from(LAYOUTS), st.one_of(st.none(), st.sets(st.sampled_from(NAMES))))
def test_every_file_is_found(files: Files, layout: Layout | None, names: set[str] | None) -> None:
    stage = StageFiles(FIRST, files.files, names)
    expected = {name: ranks for name, ranks in files.held.items() if names is None or name in names}
    assert list(stage.names) == list(expected)
    for name, ranks in expected.items():
        spec, paths = stage.held(name)
        assert list(paths.items()) == list(ranks.items())
        shape = spec.shape if layout is None else layout.full_shape(spec.shape)
        cut = stage.cut(paths, layout, shape)
        if layout is None:
            assert [(shard.rank, shard.path) for shard in cut.shards] == [next(iter(ranks.items()))]
            continue
        for rank in ranks:
            box = layout.box(shape, rank - FIRST)
            (shard,) = [shard for shard in cut.shards if shard.box == box]
            first = min(other for other in ranks if layout.box(shape, other - FIRST) == box)
            assert shard == Shard(first, ranks[first], box)
        boxes = {shard.box for shard in cut.shards} | {box for box, _ in cut.missing}
        assert boxes == set(layout.boxes(shape))
        assert len(boxes) == len(cut.shards) + len(cut.missing)
        assert all(ranks.keys().isdisjoint(holders) for _, holders in cut.missing)


def test_tensors_that_are_cut_alike_share_their_shards() -> None:
    tensors = tensors_of(NAMES)
    stage = StageFiles(0, [(rank, header(f"{rank}.ckpt", tensors)) for rank in range(RANKS)], None)
    cuts = {id(stage.cut(stage.held(name)[1], LAYOUTS[0], (8, 3)).shards) for name in NAMES}
    assert len(cuts) == 1


def test_shards_of_other_shapes_are_an_error_that_names_the_first_file() -> None:
    files = [header("0.ckpt", tensors_of(("a",))), header("1.ckpt", tensors_of(("a",)))]
    files += [header(f"{rank}.ckpt", tensors_of(("a",), (4, 3))) for rank in (2, 3)]
    stage = StageFiles(0, list(enumerate(files)), None)
    with pytest.raises(PlanError, match=r"^2.ckpt holds float32\[4, 3\], .* hold float32\[2, 3\] \(rank 2 differs\)$"):
        stage.held("a")
