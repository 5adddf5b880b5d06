"""The work of a plan whose result goes to an object storage, in the order in which parts of objects become whole.

Some target files are made together, so that source bytes which several of them take are read once, as the ranks of a
group of model parallelism do. Of each group all blocks are sorted by where they go: whatever a target tensor is put
together from (query, key and value, or experts), its parts wait in memory for a few blocks only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mindformers_ckpt.engine.descriptors import file_ranges
from mindformers_ckpt.engine.object_sink import Upload
from mindformers_ckpt.engine.sinks import Layouts
from mindformers_ckpt.engine.tasks import Slice, Task, block_boxes
from mindformers_ckpt.engine.views import target_runs
from mindformers_ckpt.formats import FileLayout
from mindformers_ckpt.geometry.box import Box, offset_in
from mindformers_ckpt.planning.model import Place, Plan, Transfer

_FILES_TOGETHER = 8
_TASK_BYTES = 256 << 20


class _Block(NamedTuple):
    """A block of a transfer: where it goes first, and how many bytes of the result it makes."""

    start: int
    slice: Slice
    size: int


def object_tasks(plan: Plan, uploads: Sequence[Upload], *, whole_groups: bool) -> list[Task]:
    """The tasks that make what the storage does not have. `whole_groups`: each makes some target files completely.

    Otherwise one process has to run all of them, in their order.
    """
    layout = Layouts(plan.targets).of
    tasks: list[Task] = []
    for transfers in plan.by_target(_FILES_TOGETHER):
        found = (block for transfer in transfers for block in _blocks(transfer, uploads, layout))
        pending: list[Slice] = []
        size = 0
        for block in sorted(found, key=lambda block: block.start):
            pending.append(block.slice)
            size += block.size
            if size >= _TASK_BYTES and not whole_groups:
                tasks.append(Task(len(tasks), tuple(pending), size))
                pending, size = [], 0
        if pending:
            tasks.append(Task(len(tasks), tuple(pending), size))
    return tasks


def _blocks(transfer: Transfer, uploads: Sequence[Upload], layout: Callable[[int], FileLayout]) -> Iterator[_Block]:
    """The blocks of a transfer, without those that are in the storage."""
    for number, box in enumerate(block_boxes(transfer)):
        start, size, is_missing = -1, 0, False
        for place in transfer.targets:
            part = place.box.intersect(box)
            if part is None:
                continue
            first, last = _span(transfer, place, part, layout(place.file))
            upload = uploads[place.file]
            is_missing = is_missing or not upload.done.issuperset(upload.parts_of(first, last))
            start = first if start < 0 else min(start, first)
            size += part.volume * transfer.dtype.itemsize
        if is_missing:
            yield _Block(start, Slice(transfer, number, 1), size)


def _span(transfer: Transfer, place: Place, part: Box, layout: FileLayout) -> tuple[int, int]:
    """The first byte of a target file that a part goes to, and the one behind the last."""
    itemsize = transfer.dtype.itemsize
    segments = layout.tensors[transfer.name].segments
    first = offset_in(part, place.box)
    begin, _ = next(target_runs(place.view, first, 1))
    end, _ = next(target_runs(place.view, first + part.volume - 1, 1))
    return (
        file_ranges(segments, begin * itemsize, 1)[0][0],
        file_ranges(segments, (end + 1) * itemsize - 1, 1)[0][0] + 1,
    )
