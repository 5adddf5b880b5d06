from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ckpt.geometry.box import (
    Box,
    BoxIndex,
    are_disjoint,
    block_count,
    blocks,
    covered_volume,
    hull,
    meets,
    offset_in,
    run_length,
)

SHAPES = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def boxes_of(draw: st.DrawFn, count: int = 1) -> tuple[tuple[int, ...], list[Box]]:
    """A shape of a tensor, and boxes of it with at least one element."""
    shape = draw(SHAPES)
    boxes = []
    for _ in range(count):
        start = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
        stop = tuple(draw(st.integers(first + 1, extent)) for first, extent in zip(start, shape))
        boxes.append(Box(start, stop))
    return shape, boxes


def indices(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*map(range, box.start, box.stop)))


def positions(box: Box, outer: Box) -> list[int]:
    """The positions of the elements of a box in the row-major order of another one that contains it."""
    numbered = np.arange(outer.volume).reshape(outer.shape)
    return [int(number) for number in numbered[box.relative_to(outer).slices()].reshape(-1)]


def is_run(numbers: list[int]) -> bool:
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_a_scalar_is_the_box_of_no_dimensions() -> None:
    scalar = Box.whole(())
    assert scalar == Box((), ())
    assert scalar.volume == 1
    assert scalar.intersect(scalar) == scalar
    assert scalar.contains(scalar)
    assert hull([scalar, scalar]) == scalar
    assert list(blocks(scalar, 1)) == [scalar]
    assert block_count(scalar, 1) == 1
    assert offset_in(scalar, scalar) == 0
    assert run_length((), ()) == 1
    assert str(scalar) == "[]"


def test_slices_give_views_even_of_scalars() -> None:
    for shape in [(), (3,), (2, 3)]:
        array = np.zeros(shape, np.int32)
        array[Box.whole(shape).slices()][...] = 7
        assert (array == 7).all()


def test_an_empty_box_has_no_blocks() -> None:
    empty = Box.whole((3, 0, 2))
    assert empty.volume == 0
    assert empty.intersect(empty) is None
    assert list(blocks(empty, 5)) == []
    assert block_count(empty, 5) == 0
    assert Box.whole((0,)).contains(Box.whole((0,)))


def test_text_of_a_box() -> None:
    assert str(Box((0, 4), (2, 8))) == "[0:2, 4:8]"


@pytest.mark.parametrize("limit", [0, -1])
def test_a_block_holds_at_least_one_element(limit: int) -> None:
    with pytest.raises(ValueError, match="at least one element"):
        list(blocks(Box.whole((2,)), limit))


@given(boxes_of(2))
def test_intersection_holds_the_common_indices(case: tuple[tuple[int, ...], list[Box]]) -> None:
    _, (a, b) = case
    common = indices(a) & indices(b)
    part = a.intersect(b)
    assert (indices(part) if part else set()) == common
    assert part == b.intersect(a)
    assert are_disjoint([a, b]) == (not common)
    assert a.contains(b) == (indices(b) <= indices(a))
    assert a.intersect(a) == a


@given(boxes_of(3))
def test_hull_is_the_smallest_box_around_boxes(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    around = hull(boxes)
    assert all(around.contains(box) for box in boxes)
    assert Box.whole(shape).contains(around)
    for axis in range(len(shape)):
        assert around.start[axis] == min(box.start[axis] for box in boxes)
        assert around.stop[axis] == max(box.stop[axis] for box in boxes)


@given(boxes_of(6), st.integers(1, 6))
def test_disjoint_boxes_share_no_index(case: tuple[tuple[int, ...], list[Box]], count: int) -> None:
    boxes = case[1][:count]
    held = [index for box in boxes for index in indices(box)]
    assert are_disjoint(boxes) == (len(set(held)) == len(held))


@pytest.mark.parametrize("shape", [(1024, 1), (1, 1024), (32, 32)])
def test_thousands_of_boxes_are_compared_quickly(shape: tuple[int, int]) -> None:
    cells = [Box((row, column), (row + 1, column + 1)) for row in range(shape[0]) for column in range(shape[1])]
    assert are_disjoint(cells)
    assert not are_disjoint([*cells, cells[123]])


@given(boxes_of(), st.integers(1, 20), st.integers(1, 3))
def test_covered_volume_counts_elements(case: tuple[tuple[int, ...], list[Box]], limit: int, step: int) -> None:
    shape, (box,) = case
    disjoint = list(blocks(Box.whole(shape), limit))[::step]
    assert covered_volume(box, disjoint) == len(indices(box) & set().union(*map(indices, disjoint)))


@given(boxes_of(2))
def test_a_box_relative_to_another(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (inner, other) = case
    outer = hull([inner, other])
    array = np.arange(math.prod(shape)).reshape(shape)
    part = array[outer.slices()][inner.relative_to(outer).slices()]
    assert part.tolist() == array[inner.slices()].tolist()
    assert inner.relative_to(Box.whole(shape)) == inner


@given(boxes_of(2))
def test_runs_and_offsets_are_those_of_row_major_order(case: tuple[tuple[int, ...], list[Box]]) -> None:
    _, (box, other) = case
    outer = hull([box, other])
    numbers = positions(box, outer)
    assert offset_in(box, outer) == numbers[0]
    assert (run_length(box.shape, outer.shape) == box.volume) == is_run(numbers)
    length = run_length(box.shape, outer.shape)
    assert len(numbers) % length == 0
    assert all(is_run(numbers[first : first + length]) for first in range(0, len(numbers), length))


@given(boxes_of(), st.integers(1, 40))
def test_blocks_partition_a_box_in_row_major_order(case: tuple[tuple[int, ...], list[Box]], limit: int) -> None:
    _, (box,) = case
    cut = list(blocks(box, limit))
    assert [number for block in cut for number in positions(block, box)] == list(range(box.volume))
    assert all(block.volume <= limit for block in cut)
    assert block_count(box, limit) == len(cut)


@given(boxes_of(2), st.integers(1, 40))
def test_a_block_is_one_run_of_every_box_inside(case: tuple[tuple[int, ...], list[Box]], limit: int) -> None:
    _, (inner, other) = case
    for block in blocks(hull([inner, other]), limit):
        part = block.intersect(inner)
        if part is not None:
            assert is_run(positions(part, inner))


@pytest.mark.parametrize(
    ("shape", "limit", "count"),
    [
        ((4, 6), 24, 1),
        ((4, 6), 23, 2),  # three rows, and one
        ((4, 6), 12, 2),
        ((4, 6), 6, 4),
        ((4, 6), 5, 8),  # no whole row fits: each is cut by itself
        ((3, 4, 5), 20, 3),
        ((3, 4, 5), 39, 3),
        ((3, 4, 5), 10, 6),
        ((3, 1, 5), 10, 2),
        ((10,), 3, 4),
    ],
)
def test_blocks_are_as_large_as_they_can_be(shape: tuple[int, ...], limit: int, count: int) -> None:
    assert block_count(Box.whole(shape), limit) == count


@given(boxes_of(count=8))
def test_an_index_of_boxes_finds_all_that_share_an_element(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (wanted, *others) = case
    expected = [number for number, box in enumerate(others) if indices(box) & indices(wanted)]
    assert BoxIndex(others).meeting(wanted) == expected
    empty = Box.whole((*shape, 0))
    assert BoxIndex([empty, empty]).meeting(empty) == [0, 1]
    assert meets(empty, empty)
    assert BoxIndex([]).meeting(wanted) == []
