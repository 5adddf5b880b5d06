"""Weights without the detour (`auto_trans_save: False`): a rank reads just its own boxes from the source.

Nothing is written, and no rank waits for another: every rank plans for itself and reads in its own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from mindformers_ckpt.engine.ahead import Fetcher
from mindformers_ckpt.engine.buffers import BLOCK_BYTES, empty_bytes
from mindformers_ckpt.engine.copier import Copier, cut_into_tasks
from mindformers_ckpt.engine.reader import Read, ShardReader
from mindformers_ckpt.engine.sinks import ArraySink
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.geometry.box import Box, blocks
from mindformers_ckpt.planning.model import Place, Plan, Transfer

if TYPE_CHECKING:
    import numpy as np


def read_direct(plan: Plan, check: Callable[[], None]) -> Iterator[tuple[TensorSpec, np.ndarray[Any, Any]]]:
    """The tensors of the one target of `plan`, each as the bytes of its content in memory of its own.

    `check` is called between blocks and may raise to stop. Raises TransferError when reading fails.
    """
    (target,) = plan.targets
    sink = ArraySink(target, empty_bytes)
    plain = [transfer for transfer in plan.transfers if _is_plain(transfer)]
    others = replace(plan, transfers=tuple(transfer for transfer in plan.transfers if not _is_plain(transfer)))
    # Other ranks of the node read the same files, often the same bytes: so through the page cache.
    with closing(Fetcher(is_shared=True)) as fetcher:
        reader = ShardReader(plan.sources, fetcher)
        for block in reader.ahead(0, _blocks(plain), None):
            check()
            reader.read(*block.read(), block.array(sink.contents[block.transfer.name]))
        _copy_others(others, sink, fetcher, check)
    for spec in target.tensors:
        yield spec, sink.contents.pop(spec.name)


def _is_plain(transfer: Transfer) -> bool:
    """Whether the target tensor is made of boxes of source tensors as they are, with no view or computation."""
    return len(transfer.targets) == 1 and all(place.is_plain for place in (*transfer.sources, *transfer.targets))


class _Block(NamedTuple):
    """A block of what a tensor takes of a source, read to its place without a buffer where it is contiguous there."""

    transfer: Transfer
    place: Place
    box: Box

    def read(self) -> Read:
        return Read(self.place, self.transfer.name, self.transfer.dtype, self.box)

    def reads(self) -> Iterator[Read]:
        yield self.read()

    def array(self, content: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Where the block lies in the content of its tensor."""
        wanted = self.transfer.targets[0].box
        tensor = content.view(self.transfer.dtype.carrier).reshape(wanted.shape)
        block: np.ndarray[Any, Any] = tensor[self.box.relative_to(wanted).slices()]
        return block


def _blocks(transfers: Sequence[Transfer]) -> Iterator[_Block]:
    for transfer in transfers:
        for place in transfer.sources:
            part = place.box.intersect(transfer.targets[0].box)
            if part is not None:
                for box in blocks(part, max(1, BLOCK_BYTES // transfer.dtype.itemsize)):
                    yield _Block(transfer, place, box)


def _copy_others(plan: Plan, sink: ArraySink, fetcher: Fetcher, check: Callable[[], None]) -> None:
    """Make the tensors that are put together, turned or computed, as in a file."""
    if not plan.transfers:
        return
    with closing(Copier(plan.sources, sink, fetcher=fetcher)) as copier:
        tasks = cut_into_tasks(plan)
        for task, following in zip_longest(tasks, tasks[1:]):
            copier.run(task, check, following)
