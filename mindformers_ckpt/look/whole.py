"""The one checkpoint at a path, under its strategy."""

from __future__ import annotations

import os
from typing import Union

from mindformers_ckpt.errors import PlanError
from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.find import find_source, separate_checkpoints
from mindformers_ckpt.strategy.model import Strategy

PathLike = Union[str, "os.PathLike[str]"]


def checkpoint_at(path: PathLike, strategy: PathLike | Strategy | None = None, step: str | None = None) -> Checkpoint:
    """The one checkpoint at a path, under its strategy, which some kinds bring along. Headers are read when needed.

    Raises PlanError when there are several, or files and strategy do not go together, and StrategyError.
    """
    found = separate_checkpoints(find_source(path, step))
    if len(found) > 1:
        names = ", ".join(source.root.name for source in found[:20])
        raise PlanError(f"{path} holds {len(found)} checkpoints ({names}); give the file of one")
    return Checkpoint(found[0], found[0].strategy(as_strategy(strategy)))


def as_strategy(strategy: PathLike | Strategy | None) -> Strategy:
    """A strategy, or that of a file or folder; of complete weights for None."""
    if strategy is None:
        return Strategy.complete()
    if isinstance(strategy, Strategy):
        return strategy
    from mindformers_ckpt.strategy.files import read_strategy  # protobuf

    return read_strategy(absolute(strategy))
