from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.geometry.box import Box, are_disjoint
from mindformers_ckpt.geometry.layout import Layout

# What mindspore.transform_checkpoints (2.10.0) makes of every layout that it accepts: number, full shape,
# device matrix, tensor map, optimizer step/size, shard shape, and of every rank the first index it holds.
ACCEPTED_BY_MINDSPORE = """\
1 16x4 [8] [0,-1] 0/0 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
2 16x4 [1,8] [0,-1] 0/0 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
3 16x4 [2,4] [0,-1] 0/0 4x4: 0,0 4,0 8,0 12,0 0,0 4,0 8,0 12,0
4 16x4 [2,4] [1,-1] 0/0 8x4: 0,0 0,0 0,0 0,0 8,0 8,0 8,0 8,0
5 16x8 [2,4] [1,0] 0/0 8x2: 0,0 0,2 0,4 0,6 8,0 8,2 8,4 8,6
6 16x8 [2,4] [0,1] 0/0 4x4: 0,0 4,0 8,0 12,0 0,4 4,4 8,4 12,4
7 16x8 [2,4] [-1,0] 0/0 16x2: 0,0 0,2 0,4 0,6 0,0 0,2 0,4 0,6
8 16x8 [2,2,2] [2,0] 0/0 8x4: 0,0 0,4 0,0 0,4 8,0 8,4 8,0 8,4
9 16x8 [2,2,2] [1,-1] 0/0 8x8: 0,0 0,0 8,0 8,0 0,0 0,0 8,0 8,0
10 16 [2,4] [0] 0/0 4: 0 4 8 12 0 4 8 12
11 16 [2,4] [-1] 0/0 16: 0 0 0 0 0 0 0 0
12 16x4 [2,2] [0,-1] 2/2 4x4: 0,0 8,0 4,0 12,0
13 16x4 [2,2] [0,-1] 2/-1 4x4: 0,0 8,0 4,0 12,0
14 16x4 [2,2] [-1,0] 2/2 8x2: 0,0 0,2 8,0 8,2
15 16x4 [2,2] [-1,0] 2/-1 8x2: 0,0 0,2 8,0 8,2
16 16x4 [4,2] [0,-1] 2/4 2x4: 0,0 8,0 2,0 10,0 4,0 12,0 6,0 14,0
17 16x4 [4,2] [0,-1] 2/-1 2x4: 0,0 8,0 2,0 10,0 4,0 12,0 6,0 14,0
18 16x4 [4,2] [0,-1] 2/2 4x4: 0,0 8,0 4,0 12,0 0,0 8,0 4,0 12,0
19 16x4 [4,2] [-1,0] 2/2 8x2: 0,0 0,2 8,0 8,2 0,0 0,2 8,0 8,2
20 16x4 [2,4] [1,-1] 1/4 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
21 16x4 [2,4] [1,-1] 1/2 4x4: 0,0 4,0 0,0 4,0 8,0 12,0 8,0 12,0
22 16x4 [2,4] [1,-1] 1/-1 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
23 16x4 [8] [-1,-1] 1/8 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
24 16x4 [8] [-1,-1] 1/-1 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
25 16x4 [8] [-1,-1] 1/4 4x4: 0,0 4,0 8,0 12,0 0,0 4,0 8,0 12,0
26 16x4 [8] [-1,-1] 1/2 8x4: 0,0 8,0 0,0 8,0 0,0 8,0 0,0 8,0
29 16x4 [2,4] [-1,-1] 1/8 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
30 16x4 [2,4] [-1,-1] 1/-1 2x4: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
32 16x4 [2,4] [-1,-1] 1/4 4x4: 0,0 4,0 8,0 12,0 0,0 4,0 8,0 12,0
33 16x4 [2,2,2] [0,-1] 2/2 4x4: 0,0 8,0 4,0 12,0 0,0 8,0 4,0 12,0
34 16x4 [2,2,2] [0,-1] 2/4 2x4: 0,0 8,0 2,0 10,0 4,0 12,0 6,0 14,0
35 16x4 [2,2,2] [0,-1] 2/-1 2x4: 0,0 8,0 2,0 10,0 4,0 12,0 6,0 14,0
36 16x4 [2,2,2] [0,-1] 4/2 4x4: 0,0 8,0 4,0 12,0 0,0 8,0 4,0 12,0
37 16x4 [2,2,2] [1,-1] 1/2 4x4: 0,0 4,0 8,0 12,0 0,0 4,0 8,0 12,0
38 16x4 [2,2,2] [1,-1] 1/-1 2x4: 0,0 2,0 8,0 10,0 4,0 6,0 12,0 14,0
39 16x4 [2,2,2] [1,-1] 4/2 4x4: 0,0 4,0 8,0 12,0 0,0 4,0 8,0 12,0
40 16x4 [2,2,2] [2,0] 2/2 4x2: 0,0 0,2 4,0 4,2 8,0 8,2 12,0 12,2
41 16x4 [2,2,2] [2,0] 2/-1 4x2: 0,0 0,2 4,0 4,2 8,0 8,2 12,0 12,2
42 16 [2,2] [0] 2/2 4: 0 8 4 12
43 16 [2,2] [-1] 1/4 4: 0 4 8 12
50 16x4 [2,2] [0,-1] 2/0 8x4: 0,0 8,0 0,0 8,0
51 16x4 [2,2,2] [[2,0],[-1]] 0/0 4x4: 0,0 4,0 0,0 4,0 8,0 12,0 8,0 12,0
52 16x4 [2,2,2] [[0,2],[-1]] 0/0 4x4: 0,0 8,0 0,0 8,0 4,0 12,0 4,0 12,0
53 16x4 [2,2,2] [[2,1],[0]] 0/0 4x2: 0,0 0,2 4,0 4,2 8,0 8,2 12,0 12,2
54 16x4 [2,2,2] [[1,0],[2]] 0/0 4x2: 0,0 4,0 8,0 12,0 0,2 4,2 8,2 12,2
55 16x8 [2,2,2] [[-1],[2,1,0]] 0/0 16x1: 0,0 0,1 0,2 0,3 0,4 0,5 0,6 0,7
56 16x8 [2,4] [[1,0],[-1]] 0/0 2x8: 0,0 2,0 4,0 6,0 8,0 10,0 12,0 14,0
57 16x8 [2,4] [[0,1],[-1]] 0/0 2x8: 0,0 4,0 8,0 12,0 2,0 6,0 10,0 14,0
58 16x4 [2,2,2] [[0],[2,1]] 0/0 8x1: 0,0 8,0 0,1 8,1 0,2 8,2 0,3 8,3
59 16x4 [2,2,2] [[1,0],[-1]] 4/2 2x4: 0,0 4,0 8,0 12,0 2,0 6,0 10,0 14,0
60 16x4 [2,2,2] [[1,0],[-1]] 4/-1 2x4: 0,0 4,0 8,0 12,0 2,0 6,0 10,0 14,0
61 16x4 [2,2,2] [[2,0],[-1]] 2/2 2x4: 0,0 4,0 2,0 6,0 8,0 12,0 10,0 14,0
62 32x4 [2,2,2,2] [[1,0],[-1]] 4/2 4x4: 0,0 8,0 16,0 24,0 4,0 12,0 20,0 28,0 0,0 8,0 16,0 24,0 4,0 12,0 20,0 28,0
63 32x4 [2,2,2,2] [[1,0],[-1]] 4/-1 2x4: 0,0 8,0 16,0 24,0 2,0 10,0 18,0 26,0 4,0 12,0 20,0 28,0 6,0 14,0 22,0 30,0
64 32x4 [2,2,2,2] [[1,0],[-1]] 4/4 2x4: 0,0 8,0 16,0 24,0 2,0 10,0 18,0 26,0 4,0 12,0 20,0 28,0 6,0 14,0 22,0 30,0
72 9x4 [3] [0,-1] 0/0 3x4: 0,0 3,0 6,0
73 12x4 [6] [0,-1] 0/0 2x4: 0,0 2,0 4,0 6,0 8,0 10,0
74 scalar [4] [] 0/0 scalar: - - - -
76 1 [4] [-1] 0/0 1: 0 0 0 0
"""

