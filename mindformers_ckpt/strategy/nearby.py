"""Where the strategy of a checkpoint usually lies, for the advice of an error."""

from __future__ import annotations

from pathlib import Path

from mindformers_ckpt.errors import StrategyError
from mindformers_ckpt.strategy.files import is_strategy_folder, read_strategy
from mindformers_ckpt.strategy.model import Strategy

_NAME = "strategy"


def strategy_near(model_dir: Path, rank_count: int) -> Strategy | None:
    """The strategy in a folder in or beside `model_dir` that can be read and is for just `rank_count` ranks.

    Its `origin` is that folder.
    """
    for folder in (model_dir / _NAME, model_dir.parent / _NAME):
        try:
            if is_strategy_folder(folder):
                strategy = read_strategy(folder)
                if strategy.rank_count == rank_count:
                    return strategy
        except (StrategyError, OSError):
            continue  # files of several runs, or of a part of the ranks: nothing to propose
    return None
