"""The one checkpoint at a path, under its strategy."""

from __future__ import annotations

from mindformers_ckpt.objects.path import PathLike
from mindformers_ckpt.sources.checkpoint import Checkpoint
from mindformers_ckpt.sources.complete import only_checkpoint
from mindformers_ckpt.sources.find import find_source
from mindformers_ckpt.strategy.given import StrategyLike, as_strategy


def checkpoint_at(path: PathLike, strategy: StrategyLike = None, step: str | None = None) -> Checkpoint:
    """The one checkpoint at a path, under its strategy, which some kinds bring along. Headers are read when needed.

    Raises PlanError when there are several, or files and strategy do not go together, and StrategyError.
    """
    found = only_checkpoint(find_source(path, step))
    return Checkpoint(found, found.strategy(as_strategy(strategy)))