# Layouts on which it fails, with the error that it gives, and what they mean to us: the boxes of another
# layout (where the step alone disturbs it, which says nothing that size and ranks do not), or an error.
REFUSED_BY_MINDSPORE = [
    # number, full shape, device matrix, tensor map, optimizer pieces, ours: pattern of an error or first indices
    (27, (16, 4), (8,), "[-1,-1]", 2, "0,0 8,0 0,0 8,0 0,0 8,0 0,0 8,0"),  # step 2 is not 1
    (28, (16, 4), (8,), "[-1,-1]", 4, "0,0 4,0 8,0 12,0 0,0 4,0 8,0 12,0"),  # step 2 is not 1
    (31, (16, 4), (2, 4), "[-1,-1]", 2, "0,0 8,0 0,0 8,0 0,0 8,0 0,0 8,0"),  # Rank 2 is not in the current stage!
    (44, (16,), (2, 2), "[-1]", 2, "0 8 0 8"),  # Rank 2 is not in the current stage!
    (45, (6, 4), (4, 2), "[0,-1]", -1, "a dimension of 6 is to be cut into 8"),  # Infer tensor redistribution failed
    (46, (4, 4), (2, 4), "[0,-1]", 2, "a dimension of 4 is to be cut into 8"),  # idx is 2 but array size is 2
    (47, (16, 4), (2, 2), "[0,-1]", 2, "0,0 8,0 4,0 12,0"),  # step 1 is not 2
    (48, (16, 4), (2, 2), "[1,0]", 2, "only 1 ranks hold the same slice"),  # cannot sharding opt_shard
    (49, (16, 4), (2, 2), "[0,-1]", 2, "0,0 8,0 4,0 12,0"),  # step 0: cannot reshape array
    (65, (16,), (2, 4), "[[1,0]]", 0, "0 2 4 6 8 10 12 14"),  # the tensor map dimensions must match
    (66, (10, 4), (4,), "[0,-1]", 0, "a dimension of 10 is to be cut into 4"),  # Infer tensor redistribution failed
    (67, (7, 4), (2, 2), "[0,-1]", 0, "a dimension of 7 is to be cut into 2"),  # Infer tensor redistribution failed
    (68, (4, 10), (4,), "[-1,0]", 0, "a dimension of 10 is to be cut into 4"),  # Infer tensor redistribution failed
    (69, (2, 4), (4,), "[0,-1]", 0, "a dimension of 2 is to be cut into 4"),  # Infer tensor redistribution failed
    (70, (10, 4), (2, 2), "[0,-1]", 2, "a dimension of 10 is to be cut into 4"),  # idx is 2 but array size is 2
    (71, (16, 4), (3,), "[0,-1]", 0, "a dimension of 16 is to be cut into 3"),  # Infer tensor redistribution failed
    (75, (), (2, 2), "[]", 2, "a scalar cannot have an optimizer shard"),  # tuple index out of range
    (77, (1,), (2, 2), "[-1]", -1, "a dimension of 1 is to be cut into 4"),  # Can't get slice shape
]


