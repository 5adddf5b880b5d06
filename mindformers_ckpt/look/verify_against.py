"""A proof that a result holds the tensors of a source under its own strategy, bit for bit: all is read and compared.

The plan that would make the result is gone through once more, and compared where it would be written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mindformers_ckpt.engine.descriptors import file_ranges
from mindformers_ckpt.engine.fetcher import Fetcher
from mindformers_ckpt.engine.pool import Workers, run_tasks
from mindformers_ckpt.engine.tasks import Task, cut_into_tasks
from mindformers_ckpt.execution.options import affordable_processes
from mindformers_ckpt.formats import Header, Segment, TensorRecord
from mindformers_ckpt.look.comparing import Comparer
from mindformers_ckpt.look.verify_model import Difference, Verification
from mindformers_ckpt.planning.build import build_plan
from mindformers_ckpt.planning.model import Plan, SourceFile
from mindformers_ckpt.progress import Progress
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.words import counted

Records = Mapping[str, "tuple[Path, TensorRecord]"]


def verify_against(
    result: Checkpoint,
    source: Checkpoint,
    chosen: Callable[[Sequence[str]], set[str]],
    *,
    contents: str,
    workers: Workers,
    progress: Progress | None,
    found: Verification,
) -> None:
    """Compare a result with what its source gives under the result's strategy; `chosen` picks the tensors to read."""
    plan = build_plan(source, result.strategy, contents=contents)
    found.warnings += plan.warnings
    held = {rank: result.records_of(rank) for rank in sorted(result.files.by_rank)}
    plan = _in_files(plan, {spec.name for spec, _ in result.files.counters}.difference(*held.values()))
    unfit = _compare_headers(plan, held, result, found)
    names = list(dict.fromkeys(transfer.name for transfer in plan.transfers))
    taken = chosen(names)
    plan = _without(plan, taken, unfit)
    found.checked.append(
        f"{counted(len(taken), 'tensor', of=len(names))} in the files of {counted(len(held), 'rank')}: read, and "
        "compared with the source bit by bit"
    )
    headers = {number: source.header(file.path) for number, file in enumerate(plan.sources)}
    targets = [held.get(target.rank, {}) for target in plan.targets]
    tasks, done = cut_into_tasks(plan), 0
    compared = _Comparison(plan, targets)
    workers = workers._replace(processes=affordable_processes(workers.processes))
    runs = run_tasks(partial(_Finder, plan.sources, headers, targets), tasks, workers)
    with closing(runs):
        for task, differing in runs:
            compared.add(differing)
            done += task
            if progress is not None:
                progress(done, plan.bytes_written)
    found.differences += compared.differences()


def _in_files(plan: Plan, texts: Collection[str]) -> Plan:
    """The plan without the counters that the result keeps in a file of text (checkpoint 2.0)."""
    targets = tuple(
        target._replace(tensors=tuple(spec for spec in target.tensors if spec.name not in texts))
        for target in plan.targets
    )
    kept = tuple(transfer for transfer in plan.transfers if transfer.name not in texts)
    return replace(plan, targets=targets, transfers=kept)


def _compare_headers(
    plan: Plan, held: Mapping[int, Records], result: Checkpoint, found: Verification
) -> set[tuple[int, str]]:
    """Note ranks and tensors that are missing, too many, or of another form; the (rank, name) that cannot be read."""
    unfit = set()
    wanted = {target.rank: target for target in plan.targets}
    for rank, target in wanted.items():
        if rank not in held:
            found.differences.append(Difference("there are no files of this rank", result.files.root, rank=rank))
        records = held.get(rank, {})
        expected = {spec.name: spec for spec in target.tensors if spec.size}
        for name, spec in expected.items():
            if name not in records:
                unfit.add((rank, name))
                if rank in held:
                    files = result.files.by_rank[rank]
                    found.differences.append(Difference("it is not in the file", files[0], name, rank))
                continue
            path, record = records[name]
            if (record.spec.dtype, record.spec.shape) != (spec.dtype, spec.shape):
                unfit.add((rank, name))
                what = (
                    f"it is {record.spec.dtype.name}{list(record.spec.shape)}, the source gives "
                    f"{spec.dtype.name}{list(spec.shape)}"
                )
                found.differences.append(Difference(what, path, name, rank))
        for name, (path, record) in records.items():
            if name not in expected and record.spec.size:
                found.differences.append(Difference("the source gives nothing of it to this rank", path, name, rank))
    for rank in held.keys() - wanted.keys():
        found.differences.append(Difference("the strategy has no such rank", result.files.root, rank=rank))
    return unfit


def _without(plan: Plan, chosen: set[str], unfit: set[tuple[int, str]]) -> Plan:
    """The plan for the chosen tensors, without places that cannot be read."""
    transfers = []
    for transfer in plan.transfers:
        ranks = [plan.targets[place.file].rank for place in transfer.targets]
        places = [place for place, rank in zip(transfer.targets, ranks) if (rank, transfer.name) not in unfit]
        if transfer.name in chosen and places:
            # Layers share their places, and with them what is found of them once (engine/ways.py).
            is_whole = len(places) == len(transfer.targets)
            transfers.append(transfer if is_whole else transfer.for_places(places))
    return replace(plan, transfers=tuple(transfers))


class _Differing(NamedTuple):
    """Bytes of a tensor of a target file that differ, and the place of the first one."""

    file: int
    name: str
    start: int
    length: int


class _Finder:
    """Runs tasks: reads both sides, and reports the bytes that it has compared, and those that differ."""

    def __init__(
        self, sources: Sequence[SourceFile], headers: Mapping[int, Header], targets: Sequence[Records], fetcher: Fetcher
    ) -> None:
        """`targets` are the tensors of every target file."""
        self._targets = targets
        self._found: list[_Differing] = []
        self._comparer = Comparer(sources, headers, self._content, self._note, fetcher)

    def run(self, task: Task, check: Callable[[], None], following: Task | None) -> tuple[int, list[_Differing]]:
        self._comparer.run(task, check, following)
        found, self._found = self._found, []
        return task.bytes_written, found

    def close(self) -> None:
        self._comparer.close()

    def _content(self, file: int, name: str) -> tuple[Path, Sequence[Segment]]:
        path, record = self._targets[file][name]
        return path, record.segments

    def _note(self, file: int, name: str, start: int, count: int) -> None:
        self._found.append(_Differing(file, name, start, count))


class _Comparison:
    """What was found to differ so far, by all."""

    def __init__(self, plan: Plan, targets: Sequence[Records]) -> None:
        self.plan = plan
        self._held = targets
        self._bytes: dict[tuple[int, str], int] = {}
        self._first: dict[tuple[int, str], int] = {}
        self._boxes = {
            (place.file, transfer.name): place.box for transfer in plan.transfers for place in transfer.targets
        }

    def add(self, differing: Iterable[_Differing]) -> None:
        for file, name, start, length in differing:
            key = file, name
            self._bytes[key] = self._bytes.get(key, 0) + length
            self._first[key] = min(start, self._first.get(key, start))

    def differences(self) -> list[Difference]:
        found = []
        for file, name in sorted(self._first):
            path, record = self._held[file][name]
            start = self._first[file, name]
            offset = file_ranges(record.segments, start, 1)[0][0]
            what = f"{self._bytes[file, name]} of {record.spec.nbytes} bytes differ from the source"
            rank = self.plan.targets[file].rank
            found.append(Difference(what, path, name, rank, self._boxes[file, name], offset))
        return found
