"""Weights without the detour (`auto_trans_save: False`): a rank reads just its own boxes from the source.

Nothing is written, and no rank waits for another: every rank plans for itself and reads in its own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.engine.buffers import BLOCK_BYTES, empty_bytes
from mindformers_ckpt.engine.copier import Copier, cut_into_tasks
from mindformers_ckpt.engine.reader import ShardReader
from mindformers_ckpt.engine.sinks import ArraySink
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import blocks
from mindformers_ckpt.planning.model import Plan, Transfer

if TYPE_CHECKING:
    import numpy as np


def read_direct(plan: Plan, check: Callable[[], None]) -> Iterator[tuple[TensorSpec, np.ndarray[Any, Any]]]:
    """The tensors of the one target of `plan`, each as the bytes of its content in memory of its own.

    `check` is called between blocks and may raise to stop. Raises TransferError when reading fails.
    """
    (target,) = plan.targets
    sink = ArraySink(target, empty_bytes)
    plain = [transfer for transfer in plan.transfers if _is_plain(transfer)]
    with closing(ShardReader(plan.sources)) as reader:
        for transfer in plain:
            _read_plain(reader, transfer, sink.contents[transfer.name], check)
    others = replace(plan, transfers=tuple(transfer for transfer in plan.transfers if not _is_plain(transfer)))
    _copy_others(others, sink, check)
    for spec in target.tensors:
        yield spec, sink.contents.pop(spec.name)


def _is_plain(transfer: Transfer) -> bool:
    """Whether the target tensor is made of boxes of source tensors as they are, with no view or computation."""
    return len(transfer.targets) == 1 and all(place.is_plain for place in (*transfer.sources, *transfer.targets))


def _read_plain(
    reader: ShardReader, transfer: Transfer, content: np.ndarray[Any, Any], check: Callable[[], None]
) -> None:
    """Read every source box to its place in the tensor, without a buffer in between where it is contiguous there."""
    dtype, wanted = transfer.dtype, transfer.targets[0].box
    tensor = content.view(dtype.carrier).reshape(wanted.shape)
    for place in transfer.sources:
        part = place.box.intersect(wanted)
        if part is not None:
            for block in blocks(part, max(1, BLOCK_BYTES // dtype.itemsize)):
                check()
                reader.read(place, transfer.name, dtype, block, tensor[block.relative_to(wanted).slices()])


def _copy_others(plan: Plan, sink: ArraySink, check: Callable[[], None]) -> None:
    """Make the tensors that are put together, turned or computed, as in a file."""
    if not plan.transfers:
        return
    with closing(Copier(plan.sources, sink)) as copier:
        for task in cut_into_tasks(plan):
            copier.run(task, check)