class Row(NamedTuple):
    number: int
    layout: Layout
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


def tensor_map(text: str) -> tuple[tuple[int, ...], ...]:
    entries = (entry if isinstance(entry, list) else [entry] for entry in json.loads(text))
    return tuple(tuple(axis for axis in entry if axis != -1) for entry in entries)


def sizes(text: str) -> tuple[int, ...]:
    return () if text == "scalar" else tuple(map(int, text.split("x")))


def boxes_at(starts: str, shard: Sequence[int]) -> tuple[Box, ...]:
    firsts = [() if text == "-" else tuple(map(int, text.split(","))) for text in starts.split()]
    return tuple(Box(start, tuple(map(sum, zip(start, shard)))) for start in firsts)


def parse(line: str) -> Row:
    head, starts = line.split(": ")
    number, shape, matrix, mapping, optimizer, shard = head.split()
    step, size = map(int, optimizer.split("/"))
    layout = Layout(tuple(json.loads(matrix)), tensor_map(mapping), size, step)
    return Row(int(number), layout, sizes(shape), boxes_at(starts, sizes(shard)))


ROWS = [parse(line) for line in ACCEPTED_BY_MINDSPORE.splitlines()]


def test_the_reference_table_is_whole() -> None:
    assert sorted([row.number for row in ROWS] + [row[0] for row in REFUSED_BY_MINDSPORE]) == list(range(1, 78))


@pytest.mark.parametrize("row", ROWS, ids=[str(row.number) for row in ROWS])
def test_boxes_are_those_of_mindspore(row: Row) -> None:
    assert row.layout.boxes(row.shape) == row.boxes
    assert row.layout.full_shape(row.boxes[0].shape) == row.shape
    assert [row.layout.box(row.shape, rank) for rank in range(row.layout.rank_count)] == list(row.boxes)


