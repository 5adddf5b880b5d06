"""Weights without the detour (`auto_trans_save: False`): a rank reads just its own boxes from the source.

Nothing is written, and no rank waits for another: every rank plans for itself and reads in its own process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mindformers_ckpt.execute import Copier, cut_into_tasks
from mindformers_ckpt.formats import TensorSpec
from mindformers_ckpt.plan import Plan
from mindformers_ckpt.shard_io import ArraySink

if TYPE_CHECKING:
    import numpy as np


def read_direct(plan: Plan, check: Callable[[], None]) -> Iterator[tuple[TensorSpec, np.ndarray[Any, Any]]]:
    """The tensors of the one target of `plan`, each as the bytes of its content in memory of its own.

    `check` is called between blocks and may raise to stop. Raises TransferError when reading fails.
    """
    import numpy as np

    (target,) = plan.targets
    sink = ArraySink(target, lambda size: np.empty(size, np.uint8))
    copier = Copier(plan.sources, sink)
    try:
        for task in cut_into_tasks(plan):
            copier.run(task, check)
    finally:
        copier.close()
    for spec in target.tensors:
        yield spec, sink.contents.pop(spec.name)
