"""Work grows as files + ranks: counted, not timed, on jobs of some hundred ranks.

`tools/simulate_scale.py` measures thousands of ranks.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mindformers_ckpt.engine.tasks import cut_into_tasks
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.formats.dtypes import by_name
from mindformers_ckpt.geometry.box import Box
from mindformers_ckpt.geometry.layout import Layout
from mindformers_ckpt.planning.build import rank_targets
from mindformers_ckpt.planning.digest import digest_of
from mindformers_ckpt.planning.model import Place, Plan, SourceFile, Transfer, once
from mindformers_ckpt.planning.places import Places
from mindformers_ckpt.sources.shards import LogicalTensor, Shard
from mindformers_ckpt.strategy.model import Strategy

SHAPE = (4096, 64)


def strategy_of(ranks: int, names: list[str]) -> Strategy:
    """Every tensor cut by rows over some ranks, and over all of them by an optimizer shard."""
    layout = Layout.on({"dp": ranks // 8, "mp": 8}, "mp", None, optimizer_shards=ranks // 8)
    return Strategy.of_stages((dict.fromkeys(names, layout),), "some")


def plan_of(source_ranks: int, target_ranks: int, tensors: int) -> Plan:
    """The plan between two strategies, of files that are not there."""
    names = [f"layers.{number}.weight" for number in range(tensors)]
    source, target = strategy_of(source_ranks, names), strategy_of(target_ranks, names)
    paths = [Path(f"/source/rank_{rank}/a.ckpt") for rank in range(source_ranks)]
    found = Places(target, range(target_ranks), {path: number for number, path in enumerate(paths)})
    transfers: list[Transfer] = []
    held: list[list[TensorSpec]] = [[] for _ in range(target_ranks)]
    for name in names:
        layout, dtype = source.stages[0][name], by_name("float32")
        shards = tuple(Shard(ranks[0], paths[ranks[0]], box) for box, ranks in layout.shards(SHAPE))
        tensor = LogicalTensor(TensorSpec(name, dtype, SHAPE), shards, (), layout, (0,))
        way = found.way(tensor)
        transfers.append(Transfer(name, dtype, SHAPE, found.sources(tensor, way), way.targets))
        for shape, files in way.holders.items():
            for file in files:
                held[file].append(TensorSpec(name, dtype, shape))
    targets = rank_targets(range(target_ranks), held, "checkpoint_", "ckpt")
    return Plan(tuple(SourceFile(path, 1 << 30) for path in paths), targets, tuple(transfers))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Iterator[list[int]]:
    """Count the calls of a method."""
    calls = [0]
    original = getattr(owner, name)

    def count(*arguments: Any) -> Any:
        calls[0] += 1
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, count)
        yield calls


def test_boxes_that_are_compared_for_tasks_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are files and ranks, whatever the number of tensors that are cut alike."""
    comparisons = {}
    for tensors in (2, 20):
        plan = plan_of(512, 256, tensors)
        with counted(monkeypatch, Box, "intersect") as calls:
            tasks = cut_into_tasks(plan, by_rank=True)
        comparisons[tensors] = calls[0]
        assert [task.bytes_written for task in tasks] == [tensors * 4096 * 64 * 4 // 256] * 256
        assert {len(piece.transfer.sources) for task in tasks for piece in task.slices} == {2}
    assert comparisons[2] == comparisons[20] <= 4 * (512 + 256)


def test_boxes_that_are_compared_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch, Box, "intersect") as calls:
        plan_of(512, 256, 20).check()
    assert calls[0] <= 8 * (512 + 256)


def test_tensors_that_are_cut_alike_share_their_places() -> None:
    plan = plan_of(64, 32, 10)
    assert len({id(transfer.sources) for transfer in plan.transfers}) == 1
    assert len({id(transfer.targets) for transfer in plan.transfers}) == 1
    parts = plan.by_target()
    assert len({id(part.sources) for taken in parts for part in taken}) == 32
    # What was shared is what every target file takes of the whole plan.
    assert [plan.for_targets([file]).transfers for file in range(32)] == [tuple(taken) for taken in parts]


def test_a_digest_takes_no_memory_and_is_that_of_the_contents() -> None:
    plan = plan_of(512, 256, 40)
    digest_of(plan)
    tracemalloc.start()
    try:
        digest = digest_of(plan)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000  # 30,720 places; as text they would have 2 MB
    unshared = [
        transfer._replace(sources=tuple(map(copied, transfer.sources)), targets=tuple(map(copied, transfer.targets)))
        for transfer in plan.transfers
    ]
    assert digest_of(Plan(plan.sources, plan.targets, tuple(unshared))) == digest
    other = plan.transfers[-1].targets[-1]._replace(box=Box((0, 0), (16, 64)))
    changed = plan.transfers[-1]._replace(targets=(*plan.transfers[-1].targets[:-1], other))
    assert digest_of(Plan(plan.sources, plan.targets, (*plan.transfers[:-1], changed))) != digest


def copied(place: Place) -> Place:
    return place._replace(box=Box(*place.box))


def test_once_calls_a_function_once_for_each_object() -> None:
    calls: list[list[int]] = []

    def length(places: list[int]) -> int:
        calls.append(places)
        return len(places)

    length_of = once(length)
    first, second = [1], [1]
    assert [length_of(first), length_of(second), length_of(first)] == [1, 1, 1]
    assert len(calls) == 2