@pytest.mark.parametrize("row", REFUSED_BY_MINDSPORE, ids=[str(row[0]) for row in REFUSED_BY_MINDSPORE])
def test_layouts_on_which_mindspore_fails(row: tuple[int, tuple[int, ...], tuple[int, ...], str, int, str]) -> None:
    _, shape, matrix, mapping, pieces, ours = row
    layout = Layout(matrix, tensor_map(mapping), pieces)
    if ours[0].isdigit():
        shard = tuple(extent // cut for extent, cut in zip(shape, layout.cuts))
        assert layout.boxes(shape) == boxes_at(ours, shard)
    else:
        with pytest.raises(StrategyError, match=ours):
            layout.boxes(shape)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A layout of up to four device axes and three dimensions, with and without an optimizer shard."""
    matrix = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    dimensions = draw(st.integers(0, 3))
    axes = draw(st.permutations(range(len(matrix))))
    mapping: list[tuple[int, ...]] = [()] * dimensions
    for axis in axes:
        where = draw(st.integers(-1, dimensions - 1))
        if where >= 0:
            mapping[where] += (axis,)
    layout = Layout(matrix, tuple(mapping))
    free = layout.rank_count // math.prod(layout.cuts)
    divisors = [pieces for pieces in range(2, free + 1) if free % pieces == 0]
    if dimensions and divisors and draw(st.booleans()):
        return Layout(matrix, tuple(mapping), draw(st.sampled_from([*divisors, -1])))
    return layout


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    """A layout, and the shape of a tensor that it cuts evenly."""
    layout = draw(layouts())
    return layout, tuple(cut * draw(st.integers(1, 3)) for cut in layout.cuts)


def parts_by_splitting(layout: Layout, shape: tuple[int, ...]) -> list[list[int]]:
    """The elements that every rank holds, found by splitting an array axis by axis instead of by arithmetic."""
    numbered = np.arange(math.prod(shape)).reshape(shape)
    axes = len(layout.device_matrix)
    parts = []
    for rank in range(layout.rank_count):
        coordinate = np.unravel_index(rank, layout.device_matrix)
        part = numbered
        for dimension, values in enumerate(layout.tensor_map):
            for value in values:
                position = axes - 1 - value
                part = np.split(part, layout.device_matrix[position], dimension)[coordinate[position]]
        parts.append(part)
    if layout.optimizer_shards not in (0, 1):
        holders: dict[bytes, list[int]] = {}
        for rank, part in enumerate(parts):
            holders.setdefault(part.tobytes(), []).append(rank)
        for ranks in list(holders.values()):
            pieces = len(ranks) if layout.optimizer_shards == -1 else layout.optimizer_shards
            for position, rank in enumerate(ranks):
                parts[rank] = np.split(parts[rank], pieces, 0)[position % pieces]
    return [part.reshape(-1).tolist() for part in parts]


@given(cut_tensors())
def test_boxes_of_random_layouts(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    numbered = np.arange(math.prod(shape)).reshape(shape)
    held = [numbered[box.slices()].reshape(-1).tolist() for box in layout.boxes(shape)]
    assert held == parts_by_splitting(layout, shape)


@given(cut_tensors())
def test_shards_tile_the_tensor(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    shards = layout.shards(shape)
    boxes = [box for box, _ in shards]
    assert are_disjoint(boxes)
    assert sum(box.volume for box in boxes) == math.prod(shape)
    assert sorted(rank for _, ranks in shards for rank in ranks) == list(range(layout.rank_count))
    assert len({len(ranks) for _, ranks in shards}) == 1
    for box, ranks in shards:
        assert layout.full_shape(box.shape) == shape
        assert all(layout.box(shape, rank) == box for rank in ranks)


@given(cut_tensors(), layouts())
def test_same_slices_means_equal_boxes(case: tuple[Layout, tuple[int, ...]], other: Layout) -> None:
    layout, shape = case
    try:
        boxes = other.boxes(shape)
    except StrategyError:
        return
    # On a tensor with several elements in every piece, equal boxes of all ranks are equal layouts.
    assert layout.same_slices(other) == (layout.boxes(shape) == boxes)
    assert layout.same_slices(layout)


def test_same_slices_however_the_device_matrix_is_written() -> None:
    assert Layout((8,), ((0,), ())).same_slices(Layout((1, 8), ((0,), ())))
    assert Layout((2, 4), ((1, 0), ())).same_slices(Layout((8,), ((0,), ())))
    assert not Layout((2, 4), ((0, 1), ())).same_slices(Layout((8,), ((0,), ())))
    assert Layout((4, 2), ((0,), ()), 4).same_slices(Layout((4, 2), ((0, 1), ())))
    assert not Layout((2, 4), ((0,),)).same_slices(Layout((4, 2), ((1,),)))


def test_a_layout_from_names() -> None:
    mesh = {"dp": 2, "sp": 3, "mp": 4}
    assert Layout.on(mesh, "mp", None) == Layout((2, 3, 4), ((0,), ()))
    assert Layout.on(mesh, None, ("dp", "mp"), optimizer_shards=-1) == Layout((2, 3, 4), ((), (2, 0)), -1)
    assert Layout.on(mesh) == Layout((2, 3, 4), ())
    with pytest.raises(StrategyError, match=r"axis 'tp' is not in the mesh \['dp', 'sp', 'mp'\]"):
        Layout.on(mesh, "tp")


@pytest.mark.parametrize(
    ("matrix", "mapping", "pieces", "message"),
    [
        ((2, 0), ((0,),), 0, "an axis of no ranks"),
        ((2, 2), ((2,),), 0, "names an axis that the device matrix"),
        ((2, 2), ((-2,),), 0, "names an axis that the device matrix"),
        ((2, 2), ((0,), (0,)), 0, "cuts along the same axis twice"),
        ((2, 2), ((0,),), -2, "means nothing"),
    ],
)
def test_impossible_layouts(
    matrix: tuple[int, ...], mapping: tuple[tuple[int, ...], ...], pieces: int, message: str
) -> None:
    with pytest.raises(StrategyError, match=message):
        Layout(matrix, mapping, pieces)


def test_a_tensor_of_other_dimensions() -> None:
    layout = Layout((2, 2), ((0,), ()))
    for use in (layout.boxes, layout.full_shape, layout.for_shard, layout.for_whole):
        with pytest.raises(StrategyError, match=r"a tensor of 2 dimensions, but the shape is \[4\]"):
            use((4,))


def test_several_axes_of_a_vector() -> None:
    # A protobuf strategy writes the axes of a one-dimensional tensor like those of several dimensions.
    written = Layout((2, 4), ((1,), (0,)))
    assert written.for_shard((2,)) == written.for_whole((16,)) == Layout((2, 4), ((1, 0),))
    assert written.for_shard((2, 2)) == written


def flattened(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """A layout as a JSON strategy writes it: all axes of a dimension but the last become dimensions."""
    mapping: list[tuple[int, ...]] = []
    flat: list[int] = []
    for axes, extent in zip(layout.tensor_map, shape):
        for axis in axes[:-1]:
            pieces = layout.device_matrix[len(layout.device_matrix) - 1 - axis]
            mapping.append((axis,))
            flat.append(pieces)
            extent //= pieces
        mapping.append(axes[-1:])
        flat.append(extent)
    return Layout(layout.device_matrix, tuple(mapping), flat_shape=tuple(flat))


@given(cut_tensors())
def test_a_flattened_layout_is_unflattened_or_refused(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    plain = Layout(layout.device_matrix, layout.tensor_map)
    shard = tuple(extent // cut for extent, cut in zip(shape, plain.cuts))
    written = flattened(plain, shape)
    for fit, known in ((written.for_whole, shape), (written.for_shard, shard)):
        try:
            found = fit(known)
        except StrategyError as error:
            assert "more than one way" in str(error)
            continue
        assert found.same_slices(plain)
        assert found.flat_shape == ()


def test_a_flattened_layout_of_another_tensor() -> None:
    written = flattened(Layout((2, 4), ((1, 0), ())), (16, 8))
    assert written.flat_shape == (2, 8, 8)
    assert written.for_whole((16, 8)) == Layout((2, 4), ((1, 0), ()))
    assert written.for_shard((2, 8)) == Layout((2, 4), ((1, 0), ()))
    for shape in [(8, 16), (32, 8), (128,), (2, 2, 2, 16), ()]:
        with pytest.raises(StrategyError, match="does not go with"):
            written.for_whole(shape)


def test_text_of_a_layout() -> None:
    layout = Layout((2, 2, 2), ((2, 0), (), (1,)), 4)
    assert layout.describe() == "device matrix [2, 2, 2], tensor map [[2, 0], -1, 1], optimizer shard 4"
    assert Layout((2,), ((0,),)).describe() == "device matrix [2], tensor map [0]"


def test_many_flattened_dimensions_take_no_time() -> None:
    written = Layout((1,), ((),) * 64, flat_shape=(1,) * 64)
    assert written.for_whole((1,) * 32) == written.for_shard((1,) * 32) == Layout((1,), ((),) * 32)
    axes = Layout((1,) * 64, tuple((axis,) for axis in range(64)), flat_shape=(1,) * 64)
    with pytest.raises(StrategyError, match="in more than one way"):
        axes.for_whole((1,) * 32)


def test_a_recorded_shape_of_another_tensor_map() -> None:
    with pytest.raises(StrategyError, match=r"is not that of the recorded shape \[4\]"):
        Layout((2,), ((0,), ()), flat_shape=(4,))
    with pytest.raises(StrategyError, match="negative dimension"):
        Layout((2,), ((0,),), flat_shape=(-4,))
    with pytest.raises(StrategyError, match="65 axes and a tensor map of 1"):
        Layout((1,) * 65, ((),))
    with pytest.raises(StrategyError, match="an optimizer shard of 3 pieces on 2 ranks means nothing"):
        Layout((2,), ((),), 3)
