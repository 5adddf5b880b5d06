"""A strategy as callers give it: one that was read, the path of one, or None for complete weights."""

from __future__ import annotations

import os
from typing import Union

from mindformers_ckpt.objects.path import absolute
from mindformers_ckpt.strategy.model import Strategy

StrategyLike = Union[str, "os.PathLike[str]", Strategy, None]


def as_strategy(given: StrategyLike) -> Strategy:
    """The strategy itself; that of a path is read. Raises StrategyError."""
    return strategy_or_none(given) or Strategy.complete()


def strategy_or_none(given: StrategyLike) -> Strategy | None:
    """`as_strategy`, with None for None."""
    if given is None or isinstance(given, Strategy):
        return given
    from mindformers_ckpt.strategy.files import read_strategy  # protobuf

    return read_strategy(absolute(given))
